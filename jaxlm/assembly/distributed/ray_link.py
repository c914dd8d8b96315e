"""Is a worker's way to a server of Ray actors: weights and deltas travel through Ray's object store, every wait has a
bound, and a server that was started again is joined again."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxlm.assembly.distributed import ray_cluster
from jaxlm.assembly.distributed.ray_server import Reply
from jaxlm.core import config
from jaxlm.runtime.processes import ProcessError
from jaxlm.training.distributed import vector
from jaxlm.training.distributed.book import Answer

BEAT = 1.0
"""Seconds between two signs of life, at least."""


class RayLink:
    """A RayLink is the `job.Link` of one worker."""

    def __init__(
        self, run: config.Run, name: str, terms: Mapping[str, Any], count: int, say: Callable[[str], None] = print
    ) -> None:
        self.run, self.name, self.terms, self.say = run, name, terms, say
        self.parts = vector.parts(count, run.distributed.server.shards)
        self._seconds = run.distributed.server.timeout
        self._answer = Answer("end")
        self._keeper: Any = None
        self._others: list[Any] = []
        self._beaten = 0.0
        self._ray = ray_cluster.need()

    # ---- what the job asks

    def begin(self) -> tuple[Answer, np.ndarray | None]:
        """Joins, and waits for work. ValueError: the server refuses the worker."""
        began = time.monotonic()
        while time.monotonic() - began < self.run.distributed.server.wait:
            reply = self._bounded(lambda: self._call("join", self.name, self.terms))
            if reply.refused:
                raise ValueError(reply.refused)
            if (found := self._followed(reply)) is not None:
                return found
            time.sleep(ray_cluster.POLL[1])
        raise ProcessError(
            f"{self.name}: taken in and lost again for {self.run.distributed.server.wait:.0f} s by the server; see "
            "the coordinator's output"
        )

    def exchange(
        self, packed: vector.Packed, *, steps: int, tokens: float, seconds: float, loss: float
    ) -> tuple[Answer, np.ndarray | None]:
        """Pushes a delta, and waits for work. A push that the server can't use any more is lost, and said."""
        figures = dict(steps=steps, tokens=tokens, seconds=seconds, loss=loss)
        try:
            reply = self._push(packed, figures)
        except (self._ray.exceptions.RayError, ray_cluster.Away) as error:
            reply = Reply(unknown=f"the server is away ({type(error).__name__})")
        if reply.refused and "another process" in reply.refused:
            raise ProcessError(reply.refused)
        if reply.refused or reply.unknown:
            self.say(f"{reply.refused or reply.unknown}; {steps} local steps are lost")
            return self.begin()
        return self._followed(reply) or self.begin()

    def beat(self) -> None:
        """Gives a sign of life, not waiting for it to arrive."""
        if time.monotonic() - self._beaten > BEAT and self._keeper is not None:
            self._beaten = time.monotonic()
            self._keeper.beat.remote(self.name, self._answer.token)

    def leave(self) -> None:
        """Says that the worker ends; a server that is away need not know."""
        try:
            self._call("leave", self.name, self._answer.token)
        except (self._ray.exceptions.RayError, ray_cluster.Away) as error:
            self.say(f"the server was not told that {self.name} ends ({type(error).__name__})")

    # ---- within

    def _push(self, packed: vector.Packed, figures: dict[str, Any]) -> Reply:
        """Stages a delta at every holder, and then lets the keeper decide about it."""
        kind = self.run.distributed.compress
        handles = [self._keeper, *self._others]
        staging = [
            handle.stage.remote(self.name, self._answer.token, vector.cut(kind, packed, first, last))
            for handle, (first, last) in zip(handles, self.parts, strict=True)
        ]
        for wrong in self._ray.get(staging, timeout=self._seconds):
            if wrong:
                return Reply(refused=f"worker {self.name}: its push can't be used, for {wrong}")
        answer = self._answer
        return self._call("push", self.name, answer.token, answer.version, vector.size(packed), figures)

    def _followed(self, reply: Reply) -> tuple[Answer, np.ndarray | None] | None:
        """Waits until a reply is work or the end; None: the worker must join again."""
        pause, told = ray_cluster.POLL[0], ""
        while reply.answer is not None and reply.answer.do == "wait":
            self._answer = reply.answer
            if reply.answer.why != told:
                told = reply.answer.why
                self.say(f"{self.name} waits: {told}")
            time.sleep(pause)
            pause = min(2 * pause, ray_cluster.POLL[1])
            reply = self._bounded(lambda: self._call("ask", self.name, self._answer.token))
        if reply.refused:
            raise ProcessError(reply.refused)
        if reply.answer is None:
            self.say(reply.unknown)
            return None
        self._answer = reply.answer
        if reply.answer.do == "end":
            return reply.answer, None
        try:
            parts = self._ray.get(list(reply.weights), timeout=self._seconds)
        except self._ray.exceptions.RayError as error:
            self.say(f"the weights of version {reply.answer.version} are gone ({type(error).__name__})")
            return None
        return reply.answer, parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._keeper is None:
            self._keeper = ray_cluster.keeper_of(self.run)
            self._others = self._ray.get(self._keeper.holders.remote(), timeout=self._seconds)
        try:
            return self._ray.get(getattr(self._keeper, method).remote(*arguments), timeout=self._seconds)
        except self._ray.exceptions.ActorDiedError:
            self._keeper = None  # another one may have its name
            raise

    def _bounded(self, attempt: Callable[[], Any]) -> Any:
        wait = self.run.distributed.server.wait
        return ray_cluster.bounded(f"the server of {self.run.name}", wait, attempt, self.say)
