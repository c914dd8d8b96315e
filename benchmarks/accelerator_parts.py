"""The parts of `accelerator.py`, from the process that starts the others and never touches the device itself."""

import os
import re
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerator_common import Clock, TooLittleTime, estimated_bytes, first_batch, fitting
from shapes import SHAPES
from worker import Worker

ROOT = Path(__file__).parents[1]
TORCH = "torch.compile"
# Our ways to run a shape: overrides, and whether attention gets the documents of a window as a mask. Without one it
# computes what the peer does, which knows no documents; with one, what training does.
OURS: dict[str, tuple[list[str], bool]] = {
    "jaxlm, scanned": (["--execution.scan", "True"], True),
    "jaxlm, unrolled": (["--execution.scan", "False"], True),
    "jaxlm, scanned, no document mask": (["--execution.scan", "True"], False),
    "jaxlm, unrolled, no document mask": (["--execution.scan", "False"], False),
}
FILLED = 0.92  # share of the device's memory that one process may take
Put = Callable[[dict[str, Any]], None]


class MemoryIsOut(Exception):
    pass


class Different(Exception):
    """Two sides that should compute the same do not."""


class Bench:
    """What all parts need: settings, the clock, the device, and the processes that live."""

    def __init__(self, settings: Any, clock: Clock, folder: Path) -> None:
        self.settings, self.clock, self.folder = settings, clock, folder
        self.live: list[Worker] = []
        self.memory = 0.0
        self.rehearse: bool = settings.rehearse

    def say(self, text: str) -> None:
        print(f"[{max(0.0, self.clock.left()):4.0f} s left] {text}", flush=True)

    def start(self, torch: bool = False) -> Worker:
        """A process that has begun to import."""
        threads = self.settings.threads
        env: dict[str, str | None] = {"TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor")}
        if self.rehearse:
            env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        if torch:
            python = self.settings.torch_python
            if python != sys.executable:
                env["PYTHONPATH"] = None  # it would find packages of another Python
            worker = Worker(python, "accelerator_torch.py", {}, env, threads)
        else:
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            env |= {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            env |= {"XLA_CLIENT_MEM_FRACTION": str(FILLED), "XLA_PYTHON_CLIENT_MEM_FRACTION": None}  # its old name
            env |= {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "jax")}  # what was tuned is tuned once
            worker = Worker(sys.executable, "accelerator_jaxlm.py", {}, env, threads)
        self.live.append(worker)
        return worker

    def ask(self, worker: Worker, do: str, **arguments: Any) -> Any:
        answer = worker.ask(do, within=self.clock.within(), **arguments)
        if isinstance(answer, dict) and "oom" in answer:
            raise MemoryIsOut(answer["oom"])
        return answer

    def drop(self, worker: Worker | None) -> None:
        """At once: whoever comes next wants the memory."""
        if worker in self.live:
            self.live.remove(worker)
            worker.kill()

    def drop_all(self) -> None:
        for worker in list(self.live):
            self.drop(worker)


def failure(error: Exception) -> dict[str, Any]:
    """The error in a line, and the end of its traceback."""
    text = str(error).strip() or "no message"
    line = text.split("\n")[-1] if isinstance(error, RuntimeError) else text.split("\n")[0]
    tail = [*traceback.format_tb(error.__traceback__)[-2:], text]
    return {"error": f"{type(error).__name__}: {line}"[:400], "traceback": "\n".join(tail)[-3000:].split("\n")}


# --------------------------------------------------------------------------------------------------------- the device


def device(bench: Bench, worker: Worker) -> dict[str, Any]:
    info = bench.ask(worker, "device")
    pretended = 40e6 if bench.rehearse else None  # so that the search for a batch has something to run into
    bench.memory = info["memory"] / FILLED if info["memory"] else pretended or 8e9
    return info | {"memory": bench.memory if info["memory"] else None, "driver": nvidia_smi()}


def nvidia_smi() -> dict[str, str]:
    """What the driver says of the card, read only; empty where there is none."""
    fields = "driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return dict(zip(fields.split(","), (x.strip() for x in out.split("\n")[0].split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}


