"""Workers that are jobs of their own, without Ray: what they compute, how a job goes on, what is refused."""

import dataclasses
import importlib.util
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.assembly.distributed import coordinator, crew, job, local_steps, ray_server, terms
from jaxlm.assembly.model_source import StartModel
from jaxlm.commands import cli
from jaxlm.core import distributed as settings
from jaxlm.core import tree
from jaxlm.formats import server_state
from jaxlm.training.distributed.book import Book
from jaxlm.training.distributed.server import Part, Server
from jaxlm.training.distributed.simulate import Worker, simulate
from jaxlm.training.log import RunLog, read_lines

NONE = StartModel("")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(4):
        (folder / f"{i}.txt").write_text("".join(f"line {j} of text {i}, {j * j} words\n" for j in range(60)))
    return folder


@pytest.fixture
def make(text, tmp_path, one_device):
    """Returns a run of a tiny model: 4 rows of 16 bytes a step."""

    def run(steps: int = 4, optim: dict | None = None, **distributed) -> jaxlm.Run:
        server = settings.Server(quorum=1.0, grace=5.0, timeout=60.0)
        return jaxlm.load(
            "tiny_llama", name="run", out=str(tmp_path / "runs"),
            distributed=dataclasses.replace(settings.Distributed("server", server=server), **distributed),
            **{"data.train": (str(text),), "data.holdout": 0.3, "data.cache": str(text / "cache"), "model.layers": 1,
               "model.width": 16, "model.heads": 2, "model.kv_heads": 1, "model.head_width": 8, "model.ffn": 16,
               "train.steps": steps, "train.batch_size": 4, "train.seq_len": 16, "train.prompts": (),
               "train.log_every": 1, "train.eval_batches": 1, "train.save_every": 3,
               **{f"optim.{k}": v for k, v in ({"warmup": 1} | (optim or {})).items()}},
        )  # fmt: skip

    return run


def plain(run) -> np.ndarray:
    """The weights after plain training on all rows."""
    alone = jaxlm.Program(dataclasses.replace(run, distributed=settings.Distributed()))
    state = alone.init()
    batches = alone.batches()
    for _ in range(run.train.steps):
        state, _ = alone.step(state, next(batches))
    leaves = tree.flatten(state.params)
    return np.concatenate([np.ravel(jax.device_get(leaves[path])) for path in sorted(leaves)])


def test_one_step_of_sgd_between_averages_is_data_parallel(make) -> None:
    sgd = {"name": "sgd", "momentum": 0.0, "clip": 0.0, "lr": 0.5, "warmup": 0, "weight_decay": 0.0}
    run = make(3, sgd, workers=2, every=1, outer=settings.Outer("average"))
    weights, train = local_steps.simulated(run, NONE)
    out = simulate(run.distributed, [Worker("a"), Worker("b", 2.0)], weights, 3, train)
    np.testing.assert_allclose(out.weights, plain(run), rtol=1e-5, atol=1e-6)
    assert np.abs(out.weights - weights).max() > 1e-3


class NearLink:
    """A link to a server in this process, of one worker; `stop` is called after so many signs of life."""

    def __init__(self, server: Server, stop_after: int = 0) -> None:
        self.server, self.beats, self.stop_after = server, 0, stop_after
        self.clocks: list[int] = []

    def begin(self):
        return self.followed(self.server.join("w0", {}, 0.0))

    def exchange(self, packed, **figures):
        a = self.answer
        self.server.push("w0", a.token, a.version, packed, 0.0, **figures)
        return self.followed(self.server.ask("w0", a.token, 0.0))

    def followed(self, answer):
        self.answer = answer
        self.clocks.append(answer.clock)
        return answer, self.server.part.weights.copy() if answer.do == "work" else None

    def beat(self) -> None:
        self.beats += 1
        if self.beats == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def leave(self) -> None:
        self.server.leave("w0", self.answer.token, 0.0)


def served(run, weights) -> Server:
    book = Book(run.distributed, run.distributed.workers, run.train.steps, {})
    return Server(book, Part(run.distributed, weights))


def test_a_job_does_what_the_simulated_worker_does_and_goes_on_after_a_stop(make) -> None:
    run = make(8, workers=1, every=3, compress="int8", outer=settings.Outer("nesterov"))
    weights, train = local_steps.simulated(run, NONE)
    expected = simulate(run.distributed, [Worker("w0")], weights, 8, train)
    server = served(run, weights)
    link = NearLink(server)
    assert job.work(run, NONE, "w0", lambda agreed, count: link) == 0
    assert link.clocks == [0, 3, 6, 8] and server.book.ended == "finished" and not server.book.members
    np.testing.assert_array_equal(server.part.weights, expected.weights)

    run = dataclasses.replace(run, name="stopped")
    server = served(run, weights)
    link = NearLink(server, stop_after=3)  # in the second round, after its first step
    assert job.work(run, NONE, "w0", lambda agreed, count: link) == 1
    folder = run.folder / "workers" / "w0"
    assert server.book.positions == [3] and np.abs(np.load(folder / job.ERROR)).max() > 0
    link = NearLink(server)
    assert job.work(run, NONE, "w0", lambda agreed, count: link) == 0
    assert link.clocks == [3, 6, 8] and server.book.positions == [8]
    # A batch of the round that was stopped is made again, with moments that have seen it: near, not the same.
    np.testing.assert_allclose(server.part.weights, expected.weights, atol=0.02)
    assert np.abs(server.part.weights - weights).max() > 0.02
    steps = [line["step"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 10))


