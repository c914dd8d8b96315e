"""An engine that answers without a model: each answer is a text that a test gives, in tokens of one byte.

It counts what runs, so that tests see whether aborted requests have ended.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from jaxlm.data.tokenizer import Bytes
from jaxlm.inference import sampling
from jaxlm.inference.engine import EngineFull, Piece, PromptScores, Request, Stats, Times


@dataclass
class FakeEngine:
    """`say(request, sample)` is the text of an answer; a token takes `pause` seconds."""

    say: Callable[[Request, int], str] = lambda request, sample: "hello"
    limit: int = 1024
    pause: float = 0.0
    queue: int = 64
    vocab: int = Bytes.vocab_size
    requests: list[Request] = field(default_factory=list)
    live: set["FakeAnswering"] = field(default_factory=set)
    aborted: int = 0
    drained: list[float] = field(default_factory=list)
    closed: bool = False
    is_broken: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def submit(self, request: Request) -> "FakeAnswering":
        sampling.check(request.sampling, self.vocab)
        with self.lock:
            if len(self.live) >= self.queue:
                raise EngineFull
            self.requests.append(request)
            answering = FakeAnswering(self, request)
            self.live.add(answering)
        return answering

    def stats(self) -> Stats:
        return Stats(running=len(self.live), prompt_tokens=sum(len(r.prompt) for r in self.requests),
                     aborted=self.aborted)  # fmt: skip

    def drain(self, seconds: float) -> bool:
        self.drained.append(seconds)
        return True

    def close(self) -> None:
        self.closed = True


class FakeAnswering:
    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self.engine, self.request, self.ended = engine, request, False
        self.cached, self.prompt_scores = 3, None
        self.times = Times(time.monotonic())
        self.tokens = Bytes()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        s = self.request.sampling
        self.times.started = time.monotonic()
        if self.request.prompt_logprobs is not None:
            n = len(self.request.prompt)
            scores = [None, *(-0.5 * i for i in range(1, n))]
            tops = [None, *({self.request.prompt[i]: -0.5 * i, 97: -0.25} for i in range(1, n))]
            self.prompt_scores = PromptScores(tuple(scores), tuple(tops))
        for sample in range(s.samples):
            text = self.engine.say(self.request, sample)
            stop = next((x for x in s.stop if x in text), None)
            whole = text if stop is None else text[: text.index(stop)]
            ids = self._ids(whole)
            cut = len(ids) >= s.tokens
            for i, id in enumerate(ids[: s.tokens]):
                await asyncio.sleep(self.engine.pause)
                self.times.first = self.times.first or time.monotonic()
                last = i + 1 == min(len(ids), s.tokens)
                more = (
                    {}
                    if s.logprobs is None
                    else dict(logprobs=(-1.5,), top=({id: -1.5, 98: -2.0} if s.logprobs else {},))
                )
                yield Piece(sample, self._text(ids, i), (id,), reason=("length" if cut else "stop") if last else None,
                            stop=stop if last and not cut else None, **more)  # fmt: skip
            if not ids:
                yield Piece(sample, reason="stop", stop=stop)
        self.times.last = time.monotonic()
        self._end()

    def _ids(self, text: str) -> list[int]:
        return self.tokens.encode_special(text)

    def _text(self, ids: list[int], i: int) -> str:
        """Returns the characters that are whole with token i and weren't before."""
        first = max(0, i - 3)
        while first < i and ids[first] & 0xC0 == 0x80:
            first += 1
        before, now = (self.tokens.decode(ids[first:n]).rstrip("\ufffd") for n in (i, i + 1))
        return now[len(before) :]

    def abort(self) -> None:
        if not self.ended:
            self.engine.aborted += 1
        self._end()

    def _end(self) -> None:
        self.ended = True
        self.engine.live.discard(self)