def ceilings(bench: Bench, worker: Worker) -> dict[str, Any]:
    sizes, copied, least = ([256], 1 << 22, 0.02) if bench.rehearse else ([4096, 8192, 16384], 1 << 31, 0.3)
    return bench.ask(worker, "ceilings", sizes=sizes, copy_bytes=copied, least=least)


def numerics(bench: Bench, worker: Worker) -> dict[str, Any]:
    return bench.ask(worker, "numerics", length=128 if bench.rehearse else 512)


# ----------------------------------------------------------------------------------------------------------- the step


class Race:
    """One shape: each of our ways beside PyTorch's, in turns where both fit into the device's memory. `rows` is what is
    known of each side, saved by `put` as it comes."""

    def __init__(self, bench: Bench, shape: str, put: Put) -> None:
        self.bench, self.shape, self.put = bench, shape, put
        self.s = SHAPES[shape]
        self.batch = first_batch(self.s, bench.memory)
        self.together = False  # until it is known what ours takes
        self.file = str(bench.folder / f"{shape}.npz")
        self.peered = False  # whether PyTorch's side comes after ours
        self.rows: dict[str, dict[str, Any]] = {}
        self.alive: dict[str, Worker] = {}

    def save(self) -> None:
        self.put({"shape": self.shape, "positions": self.s["seq"], "in_turns": self.together, "rows": self.rows})

    def run(self, ours: list[str]) -> None:
        """The first of `ours`, then PyTorch's from its weights, then the others. While one works the next imports."""
        queue, self.peered = [ours[0], TORCH, *ours[1:]], True
        ahead = self.start(queue[0])
        for name, following in zip(queue, [*queue[1:], None], strict=True):
            worker, ahead = ahead, self.start(following) if following else None
            self.attempt(name, worker)
            if name == TORCH and queue[0] in self.alive:  # it has waited for its peer
                self.finish(queue[0])
        self.finish(TORCH)
        if self.rows[ours[0]].get("batch") not in (None, self.batch):
            self.attempt(ours[0], self.start(ours[0]), f"{ours[0]}, fewer rows")

    def start(self, name: str) -> Worker:
        return self.bench.start(name == TORCH)

    def attempt(self, name: str, worker: Worker, label: str | None = None) -> None:
        """Prepare and measure one side; what goes wrong is its row's. Memory that ran out beside the peer is tried
        again alone."""
        label = label or name
        try:
            self.bench.clock.need(guess(self.bench, self.shape, name), label)
            try:
                self.one(name, label, worker)
            except MemoryIsOut:
                if not (self.together and self.alive):
                    raise
                self.bench.say(f"{label}: memory is out beside {', '.join(self.alive)}; again, alone")
                self.together = False
                self.bench.drop(worker)
                for other in list(self.alive):
                    self.finish(other)
                worker = self.start(name)
                self.one(name, label, worker)
        except (TooLittleTime, TimeoutError) as why:
            self.rows[label] = self.rows.get(label, {}) | {"skipped": str(why)}
            self.bench.say(f"SKIPPED {label}: {why}")
        except Exception as error:
            self.rows[label] = self.rows.get(label, {}) | failure(error)
            self.bench.say(f"FAILED {label}: {self.rows[label]['error']}")
        if worker.process.poll() is not None:
            self.alive.pop(label, None)
        if label not in self.alive:
            self.bench.drop(worker)
        self.save()

    def one(self, name: str, label: str, worker: Worker) -> None:
        row = self.rows[label] = self.prepare(name, worker)
        self.agree(label)
        self.save()
        first = self.peered and TORCH not in self.rows
        if first:
            peer = estimated_bytes(self.s, self.batch, logits=True)
            self.together = 1.25 * row["memory"]["compiled"] + 1.15 * peer <= FILLED * self.bench.memory
            if self.bench.rehearse:  # both ways are rehearsed
                self.together = self.s["family"] == "gpt2"
        waits = self.together and (first or name == TORCH)
        self.alive[label] = worker
        if name == TORCH and row["batch"] < self.batch:
            self.batch = row["batch"]
            for other in self.alive.keys() & OURS.keys():
                smaller = self.bench.ask(self.alive[other], "resize", batch=self.batch)
                before = self.rows[other]
                work = before["flops_per_step"] * self.batch // before["batch"]
                before |= smaller | {"batch": self.batch, "flops_per_step": work, "resized": True, "seconds": {}}
        self.measure()  # the first at once and alone, so that a run which is cut has it; then in turns with its peer
        if not waits:
            self.finish(label)

    def prepare(self, name: str, worker: Worker) -> dict[str, Any]:
        bench = self.bench
        if name == TORCH:
            most = self.batch // 2 if bench.rehearse and self.s["family"] == "gpt2" else None
            given = dict(shape=self.shape, file=self.file, batch=self.batch, threads=bench.settings.threads, most=most)
            row = bench.ask(worker, "prepare", **given)
        else:
            overrides, segments = OURS[name]
            overrides = [*overrides, "--train.seq-len", str(self.s["seq"])]
            peer = self.rows[TORCH]["memory"]["reserved"] or 0 if TORCH in self.alive else 0
            limit = 0.97 * FILLED * bench.memory - peer
            given = dict(shape=self.shape, overrides=overrides, segments=segments, batch=self.batch, limit=limit)
            row = bench.ask(worker, "prepare", **given)
            if peer and row["memory"]["batch"] < self.batch:
                raise MemoryIsOut(f"{self.batch} rows need {max(row['tried'].values()):.4g} bytes of {limit:.4g}")
            if self.peered and TORCH not in self.rows:
                bench.ask(worker, "export", file=self.file)
                self.batch = row["memory"]["batch"]
            bench.say(f"{self.shape}, {name}: attention by {row['notes']['attention']}")
            row["losses"] = bench.ask(worker, "steps", n=4)["losses"]
            row.pop("config")
        bench.say(f"{self.shape}, {name}: {row['memory']['batch']} rows, losses "
                  + "  ".join(f"{x:.4f}" for x in row["losses"]))  # fmt: skip
        return row | {"batch": row["memory"]["batch"], "positions": self.s["seq"]}

    def agree(self, label: str) -> None:
        """The first four losses are those of the side that came first: same weights, same batch, same optimizer."""
        first, mine = next(iter(self.rows.values())), self.rows[label]
        if "losses" not in first:
            return
        rounding = 0.02 if mine["batch"] == first["batch"] else 0.1
        a, b = mine["losses"], first["losses"]
        if not (abs(a[0] - b[0]) <= rounding and abs(a[-1] - b[-1]) <= 20 * rounding):
            raise Different(f"{label} does not compute what {next(iter(self.rows))} does: losses {a} against {b}")

    def measure(self) -> None:
        """Seconds of a step of all that are alive, every second round in the opposite order."""
        bench = self.bench
        turn, rounds = (0.1, 2) if bench.rehearse else (1.0, 5)
        names = list(self.alive)
        count = {}
        for name in names:
            seconds = bench.ask(self.alive[name], "steps", n=2)["seconds"]
            count[name] = max(2, min(20, round(turn / seconds)))
        for i in range(rounds):
            for name in names[:: -1 if i % 2 else 1]:
                bench.ask(self.alive[name], "steps", n=1)
                seconds = bench.ask(self.alive[name], "steps", n=count[name])["seconds"]
                beside = " and ".join(n for n in names if n != name) or "alone"
                self.rows[name].setdefault("seconds", {}).setdefault(beside, []).append(seconds)
            self.save()
        for name in names:
            middle = statistics.median(samples(self.rows[name]))
            bench.say(f"{self.shape}, {name}: {1e3 * middle:.4g} ms a step")

    def finish(self, name: str) -> None:
        """Its memory and its kernels, then its end. One that never had its turn has it now."""
        worker = self.alive.get(name)
        if worker is None:
            return
        row = self.rows[name]
        try:
            if not row.get("seconds"):
                others, self.alive = self.alive, {name: worker}
                self.measure()
                self.alive = others
            row["memory"] = self.bench.ask(worker, "memory")
            if row.get("resized"):
                row["memory"]["peak"] = None  # the most so far was that of more rows
            row["kernels"] = self.bench.ask(worker, "kernels", n=3)
        except TimeoutError as why:
            row["kernels"] = {"skipped": str(why)}
            self.bench.say(f"SKIPPED kernels of {name}: {why}")
        except Exception as error:
            row["kernels"] = failure(error)
            self.bench.say(f"FAILED kernels of {name}: {row['kernels']['error']}")
        self.alive.pop(name, None)
        self.bench.drop(worker)
        self.save()


