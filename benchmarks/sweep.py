"""A sweep of the NER config on a part of CoNLL-2003, killed twice, beside the same sweep that nobody disturbed.

    python benchmarks/sweep.py MODEL_DIR --data CONLL_DIR

MODEL_DIR is a Hugging Face directory of an encoder, CONLL_DIR holds train.txt and valid.txt. Trials are short: the
encoder's first two layers with its embeddings frozen, 24 updates of 16 sentences out of 1,200, scored by F1 on 100
others. TPE searches the learning rate and how it falls from layer to layer, and trials that are worse than the median
of those before them are stopped. The killed sweep gets SIGKILL twice, each time while a trial is at work, and the same
command goes on. Then a grid of three trials trains the config's own rate and its neighbours, half and double, as long.
The same command goes on with what is not done yet.

Exit status 1 if the trials of both sweeps differ in anything (settings, values to the last digit, where they were
stopped), if no trial was stopped early, or if the best rate is no better than the config's own and its neighbours.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from worker import HERE, launcher_environment, machine, save, table

ROOT = HERE.parent
SENTENCES = {"train": 1200, "valid": 100}
SETTINGS = {
    "train.steps": 24, "train.batch_size": 16, "train.seq_len": 32, "train.eval_every": 8, "train.save_every": 12,
    "train.keep": 1, "train.use": "last", "optim.freeze": "^embed$",
}  # fmt: skip
SPACE = ("optim.lr=log(1e-5,1e-2)", "optim.layer_decay=uniform(0.5,1.0)")
OWN = 5e-5
NEIGHBOURS = f"optim.lr={OWN / 2:g}|{OWN:g}|{OWN * 2:g}"
KILLS = (0.25, 0.6)
"""Shares of the trials after which the process is killed."""


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--work", type=Path, required=True, help="a folder for data and sweeps; it is kept")
    p.add_argument("--trials", type=int, default=20)
    p.add_argument("--save", default="sweep", help="name under results/ (- : don't save)")
    return p.parse_args()


def lay_out(a: argparse.Namespace) -> None:
    """Writes the first sentences of each file that are no headings."""
    a.work.mkdir(parents=True, exist_ok=True)
    for part, count in SENTENCES.items():
        blocks = (a.data / f"{part}.txt").read_text("utf-8").split("\n\n")
        blocks = [block for block in blocks if block.strip() and not block.lstrip().startswith("-DOCSTART-")][:count]
        (a.work / f"{part}.txt").write_text("\n\n".join(blocks) + "\n", "utf-8")


def command(a: argparse.Namespace, name: str, space: tuple[str, ...], *more: str) -> list[str]:
    fields = SETTINGS | {"data.train": a.work / "train.txt", "data.valid": a.work / "valid.txt", "name": name,
                         "out": a.work / "sweeps", "data.cache": a.work / "cache"}  # fmt: skip
    words = [x for key, value in fields.items() for x in (f"--{key}", str(value))]
    spaces = [x for text in space for x in ("--space", text)]
    return [sys.executable, "-m", "jaxlm", "sweep", str(ROOT / "configs" / "ner.py"), "--start",
            str(a.model.resolve()), "--start-layers", "0", "1", *words, *spaces, *more]  # fmt: skip


def start(words: list[str], log: Path) -> subprocess.Popen:
    env = os.environ | launcher_environment() | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with log.open("ab") as out:
        return subprocess.Popen(words, env=env, stdout=out, stderr=out, cwd=ROOT)


def ended(folder: Path) -> int:
    """Returns how many trials have ended."""
    file = folder / "results.json"
    counts = json.loads(file.read_text())["counts"] if file.exists() else {}
    return sum(counts.get(state, 0) for state in ("complete", "pruned", "failed"))


def killed(a: argparse.Namespace, words: list[str], folder: Path, told: list[dict]) -> None:
    """Runs a sweep, and kills it whenever a share of its trials has ended and the next has taken some steps."""
    for share in KILLS[len(told) :]:
        process = start(words, a.work / f"{folder.name}.log")
        while not ((now := under_way(folder)) and ended(folder) >= share * a.trials):
            if process.poll() is not None:
                raise SystemExit(f"the sweep ended before it was killed: {a.work / folder.name}.log")
            time.sleep(0.5)
        number, step = now
        process.send_signal(signal.SIGKILL)
        process.wait()
        told.append({"ended": ended(folder), "trial": number, "step": step})
        (a.work / "kills.json").write_text(json.dumps(told))
        print(f"killed while trial {number} was after step {step}", flush=True)
    finish(a, words, folder)


def under_way(folder: Path) -> tuple[int, int] | None:
    """Returns the newest trial and the step of its last validation, if it is between its first and its last."""
    for trial in sorted((folder / "trials").glob("*"), reverse=True)[:1]:
        file = trial / "seed-0" / "metrics.jsonl"
        lines = [json.loads(x) for x in file.read_text().split("\n")[:-1]] if file.exists() else []
        steps = [line["step"] for line in lines if line["kind"] == "valid"]
        if steps and 0 < steps[-1] < SETTINGS["train.steps"]:
            return int(trial.name), steps[-1]
    return None


def finish(a: argparse.Namespace, words: list[str], folder: Path) -> None:
    log = a.work / f"{folder.name}.log"
    if status := start(words, log).wait():
        raise SystemExit(f"{' '.join(words)} ended with status {status}: {log.read_text()[-3000:]}")


def comparable(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the trials without what depends on the clock."""
    return [{key: value for key, value in trial.items() if key != "seconds"} for trial in results["trials"]]


