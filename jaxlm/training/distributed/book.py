"""Keeps the book of a parameter server: who has joined, what each worker does, which pushes count and how much, and
when there is a new version of the global weights.

It has no weights, no clock, no threads and no input or output: seconds are arguments, and what it decides about weights
are operations (`Op`) for those who hold them. The same calls in the same order give the same decisions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jaxlm.core.distributed import Distributed
from jaxlm.training.distributed import outer


class Refused(ValueError):
    """A Refused says in one line why the server doesn't take what a worker asks."""


class Unknown(Refused):
    """An Unknown says that the server has no such worker (any more), which may join again."""


class Answer(NamedTuple):
    """An Answer says what a worker does next."""

    do: Literal["work", "wait", "end"]
    token: int = 0
    """The number of this membership; what a worker sends carries it."""
    version: int = 0
    """The version of the global weights to start from."""
    shard: int = 0
    """The part of every batch that the worker trains on."""
    position: int = 0
    """The local steps that were made on this shard: the number of the next batch."""
    clock: int = 0
    """The step at which the schedule of the learning rate stands: the local steps of all shards over their number."""
    steps: int = 0
    """The local steps to make before the next push."""
    why: str = ""


class Op(NamedTuple):
    """An Op is what those who hold weights do. add: the push times `value` enters the round's sum; update: the sum over
    `value` moves the weights, and is forgotten; apply: the push times `value` moves the weights; drop: nothing."""

    do: Literal["add", "update", "apply", "drop"]
    value: float = 0.0


@dataclass
class Member:
    """A Member is a worker that is here."""

    name: str
    token: int
    seen: float
    """When it last gave a sign of life, in seconds."""
    shard: int | None = None
    status: Literal["spare", "waiting", "working", "pushed"] = "spare"
    """spare: all shards are held by others; waiting: for work; working: on `version`; pushed: for this round."""
    version: int = -1
    steps: int = 0
    clock: int = 0
    """The step of the run at which its work was given out, whenever it asks for it."""
    rounds: int = 0
    """Pushes, counted from those of the slowest worker when it joined."""


@dataclass
class Round:
    """A Round is what is known of the pushes that the next version is made of."""

    begun: bool = False
    pushed: list[str] = field(default_factory=list)
    total: float = 0.0
    losses: list[float] = field(default_factory=list)
    first: float | None = None
    """When the first push came."""
    enough: float | None = None
    """When there first were as many as the quorum asks for: pushes, or before it begins workers."""


