"""Kill training with SIGKILL at random moments until it is done, and compare with a run that nobody disturbed.

    python benchmarks/kill_resume.py --kills 20

Moments are uniform over the time that a whole run takes: start-up, steps, validation, samples and saves are all hit.
Each disturbed run is resumed by the very same command. Then every line of metrics.jsonl (less "time") and every array
of the last checkpoint must equal the undisturbed run's, bit for bit. Exit status 1 at any difference.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from worker import machine, save, table

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "train.steps": 60,
    "train.seq_len": 128,
    "train.batch_size": 24,
    "train.eval_every": 15,
    "train.eval_batches": 2,
    "train.save_every": 5,
    "train.log_every": 1,
    "train.sample_every": 20,
    "train.keep": 3,
    "train.sample_tokens": 16,
    "optim.ema": 0.99,
    "data.workers": 0,
}


def command(source: Path, out: Path, cache: Path) -> list[str]:
    overrides = SETTINGS | {"out": out, "data.cache": cache}
    words = [x for k, v in overrides.items() for x in (f"--{k}", str(v))]
    return [sys.executable, "-m", "jaxlm", "train", str(source / "configs" / "tiny_llama.py"), *words]


def environment(source: Path, cache: Path) -> dict[str, str]:
    """With compiled programs kept on disk, a restart takes seconds."""
    keep = {"JAX_COMPILATION_CACHE_DIR": str(cache / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | keep | {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "PYTHONPATH": str(source)}


def launch(out: Path, cache: Path, log: Any) -> subprocess.Popen:
    """From the copy of the source beside `cache`: somebody may edit the original during these minutes."""
    source = cache.parent / "source"
    words, env = command(source, out, cache), environment(source, cache)
    return subprocess.Popen(words, env=env, cwd=source, stdout=log, stderr=subprocess.STDOUT)


def phase(run: Path, since: float) -> str:
    """What the process that ran `since` (a time of the clock) was at when it was killed, as far as its files tell."""
    if any(p.stat().st_mtime > since for p in run.glob("checkpoints/*tmp*")):
        return "saving"
    metrics = run / "metrics.jsonl"
    lines = [json.loads(x) for x in metrics.read_text().split("\n")[:-1]] if metrics.exists() else []
    new = [line for line in lines if line.get("time", {}).get("unix", 0) > since]
    kind = new[-1].get("name", new[-1]["kind"]) if new else "nothing yet"
    return {"train": "stepping", "valid": "validating or saving", "end": "finishing", "compiled": "start-up"}.get(
        kind, "start-up" if kind == "nothing yet" else "sampling or compiling"
    )


def progress(run: Path) -> tuple[int, int]:
    """(last step logged, newest checkpoint)."""
    path = run / "metrics.jsonl"
    lines = [json.loads(x)["step"] for x in path.read_text().split("\n")[:-1]] if path.exists() else []
    steps = [int(p.name.split("-")[1]) for p in run.glob("checkpoints/checkpoint-*") if p.name.split("-")[1].isdigit()]
    return max(lines, default=0), max(steps, default=0)


def disturbed(out: Path, cache: Path, seconds: float, most: int, rng: random.Random) -> list[dict]:
    """Kill and resume until the run ends by itself; at most `most` kills. One entry a process."""
    run = out / "tiny_llama"
    legs: list[dict[str, Any]] = []
    while True:
        with open(out.parent / f"{out.name}.log", "a") as log:
            process = launch(out, cache, log)
            asked = rng.uniform(0, seconds) if sum(leg["killed"] for leg in legs) < most else 600
            began, started = time.time(), time.perf_counter()
            try:
                status = process.wait(asked)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = None
        logged, saved = progress(run)
        legs.append({"killed": status is None, "after_s": round(time.perf_counter() - started, 2), "logged": logged,
                     "saved": saved, "phase": phase(run, began) if status is None else f"exit {status}"})  # fmt: skip
        if status is not None:
            if status:
                text = (out.parent / f"{out.name}.log").read_text()
                print(f"a resumed run failed with status {status}:\n{text[-2000:]}")
            return legs


def lines_of(run: Path) -> list[str]:
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in line.items() if k != "time"}, sort_keys=True) for line in lines]


def arrays_of(run: Path) -> dict[str, bytes]:
    """Every array of the last checkpoint, by path."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    folder = run / "checkpoints" / f"checkpoint-{progress(run)[1]}"
    out = {"": folder.name.encode()}
    for item in sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in ("meta", "metrics")):
        for path, leaf in jax.tree_util.tree_leaves_with_path(ocp.StandardCheckpointer().restore(item)):
            value = np.asarray(leaf)
            out[item.name + jax.tree_util.keystr(path)] = str((value.dtype, value.shape)).encode() + value.tobytes()
    return out


