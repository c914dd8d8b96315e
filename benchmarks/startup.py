"""How long a user waits: for the first answer of a command, and for the first step of `jaxlm train`.

    python benchmarks/startup.py --parts answers      # help, errors, imports: fresh processes, beside `python -c pass`
    python benchmarks/startup.py --parts validation training --against /a/checkout/of/before

Training starts in fresh processes from four states: `cold` (neither data nor compiled programs are kept), `data` (the
tokenizer and the tokens are), `warm` (programs too), `resumed` (and there is a checkpoint). With `--against` another
checkout takes turns with this one within each round. Beside seconds stand processor seconds, of the process and its
children, which other programs on the machine change less. A validation is timed beside its forward passes alone.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shapes import SHAPES
from worker import HERE, launcher_environment, machine, save, table

ROUNDS = 7
PARTS = ("answers", "validation", "training")
STATES = ("cold", "data", "warm", "resumed")
LAST = ["--train.save_every", "1", "--train.log_every", "1"]
CASES = {
    "python -c pass": ["-c", "pass"],
    "import jaxlm": ["-c", "import jaxlm"],
    "jaxlm --help": ["-m", "jaxlm", "--help"],
    "jaxlm evl": ["-m", "jaxlm", "evl"],
    "jaxlm eval --help": ["-m", "jaxlm", "eval", "--help"],
    "jaxlm train nosuch": ["-m", "jaxlm", "train", "nosuch"],
    "jaxlm train quickstart --help": ["-m", "jaxlm", "train", "quickstart", "--help"],
    "import jax": ["-c", "import jax"],
}


def shape(name: str) -> list[str]:
    """The flags that make a run of one of `SHAPES`, on the standard library."""
    s = SHAPES[name]
    sizes = {k: s[k] for k in ("layers", "width", "heads", "vocab")} | {"positions": s["seq"]}
    train = {"batch_size": s["batch"], "seq_len": s["seq"], "micro_batches": 1, "eval_batches": 8, "steps": 1000}
    flags = [f"--model.{k}={v}" for k, v in sizes.items()] + [f"--train.{k}={v}" for k, v in train.items()]
    return ["gpt2_124m", *flags, f"--execution.dtype={s['dtype']}", "--data.train=stdlib",
            f"--data.tokenizer=sentencepiece:{s['vocab'] - 128}", "--data.workers=0"]  # fmt: skip


CONFIGS = {"quickstart": ["quickstart"], "gpt2-17m": shape("gpt2-17m")}


def run(*arguments: str) -> tuple[float, str]:
    """Returns the seconds of a process of this Python, and what it wrote to its error output."""
    before = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    return time.perf_counter() - before, done.stderr


def slowest(arguments: list[str], count: int = 3) -> str:
    """Returns the packages that take longest to import, by `python -X importtime`, with their milliseconds."""
    rows = re.findall(r"\|\s+(\d+) \|( +)([\w.]+)$", run("-X", "importtime", *arguments)[1], re.MULTILINE)
    top = {name: int(us) / 1000 for us, _, name in rows if "." not in name}
    return ", ".join(f"{name} {ms:.0f} ms" for name, ms in sorted(top.items(), key=lambda row: -row[1])[:count])


def answers() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS):
        for name, arguments in CASES.items():
            seconds[name].append(run(*arguments)[0])
    for name, arguments in CASES.items():
        print(f"{name:32} {statistics.median(seconds[name]):6.2f} s   {slowest(arguments)}")


def asked(tree: Path, out: Path, request: dict[str, Any], **variables: str) -> Any:
    """What `startup_jaxlm.py` answers to a request, of the package in a checkout."""
    out.unlink(missing_ok=True)
    environment = os.environ | launcher_environment() | {"PYTHONPATH": str(tree)} | variables
    command = [sys.executable, str(HERE / "startup_jaxlm.py"), json.dumps(request | {"out": str(out)})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree)
    if not out.exists():
        raise RuntimeError(f"the process has died:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return json.loads(out.read_text())


def start(tree: Path, config: str, folder: Path, programs: Path) -> dict[str, Any]:
    """What one start of a checkout's `jaxlm train` took, to its first step and by parts."""
    arguments = ["train", *CONFIGS[config], "--name", "run", "--out", str(folder), "--data.cache", str(folder / "data")]
    found: dict[str, Any] = asked(
        tree, folder / "out.json", {"started": time.time(), "arguments": [*arguments, *LAST]},
        JAX_COMPILATION_CACHE_DIR=str(programs), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.2",
    )  # fmt: skip
    return found


