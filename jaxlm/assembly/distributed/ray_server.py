"""Is the parameter server as actors of Ray: one keeps the book, and each, itself included, holds a part of the weights.

The keeper decides, and tells the others in order what to do. Pushes are staged at the holders before the keeper is told
of them, so that all use a push or none does. Whoever dies is started again by Ray, and then all go back to the last
checkpoint: what is lost is the round in flight, and the versions since.
"""

import contextlib
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.assembly.distributed import ray_cluster
from jaxlm.core import config
from jaxlm.core.distributed import Distributed
from jaxlm.formats import server_state
from jaxlm.training.distributed import vector
from jaxlm.training.distributed.book import Answer, Book, Op, Refused, Unknown
from jaxlm.training.distributed.server import Part

FOLDER = "server"
"""The folder of a run that holds the server's checkpoints."""


class Reply(NamedTuple):
    """A Reply is what a worker gets: an answer, or why there is none."""

    answer: Answer | None = None
    weights: Any = ()
    """References to the parts of the weights of the answer's version."""
    refused: str = ""
    unknown: str = ""


class Behind(Exception):
    """A Behind says that a holder isn't where the keeper takes it to be: it was started again."""


class Holder:
    """A Holder has a part of the global weights; it is an actor, and does one thing at a time."""

    def __init__(self, c: Distributed, folder: str, number: int) -> None:
        jax.config.update("jax_platforms", "cpu")  # a server leaves the accelerators to the workers
        self.c, self.folder, self.number = c, Path(folder) / FOLDER, number
        self.version = -1  # until it is told which one to load
        self.part: Part | None = None
        self._staged: dict[str, tuple[int, vector.Packed]] = {}
        self._put: Any = None

    def load(self, version: int) -> int:
        """Goes to a version's checkpoint; returns how many numbers it holds."""
        arrays = server_state.read_part(self.folder, version, self.number)
        self.part = Part(self.c, arrays["weights"])
        self.part.restore(arrays)
        self.version, self._put = version, None
        self._staged.clear()
        return self.part.weights.size

    def at(self) -> int:
        """Returns the version that it is at, -1 if it was started again; the next one who asks for its weights gets
        them anew."""
        self._put = None
        return self.version

    def stage(self, name: str, token: int, packed: vector.Packed) -> str:
        """Keeps a worker's push until the keeper decides about it; returns what is wrong with it, or nothing."""
        if self.part is None:
            raise Behind(f"holder {self.number} was started again")
        wrong = vector.fault(self.c.compress, packed, self.part.weights.size)
        if not wrong:
            self._staged[name] = (token, packed)
        return wrong

    def do(self, ops: list[Op], name: str, token: int, version: int) -> int:
        """Does what the keeper decided at a version, with the push of a worker; returns the version that it is at then.
        Behind: it has not what the keeper relies on."""
        staged = self._staged.pop(name, (token, None))
        if self.part is None or version != self.version or staged[0] != token:
            raise Behind(f"holder {self.number} is at version {self.version} and the keeper at {version}")
        uses_push = any(op.do in ("add", "apply") for op in ops)
        if uses_push and staged[1] is None:
            raise Behind(f"holder {self.number} has no push of {name}")
        self.part.do(ops, staged[1])
        if any(op.do in ("update", "apply") for op in ops):
            self.version += 1
            self._put = None
        return self.version

    def weights(self) -> list[Any]:
        """Returns a reference to the weights in the object store, in a list so that Ray passes it on as it is."""
        assert self.part is not None
        if self._put is None:
            self._put = ray_cluster.need().put(self.part.weights)
        return [self._put]

    def save(self, folder: str) -> None:
        """Writes its part of a checkpoint."""
        assert self.part is not None
        server_state.write_part(Path(folder), self.number, self.part.saved())


