"""A real Ray on this machine, with a parameter server and four workers that train a tiny model: they are killed,
stopped and come late, one fault after the other and twenty at random, and the run ends as one without faults does.

    python tests/system/ray_workers.py [--folder DIR] [--faults 20] [--seed 0] [--only undisturbed scripted all random]

The Python that runs it must have Ray. Nothing may wait longer than its bound, everyone lost must be named, the loss
must be that of an undisturbed run within the spread of seeds, and a server that is started again must be what it saved,
to the bit. Prints a table of what was seen; exit status 1 at any difference.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np

ROOT = Path(__file__).parents[2]
TIMEOUT, GRACE = 20.0, 8.0
START = 600.0  # seconds that a process may take to start again on a busy machine
SEEDS = 2
Rows = list[tuple[str, str]]


def options(folder: Path, name: str, steps: int, seed: int = 0, **more) -> list[str]:
    values = {
        "name": name, "out": folder / "runs", "seed": seed, "data.train": folder / "text", "data.holdout": 0.2,
        "data.cache": folder / "cache", "model.layers": 1, "model.width": 32, "model.heads": 2, "model.kv_heads": 1,
        "model.head_width": 16, "model.ffn": 64, "train.batch_size": 8, "train.seq_len": 64, "train.steps": steps,
        "train.eval_every": 0, "train.eval_batches": 8, "train.log_every": 20, "train.save_every": 60,
        "optim.warmup": 20, "optim.lr": 0.01, "distributed.method": "server", "distributed.workers": 4,
        "distributed.every": 20, "distributed.server.timeout": TIMEOUT, "distributed.server.grace": GRACE,
        "distributed.server.wait": START, **more,
    }  # fmt: skip
    words = [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return [str(ROOT / "configs/tiny_llama.py"), *words, "--train.prompts"]


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1", "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def descendants(root: int) -> dict[int, str]:
    """The processes that come from one, with their command lines."""
    rows = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    parsed = [row.split(None, 2) for row in rows.splitlines()]
    found: dict[int, str] = {}
    while more := {int(p): a for p, q, a in parsed if int(q) in (root, *found) and int(p) not in found}:
        found |= more
    return found


class Run:
    """A coordinator with its workers, whose output goes to a file."""

    made: ClassVar[list["Run"]] = []

    def __init__(self, folder: Path, name: str, local: int, steps: int, **more) -> None:
        self.folder, self.name, self.more = folder, name, more
        self.log, self.run = folder / f"{name}.log", folder / "runs" / name
        self.words = [*options(folder, name, steps, **more), "--local", str(local)]
        self.made.append(self)
        self.start()

    def start(self) -> None:
        words = [sys.executable, "-m", "jaxlm", "coordinate", *self.words]
        self.before = len(self.said) if self.log.exists() else 0
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                words, env=environment(self.folder), stdout=out, stderr=out, start_new_session=True
            )
        self.began = time.monotonic()

    @property
    def said(self) -> str:
        return self.log.read_text()

    def pid(self, worker: str) -> int:
        return int(re.findall(rf"^{worker} is pid (\d+)", self.said, re.MULTILINE)[-1])

    def server(self) -> int | None:
        return next((p for p, args in descendants(self.process.pid).items() if args.startswith("ray::Keeper")), None)

    def lines(self) -> list[dict]:
        file = self.run / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    def version(self) -> int:
        return max((line["version"] for line in self.lines() if line["kind"] == "train"), default=0)

    def until(self, what: str, seen: Callable[[], object], seconds: float = START) -> float:
        began = time.monotonic()
        while not seen():
            assert self.process.poll() is None, f"{self.name} ended before: {what}\n{self.said[-3000:]}"
            assert time.monotonic() - began < seconds, (
                f"{self.name}: {what}: not within {seconds} s\n{self.said[-3000:]}"
            )
            time.sleep(0.1)
        return time.monotonic() - began

    def until_version(self, more: int) -> float:
        target = self.version() + more
        return self.until(f"version {target}", lambda: self.version() >= target)

    def tells(self, event: str, worker: str = "", since: float = 0.0) -> bool:
        return any(line.get("name") == f"server_{event}" and worker in (line.get("worker", ""), "")
                   and line["time"]["unix"] >= since for line in self.lines())  # fmt: skip

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        os.kill(pid, number)

    def kill_all(self) -> None:
        if self.process.poll() is not None:
            return
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def end(self, seconds: float = 1200.0) -> float:
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"{self.name} never ended:\n{self.said[-3000:]}") from None
        assert status == 0, f"{self.name} ended with status {status}:\n{self.said[-3000:]}"
        return [line for line in self.lines() if line["kind"] == "valid"][-1]["loss"]

    def longest_wait(self) -> float:
        """The longest time that a worker's push and the answer to it took."""
        waits = [0.0]
        for file in (self.run / "workers").glob("*/metrics.jsonl"):
            for text in file.read_text().split("\n")[:-1]:
                line = json.loads(text)
                waits += [line["time"]["seconds"]] if line.get("name") == "exchange" else []
        return max(waits)

    def check_bounds(self) -> str:
        """A worker waits for a round at most until the late are given up and the quorum has had its grace; a server
        that dies is waited for until it is there again."""
        bound = TIMEOUT + GRACE + START
        longest = self.longest_wait()
        assert longest < bound, f"{self.name}: a worker waited {longest:.1f} s, and the bound is {bound:.0f} s"
        return f"{longest:.1f} s of at most {bound:.0f} s"