def samples(row: dict[str, Any]) -> list[float]:
    return [s for group in row.get("seconds", {}).values() for s in group]


def guess(bench: Bench, shape: str, name: str) -> float:
    """Seconds that a side takes at least, to begin none that can't come to its end."""
    if bench.rehearse:
        return 10.0
    return (70 if name == TORCH else 40 if ", scanned" in name else 60) * (1.4 if shape == "llama-1b" else 1.0)


def step(bench: Bench, shape: str, ours: list[str], put: Put) -> dict[str, Any]:
    race = Race(bench, shape, put)
    race.save()
    race.run(ours)
    return {}


def alone(bench: Bench, shape: str, name: str, before: dict[str, Any], put: Put) -> dict[str, Any]:
    """One more of our ways, at the batch of those before."""
    race = Race(bench, shape, put)
    race.batch = min((r["batch"] for r in before.get("rows", {}).values() if "batch" in r), default=race.batch)
    race.attempt(name, race.start(name))
    return {}


def largest(bench: Bench, shape: str, before: dict[str, Any], put: Put) -> dict[str, Any]:
    """As many rows as fit, each side alone: by what each took before."""
    race = Race(bench, shape, put)
    done = {n: r for n, r in before.get("rows", {}).items() if samples(r) and r["batch"]}
    mine = min((n for n in done if n in OURS), key=lambda n: statistics.median(samples(done[n])), default=None)
    if not done:
        raise TooLittleTime("the largest batch is reckoned from a measured one, and there is none")
    for name in [mine, TORCH]:
        if name not in done or (name == TORCH and not Path(race.file).exists()):
            continue
        memory = done[name]["memory"]
        used = memory.get("peak") if name == TORCH else memory["compiled"]
        room = (0.95 if name == TORCH else 0.97 * FILLED) * bench.memory
        race.batch = fitting(memory["batch"], memory["state"], used, room) if used else 2 * memory["batch"]
        label = f"{name}, largest batch"
        if race.batch <= memory["batch"]:
            race.rows[label] = {"skipped": f"{memory['batch']} rows, measured above, are the most that fit"}
            bench.say(f"{label}: {race.rows[label]['skipped']}")
            race.save()
            continue
        race.attempt(name, race.start(name), label)
    return {}