def validation(trees: dict[str, Path], batches: int, rounds: int) -> dict[str, Any]:
    """The least seconds of a validation and of its forward passes alone, by checkout: clock, process, asking thread."""
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for name, tree in trees.items():
            request = {"batches": batches, "rounds": rounds}
            samples = asked(tree, Path(place) / "out.json", request)
            found[name] = {side: [min(column) for column in zip(*rows, strict=True)] for side, rows in samples.items()}
    rows = [[f"{name}: {side}", *seconds] for name, sides in found.items() for side, seconds in sides.items()]
    print(table(rows, [f"{batches} batches", "clock", "process", "asking thread"]))
    return found


def training(trees: dict[str, Path], configs: list[str], states: list[str], rounds: int) -> dict[str, Any]:
    """The samples of each config, state and checkout."""
    found: dict[str, Any] = {}
    for config in configs:
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as place:
                for state in STATES[: 1 + max(map(STATES.index, states))]:
                    for name, tree in trees.items():
                        folder = Path(place) / name
                        folder.mkdir(exist_ok=True)
                        if state != "resumed":
                            subprocess.run(["rm", "-rf", str(folder / "run")], check=True)
                        programs = folder / ("none" if state == "cold" else "programs")
                        sample = start(tree, config, folder, programs)
                        found.setdefault(config, {}).setdefault(state, {}).setdefault(name, []).append(sample)
                        took = f"{sample['wall']:.1f} s, {sample['processor']:.2f} s of processor"
                        print(
                            f"{config} {state} {name}: {took}, save blocks {sample['save_blocked'][0]:.3f} s",
                            flush=True,
                        )
    return found


def shown(found: dict[str, Any]) -> None:
    """Prints processor seconds by part, the fewest of all rounds."""
    for config, states in found.items():
        for state, trees in states.items():
            best = {name: min(samples, key=lambda s: s["processor"]) for name, samples in trees.items()}
            parts = list(dict.fromkeys(part for sample in best.values() for part in sample["parts"]))
            rows = [[part, *(sample["parts"].get(part, [0, 0])[1] for sample in best.values())] for part in parts]
            for what in ("processor", "wall"):
                rows.append([f"to the first step, {what}", *(sample[what] for sample in best.values())])
            for what in ("trace", "lower", "compile"):
                rows.append([f"programs: {what}, wall", *(
                    sum(p["seconds"] for p in sample["programs"] if p["what"] == what) for sample in best.values()
                )])  # fmt: skip
            print(f"\n{table(rows, [f'{config} {state}, s', *best])}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    p.add_argument("--against", type=Path, help="another checkout, which takes turns with this one")
    p.add_argument("--configs", nargs="+", default=list(CONFIGS), choices=CONFIGS)
    p.add_argument("--states", nargs="+", default=list(STATES), choices=STATES, help="all before the last are made too")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--save", default="startup", help="name under results/; - : don't save")
    a = p.parse_args()
    if "answers" in a.parts:
        answers()
    host, found = machine(), {}
    trees = ({"before": a.against.resolve()} if a.against else {}) | {"now": HERE.parent}
    if "validation" in a.parts:
        found["validation"] = validation(trees, 8, 3 * a.rounds)
    if "training" in a.parts:
        found["training"] = training(trees, a.configs, a.states, a.rounds)
        shown(found["training"])
    if found and a.save != "-":
        about = {
            "versions": {name: version(name) for name in ("jax", "jaxlib", "orbax-checkpoint")}
            | {"python": sys.version.split()[0]}
        }
        what = "start of `jaxlm train` to its first step: seconds and processor seconds, by part and by program"
        save(a.save, {"what": what, "machine": host | about, "settings": {"rounds": a.rounds}, "results": found})


if __name__ == "__main__":
    main()
