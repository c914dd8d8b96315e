"""The server as actors and the link to it, on a stand-in for Ray that calls at once: what is staged, saved, restored,
and told when an actor was started again. A real Ray is in `tests/system/ray_workers.py`."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.assembly.distributed import crew, ray_cluster, ray_link, ray_server
from jaxlm.core import distributed as settings
from jaxlm.formats import server_state
from jaxlm.runtime.processes import ProcessError
from jaxlm.training.distributed import vector
from jaxlm.training.distributed.book import Book
from jaxlm.training.distributed.server import Part, Server

SIZE = 700
START = np.random.default_rng(7).normal(size=SIZE).astype(np.float32)


class RayError(Exception):
    pass


class Handle:
    """An actor that may be dead."""

    def __init__(self, make) -> None:
        self.make, self.dead = make, 0
        self.actor = make()

    def start_again(self) -> None:
        self.actor = self.make()

    def __getattr__(self, name: str):
        def remote(*arguments):
            def call():
                if self.dead:
                    self.dead -= 1
                    raise RayError(f"dead before {name}")
                try:
                    return getattr(self.actor, name)(*arguments)
                except Exception as error:
                    raise RayError(str(error)) from error

            return call

        return SimpleNamespace(remote=remote)


class NearRay:
    """Does what is asked of Ray when its result is asked for."""

    exceptions = SimpleNamespace(RayError=RayError, ActorDiedError=type("ActorDiedError", (RayError,), {}))

    def __init__(self) -> None:
        self.named: dict[str, Handle] = {}

    def put(self, x):
        return np.array(x)

    def get(self, asked, timeout: float = 0):
        if isinstance(asked, list):
            return [self.get(one) for one in asked]
        return asked() if callable(asked) else asked

    def get_actor(self, name: str) -> Handle:
        if name not in self.named:
            raise ValueError("no such actor")
        return self.named[name]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A server of two actors in which nothing has happened yet."""
    ray = NearRay()
    monkeypatch.setattr(ray_cluster, "need", lambda: ray)
    monkeypatch.setattr(ray_server.jax.config, "update", lambda *_: None)
    server = settings.Server(shards=2, quorum=1.0, grace=1.0, wait=1.0)
    d = settings.Distributed("server", workers=2, every=5, compress="int8", server=server)
    run = SimpleNamespace(distributed=d, folder=tmp_path, name="run", train=SimpleNamespace(steps=100))
    ray_server.write_first(run, START)
    holder = Handle(lambda: ray_server.Holder(d, str(tmp_path), 1))
    keeper = Handle(lambda: ray_server.Keeper(d, str(tmp_path), [holder], 2, 100, {"lr": 1}))
    ray.named[ray_cluster.name_of(run)] = keeper
    return SimpleNamespace(ray=ray, run=run, holder=holder, keeper=keeper, d=d)


def link(cluster, name: str, said: list[str], **terms) -> ray_link.RayLink:
    return ray_link.RayLink(cluster.run, name, {"lr": 1} | terms, SIZE, said.append)


def delta(seed: int) -> vector.Packed:
    return vector.pack("int8", np.random.default_rng(seed).normal(size=SIZE).astype(np.float32), None, 1.0)


def round_of(cluster, links, seed: int):
    """Both workers push; the first is answered once the second has."""
    figures = dict(steps=5, tokens=10.0, seconds=1.0, loss=2.0)
    waiting = links[0]._push(delta(seed), figures)
    assert waiting.answer.do == "wait" and "waits for b" in waiting.answer.why
    return links[1].exchange(delta(seed + 1), **figures), links[0]._followed(waiting)


def begun(cluster, said):
    a, b = link(cluster, "a", said), link(cluster, "b", said)
    reply = a._call("join", "a", a.terms)
    a._answer = reply.answer
    work = b.begin()
    return [a, b], [a._followed(reply), work]


def test_two_actors_are_the_server_of_one_process(cluster) -> None:
    links, first = begun(cluster, [])
    for answer, weights in first:
        assert answer.do == "work" and answer.steps == 5
        np.testing.assert_array_equal(weights, START)
    whole = Server(Book(cluster.d, 2, 100, {}), Part(cluster.d, START))
    tokens = [whole.join(n, {}, 0.0).token for n in "ab"]
    for turn in range(3):
        after = round_of(cluster, links, 10 * turn)
        for token, name, seed in zip(tokens, "ab", (0, 1), strict=True):
            whole.push(name, token, turn, delta(10 * turn + seed), 0.0, steps=5, tokens=10.0)
        for answer, weights in after:
            assert answer.version == turn + 1
            np.testing.assert_array_equal(weights, whole.part.weights)
    status = cluster.ray.get(cluster.keeper.status.remote("", 0))
    assert status["received"] == 6 * vector.size(delta(0)) and status["sent"] == 8 * START.nbytes
    assert [e["name"] for e in status["events"]] == ["joined", "joined", *["version"] * 3]
    again = cluster.ray.get(cluster.keeper.status.remote(status["epoch"], 4))
    assert [e["version"] for e in again["events"]] == [3] and again["clock"] == 15
    assert server_state.versions(cluster.run.folder / "server") == [2, 3]
    version, clock, refs = cluster.ray.get(cluster.keeper.current.remote())
    assert (version, clock) == (3, 15)
    np.testing.assert_array_equal(np.concatenate(refs), whole.part.weights)