def simulated(folder: Path, steps: int, seed: int) -> tuple[float, np.ndarray]:
    """The loss and the weights of a run without faults, from the simulated transport in a process of its own."""
    code = """
import sys, numpy as np
from jaxlm.assembly import corpus, scoring
from jaxlm.assembly.distributed import local_steps, terms
from jaxlm.assembly.model_source import StartModel
from jaxlm.core import config_io
from jaxlm.training.distributed.simulate import Worker, simulate
from jaxlm.runtime import mesh
run = config_io.override(config_io.load(sys.argv[1]), sys.argv[3:])
weights, train = local_steps.simulated(run, StartModel(""))
out = simulate(run.distributed, [Worker(f"w{i}") for i in range(4)], weights, run.train.steps, train)
steps = local_steps.open_steps(run, run, StartModel(""))
with mesh.on_mesh(steps.p.mesh):
    state = steps.take_up(steps.p.init(), run.train.steps, out.weights)
    held = scoring.HeldOut(steps.p, corpus.corpus(run.data, steps.p.objective, ("valid",)).valid)
    loss = scoring.Scorer(steps.p)(state.eval_params, held, run.train.eval_batches).losses["loss"]
np.savez(sys.argv[2], loss=loss, weights=out.weights)
"""
    config, *words = options(folder, f"simulated{seed}", steps, seed)
    file = folder / f"simulated-{steps}-{seed}.npz"
    if not file.exists():
        done = subprocess.run([sys.executable, "-c", code, config, str(file), *words], env=environment(folder),
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    with np.load(file) as made:
        return float(made["loss"]), made["weights"]


def saved_weights(run: Path) -> tuple[int, np.ndarray]:
    """The newest version that the server has saved, and its weights."""
    newest = max(int(p.name.split("-")[1]) for p in (run / "server").glob("version-*") if p.name[8:].isdigit())
    parts = sorted((run / "server" / f"version-{newest}").glob("part-*"))
    return newest, np.concatenate([np.load(part / "weights.npy") for part in parts])


def within_noise(rows: Rows, folder: Path, name: str, steps: int, loss: float) -> None:
    losses = [simulated(folder, steps, seed)[0] for seed in range(SEEDS)]
    spread = max(losses) - min(losses)
    line = f"{loss:.4f}; without faults {losses[0]:.4f}, spread of {SEEDS} seeds {spread:.4f}"
    assert loss < losses[0] + max(spread, 0.02), f"{name}: {line}"
    rows.append((f"{name}: loss", line))


def undisturbed(folder: Path, rows: Rows, args: argparse.Namespace) -> None:
    run = Run(folder, "undisturbed", 4, args.short, **{"distributed.server.grace": 600, "distributed.server.shards": 2})
    loss = run.end()
    expected, weights = simulated(folder, args.short, 0)
    _, found = saved_weights(run.run)
    # The workers' pushes are added in the order in which they come, and Adam's steps enlarge what rounding that makes.
    assert np.abs(found - weights).max() < 5e-4 and abs(loss - expected) < 1e-3, np.abs(found - weights).max()
    rows.append(("undisturbed, two actors: loss", f"{loss:.4f}; simulated {expected:.4f}; weights differ by at most "
                 f"{np.abs(found - weights).max():.1e}"))  # fmt: skip


def scripted(folder: Path, rows: Rows, args: argparse.Namespace) -> None:
    """One fault after the other: a worker killed, one that hangs, one that comes late, and the server."""
    run = Run(folder, "scripted", 3, args.long)
    run.until("three workers", lambda: run.said.count(": joined:") >= 3)
    run.until_version(2)

    since = time.time()
    run.kill(run.pid("w1"))
    took = run.until("w1 is back", lambda: run.tells("returned", "w1", since) or run.tells("replaced", "w1", since))
    assert "w1 ended with status -9: it is started again" in run.said
    rows.append(("kill -9 of a worker in mid-round", f"named, and back after {took:.0f} s"))
    run.until_version(2)

    since = time.time()
    run.kill(run.pid("w2"), signal.SIGSTOP)
    took = run.until("w2 is lost", lambda: run.tells("lost", "w2", since), TIMEOUT + 30)
    held = run.until_version(1)
    run.kill(run.pid("w2"), signal.SIGCONT)
    back = run.until("w2 is back", lambda: run.tells("returned", "w2", since))
    rows.append(("SIGSTOP of a worker", f"named as lost after {took:.1f} s (bound {TIMEOUT:.0f} s), the next version "
                 f"{held:.1f} s later, back {back:.1f} s after SIGCONT"))  # fmt: skip

    since = time.time()
    address = re.findall(r"--address (\S+)", run.said)[-1]
    words = [sys.executable, "-m", "jaxlm", "work", str(run.run), "--address", address, "--worker", "late"]
    with (folder / "late.log").open("w") as out:
        late = subprocess.Popen(words, env=environment(folder), stdout=out, stderr=out)
    took = run.until("the late one is there", lambda: run.tells("joined", "late", since))
    counted = lambda: any("late" in line for line in [json.dumps(x) for x in run.lines()])  # noqa: E731
    run.until("the late one counts", counted)
    shard = next(x["shard"] for x in run.lines() if x.get("worker") == "late")
    rows.append(("a worker that comes late", f"is there after {took:.0f} s, and has shard {shard}"))
    run.until_version(2)

    since, version = time.time(), run.version()
    pid = run.server()
    assert pid is not None, descendants(run.process.pid)
    run.kill(pid)
    took = run.until("the server is there again", lambda: run.tells("restarted", "", since))
    [event] = [x for x in run.lines() if x.get("name") == "server_restarted"]
    assert event["before"] - event["version"] <= 1, event
    again = run.until_version(2)
    rows.append(("kill -9 of the server", f"again at version {event['version']} (it was at {version} or more) after "
                 f"{took:.1f} s, two versions later after {again:.1f} s"))  # fmt: skip

    loss = run.end()
    late.wait(60)
    lines = [x["version"] for x in run.lines() if x["kind"] == "train"]
    assert lines == sorted(set(lines)), "the log has a version twice or out of order"
    rows.append(("one fault after the other: longest wait", run.check_bounds()))
    within_noise(rows, folder, "one fault after the other", args.long, loss)


def all_killed(folder: Path, rows: Rows, args: argparse.Namespace) -> None:
    """Everything is killed in mid-round, and goes on from what the server had saved."""
    run = Run(folder, "killed", 4, args.short)
    run.until("four workers", lambda: run.said.count(": joined:") >= 4)
    run.until_version(2)
    run.kill_all()
    version, weights = saved_weights(run.run)
    run.words[run.words.index("--local") + 1] = "0"
    run.start()
    run.until("the server is there", lambda: f"is at version {version}" in run.said[run.before :])
    address = re.findall(r"--address (\S+)", run.said)[-1]
    held = held_by_server(folder, address, run.name)
    assert held[0] == version and np.array_equal(held[1], weights)
    run.kill_all()
    rows.append(("kill -9 of all", f"the server goes on from version {version}, equal to the bit"))
    run.words[run.words.index("--local") + 1] = "4"
    run.start()
    loss = run.end()
    lines = [x["version"] for x in run.lines() if x["kind"] == "train"]
    assert lines == list(range(1, max(lines) + 1)), "the log lacks a version, or has one twice"
    within_noise(rows, folder, "kill -9 of all", args.short, loss)


def held_by_server(folder: Path, address: str, name: str) -> tuple[int, np.ndarray]:
    """What the server holds in its memory, asked of it."""
    code = """
import sys, numpy as np
from jaxlm.assembly.distributed import ray_cluster
ray_cluster.connect(sys.argv[1])
ray = ray_cluster.need()
version, _, refs = ray.get(ray.get_actor(f"server of {sys.argv[2]}").current.remote())
np.savez(sys.argv[3], version=version, weights=np.concatenate(ray.get(list(refs))))
"""
    file = folder / "held.npz"
    done = subprocess.run([sys.executable, "-c", code, address, name, str(file)], env=environment(folder),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(file) as made:
        return int(made["version"]), made["weights"]


def at_random(folder: Path, rows: Rows, args: argparse.Namespace) -> None:
    """Twenty faults in a run of four workers."""
    draw = random.Random(args.seed)
    run = Run(folder, f"random{args.seed}", 4, args.faults_steps)
    run.until("four workers", lambda: run.said.count(": joined:") >= 4)
    run.until_version(1)
    done: list[tuple[str, str, float]] = []
    while len(done) < args.faults and run.process.poll() is None:
        time.sleep(draw.uniform(0.5, 6.0))
        fault, worker = draw.choice(["kill", "kill", "stop", "server"]), f"w{draw.randrange(4)}"
        try:
            if fault == "kill":
                run.kill(run.pid(worker))
            elif fault == "stop":
                run.kill(run.pid(worker), signal.SIGSTOP)
                time.sleep(draw.uniform(0.5, 3.0))
                run.kill(run.pid(worker), signal.SIGCONT)
            elif (pid := run.server()) is not None:
                run.kill(pid)
            else:
                continue
        except ProcessLookupError:  # it is dead already, and about to be started again
            continue
        done.append((fault, worker if fault != "server" else "", time.time()))
    assert len(done) == args.faults, f"the run ended after {len(done)} faults: raise --faults-steps"
    loss = run.end()
    killed = [worker for fault, worker, _ in done if fault == "kill"]
    named = [w for w in killed if re.search(rf"^{w} ended with status -9", run.said, re.MULTILINE)]
    assert len(named) == len(killed), (killed, named)
    restarts = sum(fault == "server" for fault, _, _ in done)
    told = sum(x.get("name") == "server_restarted" for x in run.lines())
    assert 1 <= told <= restarts or not restarts, (restarts, told)
    rows.append((f"{len(done)} faults at random, seed {args.seed}", f"{len(killed)} workers killed, all named; "
                 f"{sum(f == 'stop' for f, _, _ in done)} stopped for up to 3 s; server killed {restarts} times, told "
                 f"{told} times (twice in one start is one)"))  # fmt: skip
    rows.append(("random: versions, longest wait", f"{run.version()}, {run.check_bounds()}"))
    within_noise(rows, folder, "random", args.faults_steps, loss)


PARTS = {"undisturbed": undisturbed, "scripted": scripted, "all": all_killed, "random": at_random}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--short", type=int, default=100, help="steps of the runs undisturbed and all")
    parser.add_argument("--long", type=int, default=3000, help="steps of the run scripted")
    parser.add_argument("--faults-steps", type=int, default=12000, help="steps of the run with faults at random")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="jaxlm-ray-"))
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "docs").rglob("*.md")):
        (folder / "text" / f"{path.stem}.txt").write_text(path.read_text("utf-8"), "utf-8")
    rows: Rows = []
    try:
        for name in args.only:
            PARTS[name](folder, rows, args)
            print(f"ok: {name}", flush=True)
    finally:
        for run in Run.made:
            run.kill_all()
        width = max((len(name) for name, _ in rows), default=0)
        print(*(f"{name:{width}}  {text}" for name, text in rows), sep="\n", flush=True)
    print("PASSED")
    return 0


if __name__ == "__main__":
    sys.exit(main())
