"""The rows that run: a prompt is read into one, steps go on with all, and longer ones move to a larger cache.

B running rows, S slots of a row, R directions of adapters.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.inference.engine import sample
from jaxlm.inference.engine.answer import Answer
from jaxlm.inference.engine.pages import Pages
from jaxlm.inference.engine.programs import Programs
from jaxlm.inference.engine.reading import Reading
from jaxlm.inference.engine.request import PromptScores
from jaxlm.inference.engine.stats import Stats

PATIENCE = 64  # steps that a smaller cache must be enough for before rows move to it


class Rows:
    """Running rows, the cache that holds them, and the pool of pages."""

    def __init__(
        self,
        programs: Programs,
        pages: Pages,
        stats: Stats,
        adapters: Mapping[str, np.ndarray],
        none_R: np.ndarray | None,
    ) -> None:
        self.programs, self.pages, self.stats = programs, pages, stats
        self._adapters, self._none_R = adapters, none_R
        self.reading: Reading | None = None
        self.running: list[Answer] = []
        self.pool = programs.empty(pages.count + 1, pages.size) if pages.count else ()
        self._pair = programs.shapes.pair(1, 1)
        assert self._pair is not None
        self._layers = programs.empty(*self._pair)
        self._under_way: tuple[sample.Chosen, list[tuple[int, Answer]]] | None = None
        self._before_B: Any = np.zeros(self._pair[0], np.int32)
        self._steps_too_large = 0

    @property
    def is_busy(self) -> bool:
        return self.reading is not None or bool(self.running) or self._under_way is not None

    @property
    def everyone(self) -> list[Answer]:
        """Returns the answers that run and those whose prompt is being read."""
        return [*self.running, *(self.reading.answers if self.reading else ())]

    def salt(self, answer: Answer) -> str:
        """Returns what tells an answer's pages from those of the same tokens under another adapter or salt."""
        return repr((answer.request.adapter, answer.request.salt))

    def length_for(self, tokens: int) -> int:
        """Returns the slots of a row of its own for so many tokens."""
        return min(n for n in self.programs.shapes.lengths if n >= tokens)

    def num_fitting(self, answers: Sequence[Answer]) -> int:
        """Returns how many of answers that wait could run now beside those that do."""
        need = max([len(answers[0].text_so_far) + 1, *(a.end + 1 for a in self.running)])
        for count in range(len(answers), 0, -1):
            if self.programs.shapes.pair(len(self.running) + count, need) is not None:
                return count
        return 0

    # ----------------------------------------------------------------------------------------------------- reading

    def start_reading(self, answers: list[Answer], number: int) -> None:
        """Begins to read answers' prompt, behind what the prefix cache has of it."""
        request, tokens = answers[0].request, answers[0].text_so_far
        length = self.length_for(len(tokens) + 1)
        pages: list[int] = []
        if self.pages.count and request.prompt_logprobs is None:
            names = self.pages.names(tokens[:-1], self.salt(answers[0]))
            for answer in answers:
                pages = self.pages.find(names)
                answer.pages = names[: len(pages)]
            self.stats.prefix_queries += len(tokens)
            self.stats.prefix_hits += len(pages) * self.pages.size
        end = len(pages) * self.pages.size
        if not answers[0].tokens:
            answers[0].answering.cached = end
        row = self.programs.load(self.pool, pages, length) if pages else self.programs.empty(1, length)
        first = len(request.prompt) if self.programs.both_ways else 0
        self.reading = Reading(answers, number, tokens, row, end, first)

    def read_chunk(self) -> bool:
        """Reads a chunk of the prompt, and returns whether it was the last."""
        r = self.reading
        assert r is not None
        request, programs = r.answers[0].request, self.programs
        if r.end == 0 and r.first:
            T, count = programs.chunk(r.first, at_once=True)
        else:
            T, count = programs.chunk(len(r.tokens) - r.end)
        end, stop = r.end, r.end + count
        slots = self.length_for(len(r.tokens) + 1)
        end = min(end, max(0, slots - T))  # what was read is read again where a chunk would reach beyond the row
        chunk = r.tokens[end:stop]
        source = request.source if programs.shapes.source else None
        x_1TD, r.row = programs.read(r.row, end, chunk, self._mask([r.answers[0]], 1), source, r.first > 0 and not end)
        if request.prompt_logprobs is not None and not r.answers[0].tokens:
            self._score(r, x_1TD, end, stop)
        self.stats.prompt_tokens += stop - r.end
        r.state, r.end = (x_1TD, len(chunk)), stop
        return stop == len(r.tokens)

    def _score(self, r: Reading, x_1TD: Any, end: int, stop: int) -> None:
        after = r.tokens[end + 1 : stop + 1]
        own, (top, ids) = self.programs.scores(x_1TD, after)
        n = r.answers[0].request.prompt_logprobs or 0
        own, top, ids = (np.asarray(x)[len(r.scores) - 1 - end : len(after)] for x in (own, top, ids))
        r.scores += [(float(p), _likeliest(t, i, n)) for p, t, i in zip(own, top, ids, strict=True)]

    def begin(self, r: Reading) -> list[Answer]:
        """Chooses the first token of the answers whose prompt was read, and puts them among the running rows.

        Returns those for which there is no room any more.
        """
        self.reading = None
        answering = r.answers[0].answering
        if r.answers[0].request.prompt_logprobs is not None and answering.prompt_scores is None:
            logprobs, top = zip(*r.scores, strict=True)
            answering.prompt_scores = PromptScores(logprobs, top)
        x_1TD, count = r.state
        z_1V = self.programs.last_logits(x_1TD, count)
        self._keep_pages(r.answers, r.row, r.tokens)
        left = []
        for answer in r.answers:
            length = max([len(r.tokens) + 1, *(a.end + 1 for a in self.running)])
            if not self._fit(len(self.running) + 1, length):
                self._forget_pages(answer)
                left.append(answer)
                continue
            chosen = jax.device_get(self._choose(z_1V, [answer], answer.is_noted))
            answer.end = len(r.tokens)
            answer.num_asked += 1
            if not answer.done:
                self.stats.generated_tokens += 1
                _take(answer, chosen, 0)
            if answer.done:
                self._forget_pages(answer)
                continue
            taken = {a.slot for a in self.running}
            assert self._pair is not None
            answer.slot = next(i for i in range(self._pair[0]) if i not in taken)
            self.running.append(answer)
            self._layers = self.programs.insert(self._layers, r.row, answer.slot)
        return left

    # -------------------------------------------------------------------------------------------------------- steps

    def step(self) -> list[Answer]:
        """Goes one step on with the rows that run, and returns those that must wait for lack of room."""
        if self._under_way is not None and any(a.waits_for_choice for a in self.running):
            self._finish_step()
        left = self._make_room()
        active = [a for a in self.running if a.num_asked < a.rules.most]
        if self.programs.shapes.lookup and active and all(a.is_greedy for a in active) and self._guess(active):
            return left
        before, self._under_way = self._under_way, None
        if active:
            self._begin_step(active)
        if before is not None:
            self._finish_step(before)
        return left

    def _begin_step(self, active: list[Answer]) -> None:
        assert self._pair is not None
        B = self._pair[0]
        end_B, tokens_B, given_B, active_B = (np.zeros(B, t) for t in (np.int32, np.int32, bool, bool))
        rows: list[Answer | None] = [None] * B
        for a in active:
            assert a.slot is not None
            rows[a.slot] = a
            end_B[a.slot], active_B[a.slot] = a.end, True
            if a.num_asked == len(a.tokens):
                tokens_B[a.slot], given_B[a.slot] = a.tokens[-1], True
        known = tokens_B, given_B, self._before_B
        z_BV, self._layers = self.programs.step(self._layers, end_B, known, active_B, self._mask(rows, B))
        noted = any(a.is_noted for a in active)
        chosen = self._choose(z_BV, rows, noted)
        self._before_B = chosen.tokens
        self._under_way = chosen, [(a.slot or 0, a) for a in active]
        for a in active:
            a.end, a.num_asked = a.end + 1, a.num_asked + 1
        self.stats.steps += 1

    def _guess(self, active: list[Answer]) -> bool:
        """Goes on by as many tokens as answers guess right and one more, and returns whether any guessed."""
        k = self.programs.shapes.lookup
        if self._under_way is not None:
            self._finish_step()
            active = [a for a in active if not a.done and a.num_asked < a.rules.most]
        guesses = {a: a.guess(k) for a in active}
        if not any(guesses.values()) or not self._fit(len(self.running), max(a.end for a in self.running) + k + 1):
            return False
        assert self._pair is not None
        B = self._pair[0]
        tokens_BT, end_B, counts_B = np.zeros((B, k + 1), np.int32), np.zeros(B, np.int32), np.zeros(B, np.int32)
        rows: list[Answer | None] = [None] * B
        for a, guess in guesses.items():
            assert a.slot is not None
            fed = [a.tokens[-1], *guess]
            rows[a.slot], end_B[a.slot], counts_B[a.slot] = a, a.end, len(fed)
            tokens_BT[a.slot, : len(fed)] = fed
        mask = self._mask(rows, B)
        judged, self._layers = self.programs.judge(self._layers, end_B, tokens_BT, counts_B, mask)
        judged = jax.device_get(judged)
        self.stats.steps += 1
        for a, guess in guesses.items():
            said = judged.tokens[a.slot]
            right = next((i for i, token in enumerate(guess) if token != said[i]), len(guess))
            self.stats.guessed += len(guess)
            self.stats.guessed_right += right
            for i in range(right + 1):
                a.end, a.num_asked = a.end + 1, a.num_asked + 1
                self.stats.generated_tokens += 1
                a.take(int(said[i]), bool(judged.finite[a.slot][i]))
                if a.done:
                    break
        for a in [a for a in self.running if a.done]:
            self._leave(a)
        return True

    def _finish_step(self, step: Any = None) -> None:
        """Gives the tokens of a step to their answers; of the step under way, which then isn't any more, by default."""
        if step is None:
            step, self._under_way = self._under_way, None
        chosen, rows = step
        chosen = jax.device_get(chosen)
        for slot, answer in rows:
            if not answer.done:
                self.stats.generated_tokens += 1
                _take(answer, chosen, slot)
        for answer in [a for a in self.running if a.done]:
            self._leave(answer)

    def _choose(self, z_BV: Any, answers: Sequence[Answer | None], noted: bool) -> sample.Chosen:
        rows = [None if a is None else a.row() for a in answers]
        if not noted and all(r is None or r.is_plain for r in rows):
            return self.programs.greedy(z_BV)
        width = z_BV.shape[1] if any(r is not None and r.is_wide for r in rows) else 1
        return self.programs.choose(z_BV, sample.arrays(rows, width), noted)

    def _mask(self, answers: Sequence[Answer | None], rows: int) -> np.ndarray | None:
        """Returns which directions of the adapters each row has, `[B, R]`."""
        if self._none_R is None:
            return None
        out = np.zeros((rows, len(self._none_R)), np.float32)
        for i, a in enumerate(answers):
            if a is not None and a.request.adapter is not None:
                out[i] = self._adapters[a.request.adapter]
        return out

    # --------------------------------------------------------------------------------------------------------- room

    def _make_room(self) -> list[Answer]:
        """Lets the rows that came last wait until the others fit the cache with one more token each."""
        left: list[Answer] = []
        while self.running and not self._fit(len(self.running), max(a.end + 1 for a in self.running)):
            if self._under_way is not None:
                self._finish_step()  # which may end some
                continue
            last = max(self.running, key=lambda a: (a.request.priority, a.number, a.sample))
            self._leave(last)
            self.stats.preemptions += 1
            left.append(last)
        return left

    def _fit(self, rows: int, length: int) -> bool:
        """Moves to a cache of the right size, and returns whether there is one."""
        pair, now = self.programs.shapes.pair(rows, length), self._pair
        assert now is not None
        if pair is None:
            return False
        if pair == now:
            self._steps_too_large = 0
            return True
        if now[0] >= rows and now[1] >= length:
            self._steps_too_large += 1
            if self._steps_too_large < PATIENCE:
                return True
        self._move(pair)
        return True

    def _move(self, pair: tuple[int, int]) -> None:
        if self._under_way is not None:
            self._finish_step()
        programs, (_, S) = self.programs, pair
        assert self._pair is not None
        layers = programs.empty(*pair)
        for i, a in enumerate(self.running):
            assert a.slot is not None
            row = programs.extract(self._layers, a.slot, min(S, self._pair[1]))
            layers, a.slot = programs.insert(layers, row, i), i
        self._layers, self._pair, self._steps_too_large = layers, pair, 0
        self._before_B = np.zeros(pair[0], np.int32)

    def give_up(self, unwanted: Callable[[Answer], bool]) -> None:
        """Aborts answers that run, or whose prompt is being read."""
        if (r := self.reading) is not None:
            for a in [a for a in r.answers if unwanted(a)]:
                r.answers.remove(a)
                self._forget_pages(a)
                a.finish("abort")
            if not r.answers:
                self.reading = None
        for a in [a for a in self.running if unwanted(a)]:
            a.finish("abort")
            self._leave(a)

    def _leave(self, answer: Answer) -> None:
        """Takes a row out of the cache; its pages stay in the prefix cache as long as there is room."""
        assert answer.slot is not None and self._pair is not None
        # The last token was chosen, but not read.
        tokens = answer.text_so_far[: min(answer.end, len(answer.text_so_far) - 1)]
        names = self._names(answer, tokens)
        if len(names) > len(answer.pages):
            new = self.pages.add(names[len(answer.pages) :])
            if any(new):
                row = self.programs.extract(self._layers, answer.slot, self._pair[1])
                self.pool = self.programs.store(self.pool, row, [0] * len(answer.pages) + new)
            answer.pages = names[: len(answer.pages) + len(new)]
        self._forget_pages(answer)
        self.running.remove(answer)
        answer.slot, answer.num_asked, answer.end = None, len(answer.tokens), 0

    def _keep_pages(self, answers: Sequence[Answer], row: Any, tokens: Sequence[int]) -> None:
        """Puts what was read of a prompt into the prefix cache."""
        for answer in answers:
            names = self._names(answer, tokens)[len(answer.pages) :]
            new = self.pages.add(names)
            if any(new):
                self.pool = self.programs.store(self.pool, row, [0] * len(answer.pages) + new)
            answer.pages = [*answer.pages, *names[: len(new)]]

    def _names(self, answer: Answer, tokens: Sequence[int]) -> list[bytes]:
        return self.pages.names(tokens, self.salt(answer)) if self.pages.count else []

    def _forget_pages(self, answer: Answer) -> None:
        self.pages.release(answer.pages)
        answer.pages = []


def _take(answer: Answer, chosen: sample.Chosen, row: int) -> None:
    """Gives an answer the token that its row chose."""
    times = answer.answering.times
    if times.first is None:
        times.first = time.monotonic()
    logprob = top = None
    if answer.is_noted:
        assert chosen.logprobs is not None and chosen.top is not None
        logprob = float(chosen.logprobs[row])
        top = _likeliest(chosen.top[0][row], chosen.top[1][row], answer.request.sampling.logprobs or 0)
    answer.take(int(chosen.tokens[row]), bool(chosen.finite[row]), logprob, top)


def _likeliest(logprobs: Any, ids: Any, n: int) -> dict[int, float]:
    return {int(id): float(p) for p, id in zip(np.asarray(logprobs)[:n], np.asarray(ids)[:n], strict=True)}
