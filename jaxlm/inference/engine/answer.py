"""One answer while it grows: what may come next, what its tokens say, and whether it has ended."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.inference import constrain, sampling
from jaxlm.inference.engine import sample
from jaxlm.inference.engine.request import Answering, Piece, Reason, Request
from jaxlm.inference.stream import Reader

log = logging.getLogger(__name__)
NO_TOKEN = "sampling: the settings allow no further token; ban fewer, or ask for a shorter answer"
NOT_FINITE = "the model's logits are not finite; look at its weights and its dtype"


@dataclass(frozen=True)
class Rules:
    """The rules are what a request's answers keep to; they are made once for all of them."""

    request: Request
    most: int
    """The most new tokens."""
    least: int
    """An answer has so many new tokens before it may end."""
    end_ids: tuple[int, ...]
    allowed_V: np.ndarray | None
    """Which tokens may be chosen at all; None: all."""
    grammar: constrain.Grammar | None

    @staticmethod
    def of(request: Request, eos: Sequence[int], vocab: int, grammar: constrain.Grammar | None) -> "Rules":
        """Returns the rules of a request. Raises ValueError where they leave no token."""
        s, end_ids = request.sampling, end_ids_of(request, eos)
        allowed_V = None
        if s.allowed_ids or s.banned_ids:
            allowed_V = np.full(vocab, not s.allowed_ids)
            allowed_V[list(s.allowed_ids + (end_ids if s.allowed_ids else ()))] = True
            allowed_V[list(s.banned_ids)] = False
            if not allowed_V.any():
                raise ValueError("sampling.banned_ids: no token is left; ban fewer")
        n = len(request.prompt)
        most = s.tokens if s.length is None else min(s.tokens, s.length - n)
        return Rules(request, most, max(s.min_tokens, s.min_length - n), end_ids, allowed_V, grammar)


def end_ids_of(request: Request, eos: Sequence[int]) -> tuple[int, ...]:
    """Returns the tokens that end a request's answers."""
    return tuple(sorted({*(() if request.ignore_eos else eos), *request.sampling.stop_ids}))


