"""Runs a parameter server with workers that really train, on a clock that is only counted: the same schedule gives the
same weights to the bit, and how long a run would take with workers of such speeds, links and failures.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxlm.core.distributed import Distributed
from jaxlm.training.distributed import vector
from jaxlm.training.distributed.book import Answer, Book
from jaxlm.training.distributed.server import Part, Server

Train = Callable[[str, Answer, np.ndarray], tuple[np.ndarray, float]]
"""(worker, what it was told to do, global weights as one vector) → (its weights after that many local steps, the tokens
that it has learned from)."""


@dataclass(frozen=True)
class Worker:
    """A Worker is one of given speed and fate."""

    name: str
    seconds: float = 1.0
    """Of a local step."""
    link: float = 0.0
    """Seconds that a push and the answer to it take in all."""
    here: tuple[tuple[float, float], ...] = ((0.0, math.inf),)
    """When it joins, and when it dies without a word; several: it comes back."""


class Outcome(NamedTuple):
    """An Outcome says what came of a simulated run."""

    weights: np.ndarray
    seconds: float
    events: list[dict[str, Any]]
    sent: int
    """Bytes of all pushes."""
    server: Server
    errors: dict[str, np.ndarray]
    """What each worker keeps of the errors of its compressed deltas."""


@dataclass
class _Life:
    """A _Life is a worker from its joining to its death."""

    worker: Worker
    until: float
    token: int = 0
    doing: Answer | None = None
    waits: bool = False
    result: tuple[np.ndarray, float] | None = None
    alive: bool = True


@dataclass
class _Clock:
    now: float = 0.0
    queue: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    numbers: Any = field(default_factory=itertools.count)

    def at(self, moment: float, action: Callable[[], None]) -> None:
        if math.isfinite(moment):
            heapq.heappush(self.queue, (moment, next(self.numbers), action))


def simulate(
    c: Distributed, workers: Sequence[Worker], weights: np.ndarray, steps: int, train: Train, shards: int | None = None
) -> Outcome:
    """Runs until the server ends: `steps` local steps of each of `shards` data shards (default: as many as workers).
    What happens at the same moment happens in the order of `workers`."""
    clock, lives = _Clock(), {}
    server = Server(Book(c, shards or len(workers), steps, {}), Part(c, weights))
    errors: dict[str, np.ndarray] = {}
    sent = 0

    def follow(life: _Life, answer: Answer) -> None:
        """Lets a worker do what it was answered."""
        life.token, life.waits = answer.token, answer.do == "wait"
        if answer.do != "work":
            return
        life.doing, start = answer, server.part.weights.copy()
        after, tokens = train(life.worker.name, answer, start)
        life.result = start - after, tokens
        clock.at(clock.now + answer.steps * life.worker.seconds + life.worker.link, lambda: push(life))

    def push(life: _Life) -> None:
        nonlocal sent
        if not life.alive or server.book.ended or life.worker.name not in server.book.members:
            return
        assert life.doing is not None and life.result is not None
        (delta, tokens), doing, name = life.result, life.doing, life.worker.name
        if c.compress != "none":
            errors.setdefault(name, np.zeros_like(delta))
        packed = vector.pack(c.compress, delta, errors.get(name), c.error_decay)
        sent += vector.size(packed)
        server.push(name, life.token, doing.version, packed, clock.now, steps=doing.steps, tokens=tokens,
                    seconds=doing.steps * life.worker.seconds)  # fmt: skip
        follow(life, server.ask(name, life.token, clock.now))

    def come(worker: Worker, until: float) -> None:
        life = lives[worker.name] = _Life(worker, until)
        clock.at(until, lambda: die(life))
        follow(life, server.join(worker.name, {}, clock.now))

    def die(life: _Life) -> None:
        life.alive = False

    for worker in workers:
        for begin, end in worker.here:
            clock.at(begin, lambda w=worker, e=end: come(w, e))  # type: ignore[misc]
    while clock.queue and not server.book.ended:
        moment = min(clock.queue[0][0], server.book.deadline(clock.now))
        clock.now = moment
        alive = [life for life in lives.values() if life.alive and life.token and life.until > moment]
        for life in alive:
            if life.worker.name in server.book.members:
                server.book.beat(life.worker.name, life.token, moment)
        server.tick(moment)
        if clock.queue[0][0] <= moment:
            heapq.heappop(clock.queue)[2]()
        for life in lives.values():
            if life.alive and life.waits and not server.book.ended:
                follow(life, server.ask(life.worker.name, life.token, clock.now))
        if not clock.queue:
            clock.at(server.book.deadline(clock.now), lambda: None)
    return Outcome(server.part.weights, clock.now, server.book.events, sent, server, errors)