class Keeper(Holder):
    """A Keeper is the holder that keeps the book."""

    def __init__(
        self, c: Distributed, folder: str, others: list[Any], workers: int, steps: int, terms: Mapping[str, Any]
    ) -> None:
        super().__init__(c, folder, 0)
        self.others, self._book_of = others, lambda: Book(c, workers, steps, terms, time.monotonic())
        self.epoch, self.why, self.count, self.received, self.sent, self.save_seconds = "", "", 0, 0, 0, 0.0
        self._refs: tuple[int, list[Any]] = (-1, [])
        self._told = 0
        self._restore()

    # ---- what workers call

    def holders(self) -> list[Any]:
        """Returns the actors that hold the parts after its own, in order."""
        return self.others

    def join(self, name: str, terms: Mapping[str, Any]) -> Reply:
        """Takes a worker in (`Book.join`), which may have found that a part of the server or its weights are gone."""
        ray = ray_cluster.need()
        try:
            versions = ray.get([other.at.remote() for other in self.others], timeout=self.c.server.timeout)
        except ray.exceptions.RayError:
            versions = [-1]
        if set(versions) - {self.version}:
            self._restore("a process of it was started again")
        self._put, self._refs = None, (-1, [])
        return self._reply(lambda now: self.book.join(name, terms, now).token, name)

    def ask(self, name: str, token: int) -> Reply:
        """Returns what a worker does next (`Book.ask`)."""
        return self._reply(lambda now: token, name)

    def push(self, name: str, token: int, version: int, size: int, figures: Mapping[str, Any]) -> Reply:
        """Decides about a push of so many bytes that all holders have staged (`Book.push`)."""

        def push(now: float) -> int:
            ops = self.book.push(name, token, version, now=now, **figures)
            self.received += size
            self._do(ops, name, token)
            return token

        return self._reply(push, name)

    def beat(self, name: str, token: int) -> None:
        """Takes a sign of life; of a worker that isn't known it is none."""
        member = self.book.members.get(name)
        if member is not None and member.token == token:
            self.book.beat(name, token, time.monotonic())

    def leave(self, name: str, token: int) -> None:
        """Lets a worker go (`Book.leave`)."""
        member = self.book.members.get(name)
        if member is not None and member.token == token:
            self.book.leave(name, token, time.monotonic())
            self._tick()

    # ---- what the coordinator calls

    def status(self, epoch: str, since: int) -> dict[str, Any]:
        """Returns where the run stands, and the events after the first `since` of this life of the server (`epoch`)."""
        self._tick()
        now = time.monotonic()
        if epoch == self.epoch:  # those before have arrived
            del self.book.events[: since - self._told]
            self._told = since
        members = {
            m.name: {"shard": m.shard, "status": m.status, "silent": now - m.seen} for m in self.book.members.values()
        }
        return {
            "epoch": self.epoch, "why": self.why, "version": self.version, "clock": self.book.clock,
            "ended": self.book.ended, "failed": self.book.failed, "received": self.received, "sent": self.sent,
            "events": list(self.book.events), "save_seconds": self.save_seconds,
            "members": members, "gone": dict(self.book.gone),
        }  # fmt: skip

    def current(self) -> tuple[int, int, list[Any]]:
        """Returns the version, the step of the run, and references to the parts of the weights."""
        self._tick()
        return self.version, self.book.clock, self._weights()

    # ---- within

    def _reply(self, act: Callable[[float], int], name: str) -> Reply:
        """Does what a worker asks, and answers what it does next."""
        try:
            self._tick()
            now = time.monotonic()
            token = act(now)
            self._tick()
            answer = self.book.ask(name, token, now)
        except Unknown as error:
            return Reply(unknown=str(error))
        except Refused as error:
            return Reply(refused=str(error))
        if answer.do != "work":
            return Reply(answer)
        if answer.version != self.version:  # it was told before, and has the weights if it needs them
            return Reply(unknown=f"worker {name}: its work is of version {answer.version}; join")
        self.sent += 4 * self.count
        return Reply(answer, self._weights())

    def _tick(self) -> None:
        with contextlib.suppress(Unknown):  # all went back to the last checkpoint, as `epoch` and `why` tell
            self._do(self.book.tick(time.monotonic()), "", 0)

    def _do(self, ops: list[Op], name: str, token: int) -> None:
        """Tells all holders what was decided; where one of them can't, all go back to the last checkpoint."""
        if not ops and not name:
            return
        ray = ray_cluster.need()
        before = self.version
        try:
            doing = [other.do.remote(ops, name, token, before) for other in self.others]
            self.do(ops, name, token, before)
            ray.get(doing, timeout=self.c.server.timeout)
        except (ray.exceptions.RayError, Behind) as error:
            self._restore(" ".join(str(error).split())[:200])
            raise Unknown("the server went back to its last checkpoint; join") from None
        if self.version == before:
            return
        assert self.version == self.book.version
        if self.version % self.c.server.checkpoint_every == 0 or self.book.ended:
            self._save()

    def _save(self) -> None:
        ray, began = ray_cluster.need(), time.monotonic()
        folder = server_state.new(self.folder, self.version)
        saving = [other.save.remote(str(folder)) for other in self.others]
        self.save(str(folder))
        ray.get(saving, timeout=self.c.server.timeout)
        book = self.book.state() | {"received": self.received, "sent": self.sent}
        server_state.commit(self.folder, self.version, book, self.c.server.keep)
        self.save_seconds += time.monotonic() - began

    def _restore(self, why: str = "") -> None:
        """Brings all holders to the last checkpoint, whoever was started again."""
        ray = ray_cluster.need()
        version = server_state.newest(self.folder)
        assert version is not None
        seconds = self.c.server.wait

        def load() -> list[int]:
            return ray.get([other.load.remote(version) for other in self.others], timeout=seconds)

        self.count = self.load(version) + sum(ray_cluster.bounded("a part of the server", seconds, load))
        self.book = self._book_of()
        book = server_state.read_book(self.folder, version)
        self.book.restore(book)
        self.received, self.sent = book["received"], book["sent"]
        self.epoch, self._refs, self._told = uuid.uuid4().hex, (-1, []), 0
        self.why = why

    def _weights(self) -> list[Any]:
        if self._refs[0] != self.version:
            ray = ray_cluster.need()
            others = ray.get([other.weights.remote() for other in self.others], timeout=self.c.server.timeout)
            self._refs = (self.version, [ref for refs in (self.weights(), *others) for ref in refs])
        return self._refs[1]