class Answer:
    """An answer of a request. `slot` is its place among the running rows while it has one."""

    def __init__(self, rules: Rules, sample: int, tokenizer: Any, answering: Answering, vocab: int) -> None:
        self.rules, self.sample, self.answering, self.vocab = rules, sample, answering, vocab
        self.tokens: list[int] = []
        self.slot: int | None = None
        self.end = 0
        """Tokens of prompt and answer that the cache has, or will have once the step under way is done."""
        self.num_asked = 0
        """Tokens that were chosen or are being chosen."""
        self.pages: list[bytes] = []
        """Names of the pages of the prefix cache that it uses."""
        self.done = False
        self.number = 0
        """The place of its request in the order in which they came."""
        self.ended: Callable[[Answer, str], None] = lambda *_: None
        """Called when it has ended, with the reason."""
        self._reader = Reader(tokenizer, rules.request.sampling.stop, rules.request.prompt)
        self._sent = 0
        self._noted: list[tuple[float, dict[int, float]]] = []
        grammar = rules.grammar
        after_text = bool(tokenizer.decode(self._reader.before))
        self._matcher = None if grammar is None else grammar.start(after_text)

    @property
    def request(self) -> Request:
        return self.rules.request

    @property
    def text_so_far(self) -> tuple[int, ...]:
        """Returns the prompt and the answer, as tokens."""
        return (*self.request.prompt, *self.tokens)

    @property
    def waits_for_choice(self) -> bool:
        """Says whether the next choice can't be made before the last one is known here."""
        s = self.request.sampling
        return self._matcher is not None or bool(s.no_repeat_ngram) or self._row().needs_history

    @property
    def is_greedy(self) -> bool:
        """Says whether this token and the next ones are the likeliest ones without further ado."""
        s = self.request.sampling
        last = s.first_id is not None or s.last_id is not None
        if self.waits_for_choice or self.is_noted or last:
            return False
        return self._row(self._allowed()).is_plain

    def guess(self, count: int) -> list[int]:
        """Returns up to `count` tokens that followed the last two before, as far as the answer may go."""
        text = np.asarray(self.text_so_far, np.int32)
        count = min(count, self.rules.most - len(self.tokens) - 1)
        if len(text) < 3 or count < 1:
            return []
        met = np.flatnonzero((text[1:-1] == text[-1]) & (text[:-2] == text[-2]))
        return text[met[-1] + 2 :][:count].tolist() if len(met) else []

    @property
    def is_noted(self) -> bool:
        """Says whether log probabilities are asked for."""
        return self.request.sampling.logprobs is not None

    def row(self) -> sample.Row | None:
        """Returns the settings with which the next token is chosen; None where none may come, which ends the answer
        with an error."""
        try:
            allowed_V = self._allowed()
        except ValueError as error:  # the grammar's library gave up
            self.fail(str(error))
            return None
        if allowed_V is not None and not allowed_V.any():
            self.fail(NO_TOKEN)
            return None
        return self._row(allowed_V)

    def fail(self, why: str) -> None:
        """Ends the answer with an error."""
        log.warning("an answer ended with an error: %s", why)
        self.finish("error", why=why)

    def _row(self, allowed_V: np.ndarray | None = None) -> sample.Row:
        r = self.request
        bias = tuple(r.logit_bias.items())
        return sample.Row(r.sampling, r.row + self.sample, self.num_asked, allowed_V, bias, r.prompt, self.tokens)

    def _allowed(self) -> np.ndarray | None:
        """Returns which tokens may come next; None: all."""
        s, allowed_V = self.request.sampling, self.rules.allowed_V
        if self._matcher is not None:
            now_V = self._matcher.allowed()
            allowed_V = now_V if allowed_V is None else allowed_V & now_V
        if self.num_asked < self.rules.least and self.rules.end_ids:
            allowed_V = np.ones(self.vocab, bool) if allowed_V is None else allowed_V.copy()
            allowed_V[list(self.rules.end_ids)] = False
        if s.no_repeat_ngram and (banned := _would_repeat(self.text_so_far, s.no_repeat_ngram)):
            allowed_V = np.ones(self.vocab, bool) if allowed_V is None else allowed_V.copy()
            allowed_V[banned] = False
        if s.first_id is not None and self.num_asked == 0 and len(self.request.prompt) == 1:
            allowed_V = _only(s.first_id, self.vocab)
        if s.last_id is not None and self.num_asked == self.rules.most - 1:
            allowed_V = _only(s.last_id, self.vocab)
        return allowed_V

    def take(self, token: int, finite: bool, logprob: float | None = None, top: dict[int, float] | None = None) -> None:
        """Adds the token that was chosen, and sends what is new."""
        if not finite:
            return self.fail(NOT_FINITE)
        rules = self.rules
        if token in rules.end_ids:
            return self.finish("stop", stop=token)
        self.tokens.append(token)
        if logprob is not None:
            self._noted.append((logprob, top or {}))
        if self._matcher is not None:
            try:
                self._matcher.take(token)
            except ValueError as error:
                return self.fail(str(error))
            if self._matcher.ended:
                return self.finish("stop")
        if len(self.tokens) >= rules.most:
            return self.finish("length")
        text = self._reader.read(self.tokens, last=False)
        if self._reader.num_used is not None:
            return self.finish("stop", text, self._stop_text())
        if text or not rules.request.sampling.stop:
            self._send(text, len(self.tokens))
        return None

    def finish(self, reason: Reason, text: str = "", stop: str | int | None = None, why: str | None = None) -> None:
        """Ends the answer and sends the rest of it, and `why` it ends where that is an error."""
        if self.done:
            return
        self.done = True
        if self._reader.num_used is None:
            text += self._reader.read(self.tokens, last=True)
            if self._reader.num_used is not None:  # the rest of the text has a stop text
                reason, stop = "stop", self._stop_text()
        if self._reader.num_used is not None:
            del self.tokens[self._reader.num_used :]
        self._send(text, len(self.tokens), reason, stop, why if reason == "error" else None)
        self.answering.note_end()
        self.ended(self, reason)

    def _send(
        self, text: str, end: int, reason: Reason | None = None, stop: str | int | None = None, why: str | None = None
    ) -> None:
        tokens, noted = tuple(self.tokens[self._sent : end]), self._noted[self._sent : end]
        n = self.request.sampling.logprobs
        top = tuple(dict(list(t.items())[:n]) for _, t in noted) if n else ()
        self._sent = max(self._sent, end)
        self.answering.put(Piece(self.sample, text, tokens, tuple(p for p, _ in noted), top, reason, stop, why))

    def _stop_text(self) -> str | None:
        """Returns the stop text that the answer's tokens complete."""
        whole = self._reader.decoded(self.tokens[: self._reader.num_used])
        found = [(whole.find(stop), stop) for stop in self.request.sampling.stop if stop in whole]
        return min(found)[1] if found else None


def check(request: Request, vocab: int, adapters: Sequence[str]) -> None:
    """Raises a ValueError that names the field of a request that an engine can't do."""
    s = request.sampling
    sampling.check(s, vocab)
    if s.beams > 1:
        raise ValueError("sampling.beams: an engine has no beam search; set beams=1")
    if s.seed >= 1 << 32:
        raise ValueError(f"sampling.seed: {s.seed} is out of range; give one below {1 << 32}")
    for name, n in (("sampling.logprobs", s.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
        if (n or 0) > sample.MOST_TOP:
            raise ValueError(f"{name}: {n} are more than {sample.MOST_TOP}")
    if not request.prompt:
        raise ValueError("prompt: is empty; give at least one token")
    for name, ids in (("prompt", request.prompt), ("source", request.source or ()), ("logit_bias", request.logit_bias)):
        if bad := next((id for id in ids if not 0 <= id < vocab), None):
            raise ValueError(f"{name}: {bad} is not a token; the vocabulary has {vocab}")
    if not all(np.isfinite(value) for value in request.logit_bias.values()):
        raise ValueError("logit_bias: a value is not finite; ban a token by sampling.banned_ids")
    if request.adapter is not None and request.adapter not in adapters:
        known = ", ".join(adapters) or "none"
        raise ValueError(f"adapter: {request.adapter} is not among this engine's; there are: {known}")


def _only(id: int, vocab: int) -> np.ndarray:
    allowed_V = np.zeros(vocab, bool)
    allowed_V[id] = True
    return allowed_V


def _would_repeat(tokens: Sequence[int], n: int) -> list[int]:
    """Returns the tokens that would end `n` in a row which came before."""
    last = tuple(tokens[len(tokens) - n + 1 :]) if n > 1 else ()
    return [tokens[i + n - 1] for i in range(len(tokens) - n + 1) if tuple(tokens[i : i + n - 1]) == last]