def main() -> None:
    a = arguments()
    lay_out(a)
    sweeps, found = a.work / "sweeps", {}
    kills = json.loads((a.work / "kills.json").read_text()) if (a.work / "kills.json").exists() else []
    for name, space, more in (
        ("killed", SPACE, ("--trials", str(a.trials))),
        ("neighbours", (NEIGHBOURS,), ("--sampler", "grid", "--pruner", "none")),
        ("undisturbed", SPACE, ("--trials", str(a.trials))),
    ):
        words, folder = command(a, name, space, *more), sweeps / name
        if ended(folder) < (a.trials if space is SPACE else 3):
            if name == "killed":
                killed(a, words, folder, kills)
            else:
                finish(a, words, folder)
        found[name] = json.loads((folder / "results.json").read_text())
        counts = ", ".join(f"{count} {state}" for state, count in found[name]["counts"].items() if count)
        print(f"{name}: {counts}", flush=True)
    one, other = (comparable(found[name]) for name in ("killed", "undisturbed"))
    best = found["killed"]["trials"][found["killed"]["best"]]
    near = [(t["params"]["optim.lr"], t["value"]) for t in found["neighbours"]["trials"]]
    verdict = {
        "same_trials": one == other, "kills": kills, "counts": found["killed"]["counts"], "best": best,
        "neighbours": dict(near), "gain_f1_points": 100 * (best["value"] - max(value for _, value in near)),
        "trial_seconds": {
            name: [t["seconds"] for t in found[name]["trials"]] for name in ("killed", "undisturbed")
        },
    }  # fmt: skip
    rows = [[str(t["number"]), t["state"], f"{t['params']['optim.lr']:.2e}", f"{t['params']['optim.layer_decay']:.3f}",
             "" if t["value"] is None else f"{100 * t['value']:.2f}"] for t in found["killed"]["trials"]]  # fmt: skip
    print(table(rows, ["trial", "state", "rate", "layer decay", "F1"]))
    print(*[f"rate {lr:g}: F1 {100 * value:.2f}" for lr, value in near], sep="\n")
    print(f"best: trial {best['number']}, F1 {100 * best['value']:.2f}, {verdict['gain_f1_points']:+.2f} points beyond "
          f"the config's own rate and its neighbours; same trials: {one == other}")  # fmt: skip
    if a.save != "-":
        save(a.save, {
            "what": "a sweep of configs/ner.py on a part of CoNLL-2003, killed twice and resumed, beside the same "
                    "undisturbed, and the config's own rate with its neighbours",
            "machine": machine(), "settings": SETTINGS | {"sentences": SENTENCES, "space": SPACE, "trials": a.trials},
            "verdict": verdict, "trials": one,
        })  # fmt: skip
    sys.exit(not (one == other and verdict["counts"]["pruned"] and verdict["gain_f1_points"] > 0))


if __name__ == "__main__":
    main()
