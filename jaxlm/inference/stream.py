"""Answers come as text while they are generated: whole characters, stop texts cut exactly, constraints token by token.

Asking for all at once runs the same code, so a stream's pieces always add up to the same text.
"""

from collections.abc import Generator as Pieces
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlm.data.tokenizer import UNFINISHED, context, decode_after
from jaxlm.inference import constrain
from jaxlm.inference.generate import Completion, Generator, trimmed
from jaxlm.inference.sampling import Sampling, capped


@dataclass(frozen=True)
class Answer:
    """An answer is a completion and its text. The tokens end with the one that completed a stop text, if one did."""

    text: str
    completion: Completion


class Reader:
    """A reader makes the text of one answer as its tokens come, as it follows the tokens `before`.

    `num_used` counts the tokens up to the end of a stop text; it is None while there was none.
    """

    def __init__(self, tokens: Any, stops: Sequence[str], before: Sequence[int] = ()) -> None:
        self.tokens, self.stops = tokens, tuple(stops)
        self.before = context(tokens, before)
        self.sent = ""
        self.text = ""
        self.num_used: int | None = None

    def read(self, ids: Sequence[int], last: bool) -> str:
        """Returns the new text, given all tokens so far.

        Text that may yet change, or begin a stop text, waits for more tokens unless these are the `last`.
        """
        if self.num_used is not None:
            return ""
        text = decode_after(self.tokens, self.before, ids)
        if self._stop(text if last else text.rstrip(UNFINISHED)) is not None:
            # The fewest tokens that have a whole stop text decide, however many come at once.
            for self.num_used in range(1, len(ids) + 1):
                text = decode_after(self.tokens, self.before, ids[: self.num_used])
                text = text if last and self.num_used == len(ids) else text.rstrip(UNFINISHED)
                if (cut := self._stop(text)) is not None:
                    break
            text, last = text[:cut], True
        end = len(text) if last else self._num_settled(text)
        new = text[len(self.sent) : end]
        self.sent = self.text = self.sent + new
        return new

    def decoded(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens of the answer."""
        return decode_after(self.tokens, self.before, ids)

    def _stop(self, text: str) -> int | None:
        """Returns where the first stop text begins, or None."""
        return min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=None)

    def _num_settled(self, text: str) -> int:
        """Counts the characters that further tokens can't change or turn into the beginning of a stop text."""
        n = len(text.rstrip(UNFINISHED))
        for stop in self.stops:
            for size in range(min(len(stop) - 1, n), 0, -1):
                if text[:n].endswith(stop[:size]):
                    n -= size
                    break
        return n


def answers(
    generate: Generator, tokens: Any, params: Any, prompts: Sequence[Sequence[int]], s: Sampling, source: Any = None
) -> list[list[Answer]]:
    """Returns `s.samples` answers for each prompt."""
    pieces = stream(generate, tokens, params, prompts, s, source, every=32 if s.stop else s.tokens)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def stream(
    generate: Generator,
    tokens: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    s: Sampling,
    source: Any = None,
    every: int = 8,
) -> Pieces[tuple[int, str], None, list[list[Answer]]]:
    """Yields (row, new text) after every `every` tokens, and returns the answers of each prompt.

    The samples of a prompt are neighbouring rows. Beams come when they are whole. `params` had best be prepared by
    `generate.prepare`. `source` is what an encoder reads for each prompt.
    """
    s = capped(s, prompts)
    grammar = constrain.open_grammar(tokens, s, generate.model.config.vocab, generate.plan(s).end_ids)
    if s.beams > 1:
        return (yield from _beams(generate, tokens, params, prompts, s, source, grammar))
    rows = len(prompts) * s.samples
    readers = [Reader(tokens, s.stop, prompt) for prompt in prompts for _ in range(s.samples)]
    matchers = [grammar.start(after_text=bool(tokens.decode(r.before))) for r in readers] if grammar else []
    state = generate.start(params, prompts, s, source, _allowed(matchers))
    num_generated, num_read = 1, 0
    while True:
        done_B = np.array(jax.device_get(state.done_B))
        flat = [completion for samples in generate.completions(state, s) for completion in samples]
        last = bool(done_B.all()) or num_generated >= s.tokens
        for i, (reader, completion) in enumerate(zip(readers, flat, strict=True)):
            for id in completion.tokens[num_read:] if matchers else ():
                matchers[i].take(id)
            if new := reader.read(completion.tokens, last or bool(done_B[i])):
                yield i, new
        stopped_B = np.array([r.num_used is not None for r in readers]) | np.array(
            [m.ended for m in matchers] or [False]
        )
        done_B |= stopped_B
        if last or done_B.all():
            break
        num_read = num_generated
        num_generated = min(num_generated + (1 if matchers else every), s.tokens)
        state = state.replace(done_B=jax.numpy.asarray(done_B))
        state = generate.advance(params, state, s, num_generated, _allowed(matchers))
    # A grammar that can't go on ends an answer without an end token.
    counts = [len(c.tokens) if matchers and matchers[i].ended else readers[i].num_used for i, c in enumerate(flat)]
    out = [Answer(r.text, c if n is None else trimmed(c, n)) for r, c, n in zip(readers, flat, counts, strict=True)]
    return [out[i : i + s.samples] for i in range(0, rows, s.samples)]


def _beams(
    generate: Generator, tokens: Any, params: Any, prompts: Any, s: Sampling, source: Any, grammar: Any
) -> Pieces[tuple[int, str], None, list[list[Answer]]]:
    if grammar:
        raise ValueError("sampling.beams: beam search does not go with regex or json_schema; set beams=1")
    out: list[list[Answer]] = []
    for i, completions in enumerate(generate(params, prompts, s, source)):
        out.append([])
        for j, completion in enumerate(completions):
            reader = Reader(tokens, s.stop, prompts[i])
            yield i * s.samples + j, reader.read(completion.tokens, True)
            cut = completion if reader.num_used is None else trimmed(completion, reader.num_used)
            out[-1].append(Answer(reader.text, cut))
    return out


def _allowed(matchers: Sequence[constrain.Matcher]) -> np.ndarray | None:
    return np.stack([m.allowed() for m in matchers]) if matchers else None