# ---------------------------------------------------------------------------------------------------------- the tests


def tests(bench: Bench) -> dict[str, Any]:
    """Those that need a GPU, from the files that hold any: others may import what is not installed here."""
    files = [f for f in sorted((ROOT / "tests").rglob("test_*.py")) if re.search(r"mark\.gpu\b", f.read_text())]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"JAX_PLATFORMS": "cpu" if bench.rehearse else "cuda,cpu", "PYTHONPATH": path}
    env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(bench.folder / "jax")}
    # An option on the command line overrides pyproject.toml's `-m "not slow"`; warnings of plugins fail no test here.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-W", "default", "-p", "no:cacheprovider"]
    allowed = bench.clock.within()
    process = subprocess.Popen([*command, *map(str, files)], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)  # fmt: skip
    try:
        text, cut = process.communicate(timeout=allowed)[0], False
    except subprocess.TimeoutExpired:
        process.kill()
        text, cut = process.communicate()[0], True
    finally:
        process.kill()
    words = ("PASSED", "FAILED", "ERROR", "SKIPPED")
    counts = {w.lower(): len(re.findall(rf"::\S.* {w}\b.*\[ *\d+%\]$", text, re.M)) for w in words}
    result = counts | {"files": [f.name for f in files], "status": process.returncode, "end": text.split("\n")[-25:]}
    if cut:
        raise TimeoutError(f"the tests took more than the {allowed:.0f} s that were left; so far {counts}")
    if not sum(counts.values()):
        raise RuntimeError(text.strip()[-2000:])
    return result