@pytest.mark.parametrize("who", ["keeper", "holder"])
def test_an_actor_that_was_started_again_loses_the_round_in_flight_alone(cluster, who) -> None:
    said: list[str] = []
    links, _ = begun(cluster, said)
    (_, weights), _ = round_of(cluster, links, 0)
    figures = dict(steps=5, tokens=10.0, seconds=1.0, loss=2.0)
    links[0]._push(delta(5), figures)  # of the round that is lost
    getattr(cluster, who).start_again()
    links[0]._answer = links[0]._call("join", "a", links[0].terms).answer  # so that the other one needs not wait for it
    answer, back = links[1].exchange(delta(6), **figures)
    assert answer.version == 1 and answer.position == 5 and "5 local steps are lost" in said[-1]
    np.testing.assert_array_equal(back, weights)
    status = cluster.ray.get(cluster.keeper.status.remote("", 0))
    assert status["version"] == 1 and status["received"] == 2 * vector.size(delta(0))


def test_a_server_that_is_away_is_waited_for_and_named_when_it_does_not_come(cluster) -> None:
    said: list[str] = []
    a = link(cluster, "a", said)
    cluster.keeper.dead = 3
    assert a._bounded(lambda: a._call("join", "a", a.terms)).answer.do == "wait" and not cluster.keeper.dead
    cluster.keeper.dead = 10**9
    with pytest.raises(ProcessError, match=r"the server of run: no answer for 1 s \(dead before"):
        a.begin()
    cluster.ray.named.clear()
    a._keeper = None
    with pytest.raises(ProcessError, match="no server of run is in this cluster"):
        a.begin()


def test_who_differs_or_has_a_name_that_another_took_is_refused(cluster) -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match="worker a: lr is 2 there and 1 at the server"):
        link(cluster, "a", said, lr=2).begin()
    links, _ = begun(cluster, said)
    links[1]._call("join", "b", links[1].terms)
    with pytest.raises(ProcessError, match="another process has joined under this name"):
        links[1].exchange(delta(0), steps=5, tokens=1.0, seconds=1.0, loss=1.0)
    broken = delta(0) | {"scales": np.full(3, np.nan, np.float32)}
    reply = links[0]._push(broken, dict(steps=5, tokens=1.0, seconds=1.0, loss=1.0))
    assert "its push can't be used, for it holds numbers that are not finite" in reply.refused


class Process:
    """A worker's process whose end is told to it."""

    made: list["Process"] = []  # noqa: RUF012

    def __init__(self, words, **_) -> None:
        self.words, self.status, self.pid = words, None, len(self.made)
        self.made.append(self)

    def poll(self):
        return self.status

    def kill(self) -> None:
        self.status = -9

    terminate = kill

    def wait(self, seconds: float = 0):
        return self.status


def test_a_crew_starts_those_again_that_die_or_hang_but_for_a_reason_that_stays(tmp_path, monkeypatch, capsys):
    Process.made, now = [], [0.0]
    monkeypatch.setattr(crew.subprocess, "Popen", Process)
    monkeypatch.setattr(crew.time, "monotonic", lambda: now[0])
    run = SimpleNamespace(folder=tmp_path, distributed=settings.Distributed())
    here = {"members": {"w0": {}, "w1": {}}, "gone": {}}
    with crew.Crew(run, "host:1", 2) as found:
        assert [p.words[-1] for p in Process.made] == ["w0", "w1"]
        assert Process.made[0].words[4:7:2] == [str(tmp_path), "host:1"]
        found.look(here)
        assert len(Process.made) == 2
        Process.made[0].status = -9
        now[0] = 100.0
        found.look(here)
        assert [p.words[-1] for p in Process.made] == ["w0", "w1", "w0"]
        hangs = {"members": {"w0": {}}, "gone": {"w1": "it gave no sign of life for 20 s"}}
        found.look(hangs)
        assert Process.made[1].status == -9 and Process.made[3].words[-1] == "w1"
        found.look(hangs)  # it has just begun
        assert len(Process.made) == 4
        Process.made[3].status = 2
        found.look(here)
        for _ in range(5):  # killed soon, but it had come to the server
            found.look(here)
            Process.made[2].status = -9
            found.look(here)
            Process.made[2] = Process.made.pop()
        found.look(here)
        assert Process.made[2].status is None and len(Process.made) == 4
        for _ in range(5):
            Process.made[-1 if Process.made[-1].words[-1] == "w0" else 2].status = 1
            found.look(here)
    assert [p.words[-1] for p in Process.made[4:]] == ["w0"] * 2
    told = capsys.readouterr().out
    assert "w1 hangs: it is killed and started again" in told
    assert told.count("is not started again") == 2