def differences(reference: Path, run: Path) -> list[str]:
    found, a, b = [], lines_of(reference), lines_of(run)
    extra, missing = list((Counter(b) - Counter(a)).elements()), list((Counter(a) - Counter(b)).elements())
    found += [f"line too many: {x[:150]}" for x in extra] + [f"line missing: {x[:150]}" for x in missing]
    if not found and a != b:
        found.append("the lines of metrics.jsonl are the same but in another order")
    x, y = arrays_of(reference), arrays_of(run)
    return found + [f"array differs: {k}" for k in sorted(x.keys() | y.keys()) if x.get(k) != y.get(k)]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=20, help="at least so many in all")
    p.add_argument("--most", type=int, default=6, help="kills of one run, after which it is left to finish")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--save", default="kill_resume", help="name under results/; - : don't save")
    p.add_argument("--keep", type=Path, help="work in this folder and leave it there")
    a = p.parse_args()
    rng, host = random.Random(a.seed), machine()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        cache = folder / "cache"
        for part in ("jaxlm", "configs"):
            shutil.copytree(ROOT / part, folder / "source" / part)
        for name in ("warm", "reference"):  # the first fills the caches, the second says how long a run takes
            started = time.perf_counter()
            with open(folder / f"{name}.log", "w") as log:
                if launch(folder / name, cache, log).wait():
                    print((folder / f"{name}.log").read_text()[-2000:])
                    return 1
            seconds = time.perf_counter() - started
        reference = folder / "reference" / "tiny_llama"
        found = differences(folder / "warm" / "tiny_llama", reference)
        print(f"a whole run takes {seconds:.1f} s; twice the same: {'yes' if not found else found[:5]}", flush=True)
        runs.append({"run": "undisturbed, again", "differences": found})
        while (kills := sum(leg["killed"] for r in runs for leg in r.get("legs", ()))) < a.kills:
            out = folder / f"run-{len(runs)}"
            legs = disturbed(out, cache, seconds, min(a.most, a.kills - kills), rng)
            fine = legs[-1]["phase"] == "exit 0"
            found = differences(reference, out / "tiny_llama") if fine else [f"it failed: {legs[-1]['phase']}"]
            runs.append({"run": out.name, "legs": legs, "differences": found})
            for leg in legs:
                print(f"  {out.name}: {leg}")
            print(f"{out.name}: {'bit for bit the same' if not found else found[:8]}", flush=True)
    phases = Counter(leg["phase"] for r in runs for leg in r.get("legs", ()) if leg["killed"])
    print(table([[k, v] for k, v in phases.most_common()], ["killed while", "times"]))
    bad = sum(bool(r["differences"]) for r in runs)
    print(f"{sum(phases.values())} kills in {len(runs) - 1} runs; runs that differ: {bad}")
    if a.save != "-":
        settings = SETTINGS | {"seed": a.seed, "config": "configs/tiny_llama.py", "whole_run_s": round(seconds, 1)}
        result = {"what": "SIGKILL at uniformly random moments, resumed until done, compared bit for bit"}
        save(a.save, result | {"machine": host, "settings": settings, "kills": phases, "differing": bad, "runs": runs})
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