def test_what_is_agreed_leaves_out_what_each_has_for_itself(make) -> None:
    run = make(workers=2)

    def agreed(r) -> dict:
        steps = local_steps.open_steps(r, terms.worker_run(r, "w"), NONE)
        return terms.of(r, steps.p)

    same, mine = agreed(run), dataclasses.replace(run, name="other")
    mine = dataclasses.replace(mine, train=dataclasses.replace(run.train, log_every=7, eval_every=9))
    mine = dataclasses.replace(mine, mesh=dataclasses.replace(run.mesh, fsdp=1, zero=1))
    assert agreed(mine) == same
    lr = dataclasses.replace(run, optim=dataclasses.replace(run.optim, lr=1.0))
    wider = dataclasses.replace(run, model=dataclasses.replace(run.model, ffn=32))
    assert {k for k, v in agreed(lr).items() if v != same[k]} == {"optim.lr"}
    assert {k for k, v in agreed(wider).items() if v != same[k]} == {"model.ffn", "the weights"}


REFUSED = {
    r"distributed\.method: is none; set it to server": {"method": "none"},
    r"distributed\.workers: say into how many shards": {"workers": None},
    r"distributed\.workers: 3 do not divide the 4 rows": {"workers": 3},
    r"distributed\.fragments: is not for workers with a server; set it to 1": {"fragments": 2},
    r"distributed\.weigh: tokens weigh the pushes of a round": {
        "weigh": "tokens", "server": settings.Server("async")
    },
    r"distributed\.outer\.delay: 1 is less than the 2 workers": {
        "outer": settings.Outer("delayed_nesterov", delay=1), "server": settings.Server("async")
    },
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_a_run_that_has_no_server_or_asks_too_much_of_it_is_refused(make, line) -> None:
    with pytest.raises(ValueError, match=line) as told:
        terms.check(make(**({"workers": 2} | REFUSED[line])))
    assert "\n" not in str(told.value)


def test_a_worker_that_has_no_name_of_a_folder_is_refused() -> None:
    assert terms.check_name("east-1.a") == "east-1.a"
    for name in ("", "a/b", "..", "a b"):
        with pytest.raises(ValueError, match="is no name of a folder"):
            terms.check_name(name)


def test_without_ray_the_commands_say_how_to_install_it(text, tmp_path, capsys, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ray" else find(name))
    for words in (["coordinate", "tiny_llama"], ["work", "tiny_llama", "--address", "auto"]):
        more = ["--distributed.method", "server", "--distributed.workers", "2", "--out", str(tmp_path / "runs")]
        assert cli.main([*words, *more]) == 2
        told = capsys.readouterr().err
        assert told.strip() == 'jaxlm: distributed.method: server needs Ray: pip install "jaxlm[ray]"'
    assert cli.main(["train", "tiny_llama", "--distributed.method", "server", "--out", str(tmp_path / "runs")]) == 2
    assert "jaxlm coordinate" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_servers_checkpoints_are_whole_or_not_there(tmp_path, make, capsys) -> None:
    run = make(workers=2, server=settings.Server(shards=2, keep=2), outer=settings.Outer("adam"))
    weights = np.random.default_rng(0).normal(size=700).astype(np.float32)
    ray_server.write_first(run, weights)
    folder = run.folder / ray_server.FOLDER
    parts = [server_state.read_part(folder, 0, i) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate([p["weights"] for p in parts]), weights)
    assert server_state.read_book(folder, 0)["positions"] == [0, 0]
    for version in (1, 2):
        at = server_state.new(folder, version)
        for i in range(2):
            server_state.write_part(at, i, Part(run.distributed, parts[i]["weights"] + version).saved())
        server_state.commit(folder, version, {"version": version}, 2)
    server_state.write_part(server_state.new(folder, 3), 0, parts[0])  # killed before it was whole
    assert server_state.versions(folder) == [1, 2] and server_state.newest(folder) == 2
    file = folder / "version-2" / "part-1" / "weights.npy"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    assert server_state.newest(folder) == 1
    assert "version-2 is damaged: part-1/weights.npy has a wrong checksum" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"distributed\.server\.shards: .*version-1 was saved by fewer"):
        server_state.read_part(folder, 1, 2)
    (folder / "version-1" / "part-0" / "weights.npy").unlink()
    with pytest.raises(ValueError, match="no checkpoint of the server is sound"):
        server_state.newest(folder)


def test_the_log_has_each_version_once_after_a_restart(tmp_path) -> None:
    """Of versions 2 and 3, which the server saved as untold, the log has the first; version 4 was never saved."""
    with RunLog(tmp_path) as log:
        for version in (1, 2, 4):
            log.train(20 * version, {"version": version}, {})
    logged = coordinator._forget(tmp_path, 3)
    with RunLog(tmp_path, resume_step=60) as log:
        watch = coordinator.Watch.__new__(coordinator.Watch)
        watch.log, watch.logged, watch.printed = log, logged, float("inf")
        for version in (2, 3, 4):
            event = dict(
                name="version", clock=20 * version, version=version, tokens=1, staleness=[0], loss=None, time=0
            )
            watch._log(event | {"workers": ["w0"]}, {"received": 0, "sent": 0})
    assert [line["version"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_workers_of_a_machine_share_its_gpus() -> None:
    name = "CUDA_VISIBLE_DEVICES"
    assert [crew.devices(i, 2, {}, 4)[name] for i in range(2)] == ["0,1", "2,3"]
    assert crew.devices(1, 2, {name: "5,7"}, 8) == {name: "7"}
    assert crew.devices(0, 2, {}, 0) == crew.devices(0, 2, {}, 1) == crew.devices(0, 2, {name: ""}, 4) == {}
