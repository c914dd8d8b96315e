"""A request of an engine, and what comes of it: pieces of its answers while they grow."""

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxlm.inference.sampling import Sampling

Reason = Literal["stop", "length", "abort", "error"]


class EngineFull(Exception):
    """Raised where as many answers wait already as may."""


@dataclass(frozen=True)
class Request:
    """A request asks for `sampling.samples` answers to a prompt, which is token ids."""

    prompt: tuple[int, ...]
    sampling: Sampling
    source: tuple[int, ...] | None = None
    """What an encoder reads; an encoder-decoder's prompt is what its answer begins with."""
    adapter: str | None = None
    """The name of one of the engine's adapters; None: the model alone."""
    priority: int = 0
    """Lower ones run first; requests of one priority run in the order in which they came."""
    prompt_logprobs: int | None = None
    """Log probabilities of the prompt's own tokens, and of so many of the likeliest ones at each position."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of tokens."""
    row: int = 0
    """Answers are drawn with the seed, this number and the number of the answer: requests that share a seed draw apart
    by numbers of their own. Those of a batch have the row of their first answer there."""
    ignore_eos: bool = False
    """The model's own end tokens don't end an answer; those of `sampling.stop_ids` do."""
    salt: str = ""
    """Requests share the prefix cache with those of the same salt alone."""


@dataclass(frozen=True)
class Piece:
    """A piece is what is new of one answer."""

    sample: int
    text: str = ""
    """New text: whole characters; what may begin a stop text waits."""
    tokens: tuple[int, ...] = ()
    """New tokens, without an end token."""
    logprobs: tuple[float, ...] = ()
    """Log probabilities of the new tokens under the model, where the request asks for them."""
    top: tuple[dict[int, float], ...] = ()
    """The likeliest tokens at the places of the new ones, where the request asks for them."""
    reason: Reason | None = None
    """With the last piece of an answer: an end token or stop text came (stop), it is as long as it may be (length), it
    was given up (abort), or it can't go on (error)."""
    stop: str | int | None = None
    """The stop text or the token that ended the answer."""
    error: str | None = None
    """Why it can't go on: the model's logits are not finite, no token may follow, or the engine stopped."""


@dataclass(frozen=True)
class PromptScores:
    """Log probabilities of a prompt's tokens, each after those before it; the first has None."""

    logprobs: tuple[float | None, ...]
    top: tuple[dict[int, float] | None, ...]


@dataclass
class Times:
    """Seconds of `time.monotonic` at which a request arrived, was first worked on, had its first token and its last."""

    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    first: float | None = None
    last: float | None = None


class Answering:
    """An answering yields the pieces of a request's answers, to a coroutine by `async for` or to a thread by `for`."""

    def __init__(self, request: Request, abort: Callable[["Answering"], None]) -> None:
        self.request = request
        self.times = Times()
        self.cached = 0
        """Tokens of the prompt that were found in the prefix cache; known with the first piece."""
        self.prompt_scores: PromptScores | None = None
        """Known with the first piece, where the request asks for it."""
        self._abort = abort
        self._left = request.sampling.samples
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._listener: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def abort(self) -> None:
        """Gives the answers up: each ends with a piece whose reason is "abort"."""
        self._abort(self)

    def note_end(self) -> None:
        """Counts one of the answers as ended; with the last one there are no more pieces."""
        self._left -= 1
        if not self._left:
            self.times.last = time.monotonic()
            self.put(None)

    def put(self, piece: Piece | None) -> None:
        """Adds a piece; None ends them. Called by the engine's thread alone."""
        self._pieces.put(piece)
        if (listener := self._listener) is not None:
            try:
                listener[0].call_soon_threadsafe(listener[1].set)
            except RuntimeError:  # the loop that listened is closed, so nobody waits
                self._listener = None

    def __iter__(self) -> Iterator[Piece]:
        while (piece := self._pieces.get()) is not None:
            yield piece

    async def __aiter__(self) -> AsyncIterator[Piece]:
        new = asyncio.Event()
        self._listener = asyncio.get_running_loop(), new
        while True:
            try:
                piece = self._pieces.get_nowait()
            except queue.Empty:
                await new.wait()
                new.clear()
                continue
            if piece is None:
                return
            yield piece
