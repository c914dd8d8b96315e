"""A parameter server on a clock that is only counted: identities, rounds, staleness, failures, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import distributed as settings
from jaxlm.training.distributed import outer, vector
from jaxlm.training.distributed.book import Answer, Book, Refused, Unknown
from jaxlm.training.distributed.server import Part, Server
from jaxlm.training.distributed.simulate import Outcome, Worker, simulate

SIZE = 600
START = np.random.default_rng(7).normal(size=SIZE).astype(np.float32)
TARGET = np.random.default_rng(8).normal(size=(8, SIZE)).astype(np.float32)


def descend(worker: str, work: Answer, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Local steps of gradient descent, each towards another mix of the shard's own target and that of the batch."""
    for step in range(work.position, work.position + work.steps):
        weights = weights - np.float32(0.1) * (weights - TARGET[work.shard] - np.float32(0.1) * TARGET[step % 8])
    return weights, 10.0 * work.steps


def alike(worker: str, work: Answer, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """The same as `descend` of the first shard, whatever the shard."""
    return descend(worker, work._replace(shard=0), weights)


def config(mode: str = "sync", every: int = 5, o: settings.Outer | None = None, **more) -> settings.Distributed:
    server = {f.name: more.pop(f.name) for f in dataclasses.fields(settings.Server) if f.name in more}
    o = o or settings.Outer(lr=0.5)
    return settings.Distributed("server", every=every, outer=o, server=settings.Server(mode, **server), **more)


def crew(*seconds: float, **here) -> list[Worker]:
    return [Worker(f"w{i}", s, here=here.get(f"w{i}", Worker("").here)) for i, s in enumerate(seconds)]


def named(out: Outcome, name: str) -> list[dict]:
    return [e for e in out.events if e["name"] == name]


OUTERS = [
    settings.Outer("nesterov"), settings.Outer("sgd"), settings.Outer("average"), settings.Outer("adam", lr=0.01),
    settings.Outer("delayed_nesterov", delay=2), settings.Outer("sgd", lr=0.5, momentum=0.0),
]  # fmt: skip


@pytest.mark.parametrize("o", OUTERS, ids=lambda o: o.name)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_weights_move_by_the_formulas_of_the_outer_optimizer(o, mode, monkeypatch) -> None:
    """Whatever the pieces in which they are worked on."""
    draw = np.random.default_rng(0)
    weights, state = jnp.asarray(START), outer.init(o, jnp.asarray(START))
    monkeypatch.setattr(vector, "CHUNK", 256)
    server = Server(Book(config(mode, o=o, quorum=1.0), 2, 99, {}), Part(config(mode, o=o), START))
    tokens = [server.join(f"w{i}", {}, 0.0).token for i in range(2)]
    for turn in range(5):
        deltas = draw.normal(size=(2, SIZE)).astype(np.float32)
        for i, delta in enumerate(deltas):
            version = server.ask(f"w{i}", tokens[i], turn).version
            server.push(f"w{i}", tokens[i], version, {"values": delta}, turn, steps=5)
        if mode == "sync":
            weights, state = outer.update(o, weights, state, weights - deltas.mean(0))
            continue
        for delta, event in zip(deltas, server.book.events[-2:], strict=True):
            [behind] = event["staleness"]
            scale = outer.staleness_weight(behind, 0.5)
            weights, state = outer.update(o, weights, state, weights - np.float32(scale) * delta)
    np.testing.assert_allclose(server.part.weights, weights, rtol=2e-5, atol=2e-6)
    kept = [np.asarray(x) for x in jax.tree.leaves(state)]
    assert len(kept) == len(server.part.state)
    for mine, expected in zip(server.part.state, kept, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=2e-5, atol=2e-6)


def test_a_part_holds_three_vectors_and_a_server_of_parts_is_a_server() -> None:
    c = config("sync", compress="int8")
    assert Part(c, START).nbytes == 3 * START.nbytes
    draw, count = np.random.default_rng(1), START.size
    whole = Part(c, START)
    cuts = vector.parts(count, 2)
    assert cuts == [(0, 512), (512, 600)]
    parts = [Part(c, START[a:b]) for a, b in cuts]
    book = Book(c, 1, 99, {})
    token = book.join("w0", {}, 0.0).token
    for turn in range(3):
        packed = vector.pack("int8", draw.normal(size=count).astype(np.float32), None, 1.0)
        book.tick(turn)
        ops = book.push("w0", token, turn, 5, turn)
        assert [op.do for op in ops] == ["add", "update"]
        whole.do(ops, packed)
        for part, (a, b) in zip(parts, cuts, strict=True):
            part.do(ops, vector.cut("int8", packed, a, b))
    np.testing.assert_array_equal(np.concatenate([p.weights for p in parts]), whole.weights)
    assert np.abs(whole.weights - START).max() > 0.1


@pytest.mark.parametrize("kind", ["none", "bfloat16", "int8", "float4"])
def test_compressing_piece_by_piece_is_compressing_at_once(kind, monkeypatch) -> None:
    delta, error = START.copy(), 0.01 * TARGET[0]
    kept = error.copy()
    packed = vector.pack(kind, delta, kept, 0.9)
    monkeypatch.setattr(vector, "CHUNK", 256)
    again = error.copy()
    pieces = vector.pack(kind, delta, again, 0.9)
    assert packed.keys() == pieces.keys() and all(np.array_equal(packed[n], pieces[n]) for n in packed)
    np.testing.assert_array_equal(kept, again)
    if kind != "none":
        whole = np.concatenate([vector.unpack(kind, packed, at) for at in vector.chunks(SIZE)])
        np.testing.assert_allclose(whole + kept, delta + 0.9 * error, atol=1e-6)


@pytest.mark.parametrize("o", [settings.Outer(), settings.Outer("delayed_nesterov", delay=1)], ids=lambda o: o.name)
def test_with_one_worker_asynchronous_and_stale_are_synchronous(o) -> None:
    runs = [simulate(config(mode, o=o), crew(1.0), START, 20, descend) for mode in ("sync", "async", "stale")]
    for other in runs[1:]:
        np.testing.assert_allclose(other.weights, runs[0].weights, rtol=1e-6, atol=1e-7)
    assert np.abs(runs[0].weights - START).max() > 0.1 and [r.seconds for r in runs] == [20.0] * 3


def test_workers_that_do_the_same_are_one_worker() -> None:
    one, four = (simulate(config(), crew(*[1.0] * k), START, 20, alike) for k in (1, 4))
    np.testing.assert_allclose(four.weights, one.weights, rtol=1e-6, atol=1e-7)


def test_one_worker_and_a_rate_of_one_are_training_alone() -> None:
    out = simulate(config(o=settings.Outer("average")), crew(1.0), START, 20, descend)
    alone, _ = descend("", Answer("work", steps=20), START)
    np.testing.assert_allclose(out.weights, alone, rtol=1e-6, atol=1e-7)


def test_a_round_is_the_mean_of_the_workers_by_number_or_by_tokens() -> None:
    """The outer optimizer averages, so that the weights after a round are the mean of what the workers have."""
    ends = [descend("", Answer("work", shard=i, steps=5), START)[0] for i in range(2)]

    def train(worker, work, weights):
        return descend(worker, work, weights)[0], 30.0 if worker == "w1" else 10.0

    for weigh, mean in (("equal", (ends[0] + ends[1]) / 2), ("tokens", (ends[0] + 3 * ends[1]) / 4)):
        out = simulate(config(o=settings.Outer("average"), weigh=weigh), crew(1, 1), START, 5, train)
        np.testing.assert_allclose(out.weights, mean, rtol=1e-5, atol=1e-6)


def test_pushes_one_at_a_time_of_delayed_nesterov_are_a_round_of_nesterov() -> None:
    """All of a turn start from the same version, as with equal speeds, and weigh the same."""
    delayed = config("async", o=settings.Outer("delayed_nesterov", delay=3), staleness=0.0)
    many = simulate(delayed, crew(1, 1, 1), START, 5, descend)
    one = simulate(config("sync", o=settings.Outer("nesterov")), crew(1, 1, 1), START, 5, descend)
    assert [e["staleness"] for e in named(many, "version")] == [[0], [1], [2]]
    np.testing.assert_allclose(many.weights, one.weights, rtol=1e-5, atol=1e-6)


def test_a_round_with_its_quorum_waits_for_the_others_no_longer_than_its_grace() -> None:
    c = config(quorum=0.5, grace=7.0, timeout=1000.0)
    out = simulate(c, crew(1, 1, 100), START, 10, descend)
    first = named(out, "version")[0]
    assert first["time"] == 12.0 and first["workers"] == ["w0", "w1"]
    late = named(out, "late")[0]
    assert late["workers"] == ["w2"] and late["time"] == 12.0
    assert out.server.book.ended == "finished"


def test_a_late_push_is_dropped_and_named_and_its_worker_goes_on() -> None:
    out = simulate(config(quorum=0.5, grace=1.0), crew(1, 1, 2), START, 12, descend)
    dropped = [e for e in named(out, "late") if "lost_steps" in e]
    assert dropped[0]["worker"] == "w2" and dropped[0]["lost_steps"] == 5
    steps = [sum("w2" in e["workers"] for e in named(out, "version")), len(named(out, "version"))]
    assert steps[0] < steps[1]
    dynamic = simulate(config(quorum=0.5, grace=1.0, dynamic=True), crew(1, 1, 2), START, 60, descend)
    assert len([e for e in named(dynamic, "late") if "lost_steps" in e]) <= 2
    assert sum("w2" in e["workers"] for e in named(dynamic, "version")) > len(named(dynamic, "version")) / 2


def test_a_quorum_that_can_not_be_met_is_said_at_once_and_ends_the_run_after_its_bound() -> None:
    c = config(quorum=1.0, timeout=50.0, wait=70.0)
    out = simulate(c, crew(1, 1, w1=((0.0, 7.0),)), START, 50, descend)
    [lost], [said] = named(out, "lost"), named(out, "quorum")
    assert lost["worker"] == "w1" and lost["time"] == said["time"] == 55.0  # last seen when the round ended at 5
    assert said["here"] == 1 and said["need"] == 2 and "w1" in said["missing"]
    assert out.seconds == said["time"] + 70.0 and out.server.book.failed
    assert "1 of the 2 workers that a round needs" in out.server.book.ended


def test_too_few_workers_at_the_start_end_the_run_after_its_bound() -> None:
    out = simulate(config(quorum=1.0, wait=50.0), crew(1, 1, w1=((1e9, 2e9),)), START, 50, descend)
    assert out.server.book.failed and out.seconds == 50.0 and not named(out, "version")


@pytest.mark.parametrize("again", [False, True])
def test_a_server_that_starts_with_too_few_workers_says_so_after_its_grace(again) -> None:
    book = Book(config(quorum=1.0, grace=5.0, wait=50.0), 2, 99, {}, now=100.0)
    if again:
        before = Book(config(quorum=1.0), 2, 99, {})
        before.join("w0", {}, 0.0)
        book.restore(before.state())
    book.tick(100.0)
    assert not book.events and book.deadline(100.0) == 105.0
    book.tick(105.0)
    book.tick(110.0)
    [said] = book.events
    assert (said["name"], said["here"], said["need"], list(said["missing"])) == ("quorum", 0, 2, ["w0"] * again)
    for name in ("w0", "w1"):
        book.join(name, {}, 120.0)
    book.tick(121.0)
    assert book.deadline(121.0) > 155.0, "the bound of the lack of workers stands though they are here"


def test_nobody_is_further_ahead_than_the_bound() -> None:
    def furthest(mode: str, bound: int = 2) -> int:
        ahead = 0

        def train(worker, work, weights):
            nonlocal ahead
            rounds[worker] += 1
            ahead = max(ahead, rounds[worker] - min(rounds.values()))
            return descend(worker, work, weights)

        rounds = {"w0": 0, "w1": 0}
        out = simulate(config(mode, bound=bound), crew(1, 10), START, 60, train)
        assert out.server.book.ended == "finished"
        return ahead

    assert furthest("stale") == 2
    assert furthest("stale", 0) == 1  # of two that start at the same moment one is first
    assert furthest("async") > 5


def test_stale_pushes_weigh_less() -> None:
    """The one that comes three versions late moves the weights by a quarter of its delta."""
    pushed: dict[str, np.ndarray] = {}

    def train(worker, work, weights):
        after, tokens = descend(worker, work, weights)
        pushed[worker] = weights - after
        return after, tokens

    c = config("async", o=settings.Outer("average"), staleness=1.0)
    before = simulate(c, crew(1, 3.9), START, 8, train)
    assert [e["staleness"] for e in named(before, "version")][:3] == [[0], [0], [0]]
    whole = Server(Book(c, 2, 99, {}), Part(c, START))
    a, b = (whole.join(n, {}, 0.0).token for n in "ab")
    for turn in range(3):
        whole.push("a", a, turn, {"values": np.zeros_like(START)}, 1.0, steps=5)
        whole.ask("a", a, 1.0)
    whole.push("b", b, 0, {"values": pushed["w1"]}, 1.0, steps=5)
    np.testing.assert_allclose(whole.part.weights, START - pushed["w1"] / 4, rtol=1e-6)


def test_a_worker_dies_and_comes_back_to_its_shard_and_its_place() -> None:
    seen: list[tuple[str, int, int, int]] = []

    def train(worker, work, weights):
        seen.append((worker, work.shard, work.position, work.clock))
        return descend(worker, work, weights)

    c = config("sync", quorum=0.5, grace=1.0, timeout=20.0)
    out = simulate(c, crew(1, 1, 1, w1=((0.0, 12.0), (50.0, 1e9))), START, 60, train)
    [lost], [back] = named(out, "lost"), named(out, "returned")
    assert lost["worker"] == back["worker"] == "w1" and back["shard"] == 1 and "no sign of life" in back["after"]
    mine = [(position, clock) for name, shard, position, clock in seen if name == "w1"]
    assert [position for position, _ in mine[:4]] == [0, 5, 10, 10]  # the steps of 10 to 12 are lost and made again
    assert mine[3][1] > 20  # the schedule of the learning rate stands where the run does
    assert out.server.book.done >= 180
    assert all(b - a == 5 for a, b in zip(*[[p for p, _ in mine[3:-1]][i:] for i in (0, 1)], strict=False))


def test_one_who_joins_late_takes_the_shard_with_the_fewest_updates() -> None:
    c = config("async", timeout=30.0)
    out = simulate(c, crew(1, 1, 1, w0=((0.0, 7.0),), w2=((100.0, 1e9),)), START, 80, descend)
    joined = {e["worker"]: e["shard"] for e in named(out, "joined")}
    assert joined == {"w0": 0, "w1": 1, "w2": 2}
    spare = simulate(c, crew(1, 1, 1, w0=((0.0, 7.0),), w2=((2.0, 1e9),)), START, 80, descend, shards=2)
    assert {e["worker"]: e["shard"] for e in named(spare, "joined")}["w2"] is None
    after = [e["workers"] for e in named(spare, "version") if e["time"] > 40]
    assert ["w2"] in after  # it took the shard of the one who died


def test_faster_workers_do_more_where_nobody_waits() -> None:
    sync = simulate(config("sync"), crew(1, 1, 2, 4), START, 60, descend)
    free = simulate(config("async", o=settings.Outer(lr=0.1)), crew(1, 1, 2, 4), START, 60, descend)
    assert free.seconds < 0.5 * sync.seconds
    assert free.server.book.done >= 240 and sync.server.book.done == 240


@pytest.mark.parametrize("mode", ["sync", "async", "stale"])
@pytest.mark.parametrize("kind", ["none", "float4"])
def test_the_same_schedule_gives_the_same_bits(mode, kind) -> None:
    fates = dict(w1=((0.0, 12.0), (30.0, 1e9)), w2=((7.5, 1e9),))
    c = config(mode, compress=kind, grace=3.0, timeout=15.0, error_decay=0.9)
    a, b = (simulate(c, crew(1, 1.5, 0.7, **fates), START, 40, descend) for _ in range(2))
    assert a.events == b.events and a.seconds == b.seconds and a.sent == b.sent
    np.testing.assert_array_equal(a.weights, b.weights)
    assert np.abs(a.weights - START).max() > 0.1
    if kind == "float4":
        assert 0 < np.abs(next(iter(a.errors.values()))).max() < 1


def test_a_worker_that_asks_late_starts_where_its_round_began() -> None:
    """The schedule of its learning rate can't depend on who has pushed when it asks."""
    server = Server(Book(config("sync"), 2, 99, {}), Part(config("sync"), START))
    first, late = (server.join(name, {}, 0.0).token for name in ("w0", "w1"))
    work = server.ask("w0", first, 0.0)
    server.push("w0", first, 0, {"values": np.zeros(SIZE, np.float32)}, 1.0, steps=work.steps)
    assert server.book.clock == work.steps // 2
    assert server.ask("w1", late, 2.0)[2:] == (0, 1, 0, 0, work.steps, "")


def test_a_restored_server_goes_on_as_one_that_was_never_stopped() -> None:
    c, draw = config("sync", o=settings.Outer("adam", lr=0.01)), np.random.default_rng(3)
    pushes = draw.normal(size=(4, 2, SIZE)).astype(np.float32)

    def push(server: Server, turns) -> None:
        tokens = {n: server.join(n, {}, 0.0).token for n in ("w0", "w1")}
        for deltas in turns:
            for (name, token), delta in zip(tokens.items(), deltas, strict=True):
                work = server.ask(name, token, 1.0)
                server.push(name, token, work.version, {"values": delta}, 1.0, steps=5)

    whole = Server(Book(c, 2, 99, {}), Part(c, START))
    push(whole, pushes)
    first = Server(Book(c, 2, 99, {}), Part(c, START))
    push(first, pushes[:2])
    second = Server(Book(c, 2, 99, {}), Part(c, np.zeros_like(START)))
    del first.book.events[: [e["name"] for e in first.book.events].index("version") + 1]  # it was told of the first
    second.book.restore(json.loads(json.dumps(first.book.state())))
    assert [(e["name"], e["version"]) for e in second.book.events] == [("version", 2)]
    second.part.restore(first.part.saved())
    with pytest.raises(Unknown, match="worker w0: the server doesn't know it"):
        second.ask("w0", 1, 0.0)
    push(second, pushes[2:])
    np.testing.assert_array_equal(second.part.weights, whole.part.weights)
    assert second.book.positions == whole.book.positions == [20, 20] and second.book.version == 4
    with pytest.raises(ValueError, match=r"distributed\.workers: the server's checkpoint has 2 data shards"):
        Book(c, 3, 99, {}).restore(first.book.state())
    with pytest.raises(ValueError, match="another outer optimizer"):
        Part(config(), START).restore(first.part.saved())


def refused(server: Server, message: str, *arguments, **more) -> None:
    with pytest.raises(Refused, match=message) as told:
        server.push(*arguments, **more)
    assert "\n" not in str(told.value)


def test_what_is_refused_says_so_in_one_line() -> None:
    terms = {"optim.lr": 1e-3, "weights": "abc"}
    server = Server(Book(config("async", compress="int8"), 2, 99, terms), Part(config("async", compress="int8"), START))
    others = [
        (terms | {"optim.lr": 2e-3}, r"worker w0: optim\.lr is 0\.002 there and 0\.001 at the server"),
        ({"optim.lr": 1e-3}, "weights is None there"), (terms | {"more": 1}, "more is 1 there"),
    ]  # fmt: skip
    for other, match in others:
        with pytest.raises(Refused, match=match):
            server.join("w0", other, 0.0)
    assert not server.book.members
    token = server.join("w0", terms, 0.0).token
    good = vector.pack("int8", START, None, 1.0)
    bad = good | {"scales": good["scales"] * np.float32(np.nan)}
    refused(server, "not finite", "w0", token, 0, bad, 1.0, steps=5)
    refused(server, r"values is int8\[2, 256\] instead of int8\[3, 256\]", "w0", token, 0,
            {"values": good["values"][:2], "scales": good["scales"][:2]}, 1.0, steps=5)  # fmt: skip
    refused(server, r"its parts are \['values'\]", "w0", token, 0, {"values": START}, 1.0, steps=5)
    refused(server, "pushes from version 3, and the server is at 0", "w0", token, 3, good, 1.0, steps=5)
    refused(server, "pushes 6 local steps and was given 5", "w0", token, 0, good, 1.0, steps=6)
    refused(server, "worker w9: the server doesn't know it", "w9", token, 0, good, 1.0, steps=5)
    refused(server, "another process has joined under this name", "w0", token + 1, 0, good, 1.0, steps=5)
    np.testing.assert_array_equal(server.part.weights, START)
    server.push("w0", token, 0, good, 1.0, steps=5)
    refused(server, "has no work from version 0", "w0", token, 0, good, 1.0, steps=5)
    assert server.book.version == 1 and server.book.positions == [5, 0]