class Book:
    """A Book says what all workers of a run do. Each method takes the time in seconds as `now`.

    `workers`: the data shards; `steps`: local steps of a shard in the whole run, which ends when all shards together
    have so many; `terms`: what a worker must agree in, by name.
    """

    def __init__(self, c: Distributed, workers: int, steps: int, terms: Mapping[str, Any], now: float = 0.0) -> None:
        self.c, self.workers, self.steps, self.terms = c, workers, steps, dict(terms)
        self.version = 0
        self.positions = [0] * workers
        self.updates = [0] * workers
        """Pushes of each shard that counted."""
        self.tokens = 0.0
        """What all shards together have learned from."""
        self.members: dict[str, Member] = {}
        self.gone: dict[str, str] = {}
        """Workers that were here, and why they aren't."""
        self.speeds: dict[str, float] = {}
        """Local steps a second, as last measured."""
        self.round = Round()
        self.ended = ""
        """Why the run has ended; empty: it goes on."""
        self.failed = False
        """Whether it ended for lack of workers."""
        self.events: list[dict[str, Any]] = []
        """What happened, in order, with `time` in seconds."""
        self._tokens = 0
        self._short: float | None = now
        """Since when there are too few workers; None: there are enough."""
        self._short_told = False

    # ---- figures

    @property
    def done(self) -> int:
        """Returns the local steps of all shards that entered the weights."""
        return sum(self.positions)

    @property
    def clock(self) -> int:
        """Returns the step of the run: local steps of a shard, on average."""
        return min(self.steps, self.done // self.workers)

    @property
    def need(self) -> int:
        """Returns how many workers there must be for the run to go on."""
        return max(1, math.ceil(self.c.server.quorum * self.workers - 1e-9)) if self.c.server.mode == "sync" else 1

    def state(self) -> dict[str, Any]:
        """Returns what goes on after a restart, as JSON has it; read right after a new version. Who is here and the
        round in flight are not part of it. Versions that are still among the events are, as nobody may have read of
        them."""
        known = self.gone | dict.fromkeys(self.members, "the server was restarted")
        untold = [event for event in self.events if event["name"] == "version"]
        return {"version": self.version, "positions": self.positions, "updates": self.updates, "speeds": self.speeds,
                "tokens": self.tokens, "known": known, "token": self._tokens, "untold": untold}  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned."""
        if len(state["positions"]) != self.workers:
            raise ValueError(
                f"distributed.workers: the server's checkpoint has {len(state['positions'])} data shards, and the run "
                f"{self.workers}; keep their number"
            )
        self.version, self.positions = state["version"], list(state["positions"])
        self.updates, self.speeds = list(state["updates"]), dict(state["speeds"])
        self.gone, self._tokens, self.tokens = dict(state["known"]), state["token"], state["tokens"]
        self.events = list(state.get("untold", ()))
        self._end_if_done(0.0)

    def deadline(self, now: float) -> float:
        """Returns the next moment after `now` at which `tick` may change something if nothing else happens."""
        server, moments = self.c.server, [m.seen + self.c.server.timeout for m in self.members.values()]
        since = self.round.first if self.round.enough is None else self.round.enough
        if since is not None:
            moments.append(since + server.grace)
        if self._short is not None:
            moments.append(self._short + server.wait)
            moments += [] if self._short_told else [self._short + server.grace]
        return math.inf if self.ended else min((t for t in moments if t > now), default=math.inf)

    # ---- what workers ask

    def join(self, name: str, terms: Mapping[str, Any], now: float) -> Answer:
        """Takes a worker in, which holds one data shard from now on: of those that no other holds that with the fewest
        pushes. Refused: it runs another configuration."""
        for term in [*self.terms, *(t for t in terms if t not in self.terms)]:
            here, there = self.terms.get(term), terms.get(term)
            if here != there:
                raise Refused(
                    f"worker {name}: {term} is {_short(there)} there and {_short(here)} at the server; start it "
                    "with the server's configuration"
                )
        self._tokens += 1
        if name in self.members:
            self._event(now, "replaced", worker=name)
            self._forget(name, "another process joined under its name")
        returned = name in self.gone
        why = self.gone.pop(name, "")
        self.members[name] = Member(name, self._tokens, now)
        self._deal(now)
        m = self.members[name]
        m.rounds = min((o.rounds for o in self.members.values() if o is not m), default=0)
        self._event(
            now, "returned" if returned else "joined", worker=name, shard=m.shard, **({"after": why} if why else {})
        )
        return self.ask(name, m.token, now)

    def beat(self, name: str, token: int, now: float) -> None:
        """Takes a sign of life."""
        self._member(name, token).seen = now

    def ask(self, name: str, token: int, now: float) -> Answer:
        """Returns what a worker does next; asked again it answers the same until something happens."""
        m = self._member(name, token)
        m.seen = now
        if self.ended:
            return Answer("end", token, self.version, clock=self.clock, why=self.ended)
        if m.status == "waiting" and self.c.server.mode != "sync" and self._may_start(m):
            self._hand_out(m)
        if m.status != "working":
            return Answer("wait", token, self.version, clock=self.clock, why=self._waits_for(m))
        assert m.shard is not None
        return Answer("work", token, m.version, m.shard, self.positions[m.shard], m.clock, m.steps)

    def leave(self, name: str, token: int, now: float) -> None:
        """Lets a worker go that says so; its shard is free for another."""
        self._member(name, token)
        self._event(now, "left", worker=name)
        self._forget(name, "it left")
        self._deal(now)

    def push(
        self, name: str, token: int, version: int, steps: int, now: float, *, tokens: float = 0.0,
        seconds: float = 0.0, loss: float | None = None,
    ) -> list[Op]:  # fmt: skip
        """Decides about a worker's delta since `version`, made in `steps` local steps of `seconds` in all; returns what
        is done with it and then with the weights. Refused: it can't belong to this run's history."""
        m = self._member(name, token)
        m.seen = now
        if version > self.version:
            raise Refused(
                f"worker {name}: pushes from version {version}, and the server is at {self.version}; it was restarted "
                "from an earlier checkpoint: join again"
            )
        if m.status != "working" or version != m.version:
            raise Refused(
                f"worker {name}: has no work from version {version} (it is {m.status}); push once for each answer"
            )
        if not 0 < steps <= m.steps:
            raise Refused(f"worker {name}: pushes {steps} local steps and was given {m.steps}")
        if seconds > 0:
            self.speeds[name] = steps / seconds
        if self.ended:
            m.status = "waiting"
            return [Op("drop")]
        if self.c.server.mode == "sync":
            return self._push_to_round(m, steps, tokens, loss, now)
        staleness = self.version - version
        self._count(m, steps, tokens)
        m.rounds += 1
        m.status = "waiting"
        self.version += 1
        self._new_version(now, [name], [staleness], [] if loss is None else [loss])
        return [Op("apply", float(outer.staleness_weight(staleness, self.c.server.staleness)))]

    def tick(self, now: float) -> list[Op]:
        """Takes those to be lost that gave no sign of life for too long, ends a round whose time is up, and the run if
        there are too few workers for too long."""
        if self.ended:
            return []
        for m in list(self.members.values()):
            if now >= m.seen + self.c.server.timeout:
                self._event(now, "lost", worker=m.name, silent=now - m.seen)
                self._forget(m.name, f"it gave no sign of life for {now - m.seen:.0f} s")
        self._deal(now)
        ops = self._tick_round(now) if self.c.server.mode == "sync" else []
        self._watch_quorum(now)
        return ops

    # ---- rounds

    def _push_to_round(self, m: Member, steps: int, tokens: float, loss: float | None, now: float) -> list[Op]:
        if m.version < self.version:
            self._event(now, "late", worker=m.name, versions=self.version - m.version, lost_steps=steps)
            m.status = "waiting"
            return [Op("drop"), *self._tick_round(now)]
        r, weight = self.round, float(tokens) if self.c.weigh == "tokens" else 1.0
        r.pushed.append(m.name)
        r.first = now if r.first is None else r.first
        r.total += weight
        r.losses += [] if loss is None else [loss]
        self._count(m, steps, tokens)
        m.status = "pushed"
        return [Op("add", weight), *self._tick_round(now)]

    def _tick_round(self, now: float) -> list[Op]:
        """Begins a round, admits workers to it that it can't do without, or ends it."""
        r, server = self.round, self.c.server
        waiting = [m for m in self.members.values() if m.status == "waiting"]
        working = [m for m in self.members.values() if m.status == "working" and m.version == self.version]
        there = len(r.pushed) if r.begun else len(waiting)
        r.enough = None if there < self.need else now if r.enough is None else r.enough
        graced = r.enough is not None and now >= r.enough + server.grace
        if not r.begun:
            if waiting and (len(waiting) >= self.workers or graced):
                self._begin(waiting)
            return []
        # Those that came late enter this round only if it needs them, or seems to.
        missed = r.first is not None and now >= r.first + server.grace
        if waiting and there < self.need and (missed or len(r.pushed) + len(working) < self.need):
            self._begin(waiting)
            return []
        if there < self.need or (working and not graced):
            return []
        if working:
            self._event(now, "late", workers=[m.name for m in working], waited=server.grace)
        pushed, total, losses = r.pushed, r.total, r.losses
        self.round = Round()
        self.version += 1
        self._new_version(now, pushed, [0] * len(pushed), losses)
        for m in self.members.values():
            m.status = "waiting" if m.status == "pushed" else m.status
        if not self.ended:
            self._begin([m for m in self.members.values() if m.status == "waiting"])
        return [Op("update", total)]

    def _begin(self, several: list[Member]) -> None:
        self.round.begun, self.round.enough = bool(several), None
        for m in several:
            self._hand_out(m)

    def _hand_out(self, m: Member) -> None:
        most = max(1, min(self.c.every, self.steps - self.clock))
        speeds = {name: self.speeds[name] for name in self.members if name in self.speeds}
        dynamic = self.c.server.dynamic and m.name in speeds
        m.steps = outer.local_steps(speeds, most)[m.name] if dynamic else most
        m.status, m.version, m.clock = "working", self.version, self.clock

    def _may_start(self, m: Member) -> bool:
        """Returns whether a worker isn't too far ahead of the slowest one."""
        slowest = min(o.rounds for o in self.members.values() if o.shard is not None)
        return self.c.server.mode == "async" or m.rounds - slowest <= self.c.server.bound

    def _waits_for(self, m: Member) -> str:
        if m.status == "spare":
            return f"all {self.workers} data shards are held by others"
        if self.c.server.mode != "sync":
            slowest = min((o for o in self.members.values() if o.shard is not None), key=lambda o: o.rounds)
            return f"{slowest.name} is {m.rounds - slowest.rounds} rounds behind"
        if not self.round.begun:
            return f"{len(self.members)} of {self.workers} workers are here"
        late = [o.name for o in self.members.values() if o.status == "working" and o.version == self.version]
        return f"the round waits for {', '.join(late) or 'more workers'}"

    # ---- who is here

    def _member(self, name: str, token: int) -> Member:
        m = self.members.get(name)
        if m is None:
            raise Unknown(f"worker {name}: the server doesn't know it ({self.gone.get(name, 'it never joined')}); join")
        if m.token != token:
            raise Refused(f"worker {name}: another process has joined under this name; give each worker its own")
        return m

    def _forget(self, name: str, why: str) -> None:
        del self.members[name]
        self.gone[name] = why

    def _deal(self, now: float) -> None:
        """Gives free shards to those without one."""
        held = {m.shard for m in self.members.values()}
        for m in self.members.values():
            free = [s for s in range(self.workers) if s not in held]
            if m.shard is None and free:
                m.shard = min(free, key=lambda s: (self.updates[s], self.positions[s], s))
                m.status = "waiting"
                held.add(m.shard)

    def _count(self, m: Member, steps: int, tokens: float) -> None:
        assert m.shard is not None
        self.tokens += tokens
        self.positions[m.shard] += steps
        self.updates[m.shard] += 1

    def _watch_quorum(self, now: float) -> None:
        """Says that there are too few workers, and ends the run when that has lasted. It is said at once when workers
        are lost, and after `grace` when the server has just started, as they are still coming then."""
        here = len({*self.members, *self.round.pushed})
        if here >= self.need:
            self._short, self._short_told = None, False
            return
        lost = self._short is None
        self._short = now if self._short is None else self._short
        if not self._short_told and (lost or now >= self._short + self.c.server.grace):
            self._short_told = True
            self._event(now, "quorum", here=here, need=self.need, missing=dict(self.gone))
        if now >= self._short + self.c.server.wait and not self.ended:
            self.failed = True
            self.ended = (
                f"{here} of the {self.need} workers that a round needs were here for {now - self._short:.0f} s; start "
                "more of them, or lower distributed.server.quorum"
            )
            self._event(now, "end", reason=self.ended)

    # ---- what is told

    def _new_version(self, now: float, workers: list[str], staleness: list[int], losses: list[float]) -> None:
        loss = sum(losses) / len(losses) if losses else None
        self._event(now, "version", workers=workers, staleness=staleness, tokens=self.tokens, loss=loss)
        self._end_if_done(now)

    def _end_if_done(self, now: float) -> None:
        if self.done >= self.workers * self.steps:
            self.ended = "finished"
            self._event(now, "end", reason=self.ended)

    def _event(self, now: float, name: str, **info: Any) -> None:
        self.events.append({"name": name, "time": now, "version": self.version, "clock": self.clock, **info})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