def start(run: config.Run, terms: Mapping[str, Any]) -> Any:
    """Starts the server of a run whose `FOLDER` has a checkpoint; returns the keeper."""
    ray = ray_cluster.need()
    d = run.distributed
    assert d.workers is not None
    options = dict(num_cpus=0, max_restarts=-1, max_task_retries=0)
    folder = str(run.folder.absolute())
    spread = ray.remote(Holder).options(scheduling_strategy="SPREAD", **options)
    others = [spread.remote(d, folder, number) for number in range(1, d.server.shards)]
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    keeper = ray.remote(Keeper).options(name=ray_cluster.name_of(run), scheduling_strategy=here, **options)
    return keeper.remote(d, folder, others, d.workers, run.train.steps, dict(terms))


def write_first(run: config.Run, weights_N: np.ndarray) -> None:
    """Writes the checkpoint of version 0, from which the server begins."""
    d = run.distributed
    assert d.workers is not None
    folder = server_state.new(run.folder / FOLDER, 0)
    for number, (first, last) in enumerate(vector.parts(weights_N.size, d.server.shards)):
        server_state.write_part(folder, number, Part(d, weights_N[first:last]).saved())
    book = Book(d, d.workers, run.train.steps, {}).state() | {"received": 0, "sent": 0}
    server_state.commit(run.folder / FOLDER, 0, book, d.server.keep)
