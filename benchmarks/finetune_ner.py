"""Named entities of CoNLL-2003: `jaxlm train configs/ner.py` beside Hugging Face's Trainer, from the same weights.

    python benchmarks/finetune_ner.py MODEL_DIR --data CONLL_DIR --torch-python TORCH_VENV/bin/python

MODEL_DIR is a Hugging Face directory, CONLL_DIR holds train.txt, valid.txt and test.txt. Both sides: three epochs of 32
sentences, AdamW at 5e-5 falling to 0, no decay, clipping at 1, at most 128 tokens, float32; the epoch with the best
validation F1 is kept. Every seed trains ours, then theirs, each in a process of its own under the allocator settings of
the command line; both test predictions are scored by the same function (seqeval, strict, IOB2). Every finished run
is saved at once, and the same command goes on with those that are missing.

Exit status 1 if the mean F1 of ours is below theirs by more than 0.3 points.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from worker import HERE, launcher_environment, machine, save, table

from jaxlm.data.labelled import conll
from jaxlm.evaluation import metrics

ROOT = HERE.parent
ALLOWED = 0.003
RECIPE = {"epochs": 3, "batch": 32, "lr": 5e-5, "longest": 128}
PARTS = ("train", "valid", "test")


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--torch-python", required=True, help="a Python that has torch, transformers, accelerate, seqeval")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--limit", type=int, help="only so many sentences of each file, to try the script")
    p.add_argument("--save", default="finetune_ner", help="name under results/ (- : don't save)")
    return p.parse_args()


def lay_out(a: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, int]]:
    """(where the data lie, sentences of each part); a part of each file with --limit."""
    counts = {part: len(conll.read(str(a.data / f"{part}.txt")).examples) for part in PARTS}
    if not a.limit:
        return a.data.resolve(), counts
    for part in PARTS:
        blocks = (a.data / f"{part}.txt").read_text("utf-8").split("\n\n")
        blocks = [block for block in blocks if not block.lstrip().startswith("-DOCSTART-")][: a.limit]
        (folder / f"{part}.txt").write_text("\n\n".join(blocks) + "\n", "utf-8")
    return folder, {part: min(n, a.limit) for part, n in counts.items()}


def timed(command: list[str], a: argparse.Namespace, env: dict[str, str]) -> tuple[dict[str, float], str]:
    """(wall and CPU seconds, start-up and all; what it printed)."""
    cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))[: a.threads]))
    full = os.environ | {"OMP_NUM_THREADS": str(a.threads), "HF_HUB_OFFLINE": "1"} | launcher_environment() | env
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # noqa: E731
    before, started = used(), time.perf_counter()
    done = subprocess.run(["taskset", "-c", cpus, *command], env=full, text=True, capture_output=True)
    times = {"wall_s": time.perf_counter() - started, "cpu_s": used() - before}
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return times, done.stdout


def judged(true: list[list[str]], found: list[list[str]]) -> dict[str, float]:
    """Of test predictions: seqeval's strict figures, and what its lenient default, which most scripts print, says."""
    from seqeval.metrics import accuracy_score, f1_score

    values, _ = metrics.entities(true, found)
    return values | {"f1_lenient": float(f1_score(true, found)), "word_accuracy": float(accuracy_score(true, found))}


def ours(a: argparse.Namespace, data: Path, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    env, run = {"PYTHONPATH": str(ROOT)}, folder / "ner"
    jaxlm = [sys.executable, "-m", "jaxlm"]
    short = [f"--train.{name}={n}" for name, n in
             (("steps", steps * RECIPE["epochs"]), ("eval-every", steps), ("save-every", steps))]  # fmt: skip
    train = [*jaxlm, "train", str(ROOT / "configs" / "ner.py"), "--start", str(a.model.resolve()),
             "--data.train", str(data / "train.txt"), "--data.valid", str(data / "valid.txt"),
             "--seed", str(seed), "--out", str(folder), *(short if a.limit else [])]  # fmt: skip
    times, _ = timed(train, a, env)
    check(json.loads((run / "config.json").read_text()), steps)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    valid = [line for line in lines if line["kind"] == "valid"]
    scoring, report = timed([*jaxlm, "eval", str(run), "--data", str(data / "test.txt"), "--out", str(folder / "eval")],
                            a, env)  # fmt: skip
    print(report, flush=True)
    rows = [json.loads(line) for file in sorted((folder / "eval").glob("*.jsonl")) for line in file.open()]
    return {
        "training": times | {"validations": len(valid), "validation_s": sum(line["time"]["seconds"] for line in valid)},
        "scoring": scoring,
        "valid_f1": [line["f1"] for line in valid if line["step"]],
        "loss": [[line["step"], line["loss"]] for line in lines if line["kind"] == "train" and line["step"] % 50 == 0],
        "predictions": {"true": [row["true"] for row in rows], "found": [row["found"] for row in rows]},
    }


def check(run: dict, steps: int) -> None:
    """That the config is the recipe, and an epoch of it one of these data."""
    t, o = run["train"], run["optim"]
    mine = {"epochs": t["steps"] / steps, "batch": t["batch_size"], "lr": o["lr"], "longest": t["seq_len"]}
    rest = [o[k] for k in ("name", "schedule", "warmup", "final", "weight_decay", "clip", "beta1", "beta2", "eps")]
    usual = ["adamw", "linear", 0, 0.0, 0.0, 1.0, 0.9, 0.999, 1e-8]
    if mine != RECIPE or rest != usual or t["eval_every"] != steps or run["execution"]["dtype"] != "float32":
        raise SystemExit(f"the config is not the recipe: {mine}, {rest}, where {RECIPE}, {usual} are")


def theirs(a: argparse.Namespace, data: Path, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    given = RECIPE | {"model": str(a.model.resolve()), "data": str(data), "folder": str(folder), "seed": seed,
                      "threads": a.threads}  # fmt: skip
    call = lambda do: [a.torch_python, str(HERE / "finetune_ner_torch.py"), json.dumps(given | {"do": do})]  # noqa: E731
    times, _ = timed(call("train"), a, {"PYTHONPATH": ""})
    told = json.loads((folder / "told.json").read_text())
    if told["steps"] != steps * RECIPE["epochs"]:
        raise SystemExit(f"theirs took {told['steps']} steps of {steps * RECIPE['epochs']}")
    scoring, _ = timed(call("predict"), a, {"PYTHONPATH": ""})
    validations = {"validations": len(told["valid_f1"]), "validation_s": told["validation_s"]}
    return {
        "training": times | validations,
        "scoring": scoring,
        **{key: told[key] for key in ("valid_f1", "loss", "about")},
        "predictions": json.loads((folder / "predictions.json").read_text()),
    }


SIDES = {"jaxlm": ours, "Hugging Face": theirs}


def summary(runs: list[dict]) -> tuple[str, list[dict], dict[str, float]]:
    """(table, the same as rows, verdict where both sides have a run)."""
    header = ["", "test F1", "precision", "recall", "F1 lenient", "valid F1", "train s", "without validation",
              "train CPU s", "scoring s", "scoring CPU s"]  # fmt: skip
    rows, mean = [], {}
    line = lambda r: [  # noqa: E731
        *[100 * r["test"][k] for k in ("f1", "precision", "recall", "f1_lenient")], 100 * max(r["valid_f1"]),
        r["training"]["wall_s"], r["training"]["wall_s"] - r["training"]["validation_s"], r["training"]["cpu_s"],
        r["scoring"]["wall_s"], r["scoring"]["cpu_s"],
    ]  # fmt: skip
    for side in SIDES:
        found = sorted((r for r in runs if r["side"] == side), key=lambda r: r["seed"])
        rows += [[f"{side}, seed {r['seed']}", *line(r)] for r in found]
        if found:
            mean[side] = [statistics.mean(column) for column in zip(*map(line, found), strict=True)]
            rows.append([f"{side}, mean", *mean[side]])
    shown = [[f"{c:.2f}" if 0 < i < 6 else f"{c:.0f}" if i else c for i, c in enumerate(row)] for row in rows]
    verdict = {}
    if len(mean) == 2:
        us, them = mean.values()
        verdict = {"f1_points": us[0] - them[0], "train_time": us[5] / them[5],
                   "train_time_without_validation": us[6] / them[6], "train_cpu": us[7] / them[7]}  # fmt: skip
    return table(shown, header), [dict(zip(["row", *header[1:]], row, strict=True)) for row in rows], verdict


def main() -> None:
    a = arguments()
    file = HERE / "results" / f"{a.save}.json"
    with tempfile.TemporaryDirectory() as made:
        data, counts = lay_out(a, Path(made))
        steps = -(-counts["train"] // RECIPE["batch"])
        weights = hashlib.sha256((a.model / "model.safetensors").read_bytes()).hexdigest()[:16]
        settings = RECIPE | {"weights": weights, "sentences": counts, "threads": a.threads}
        result: dict[str, Any] = {
            "what": "CoNLL-2003 entities, from the same weights: F1 of the test part by seqeval (strict, IOB2), and "
                    "seconds of whole commands, start-up, compilation, validations and checkpoints included",
            "machine": machine(), "settings": settings, "runs": [],
        }  # fmt: skip
        if a.save != "-" and file.exists():
            held = json.loads(file.read_text())
            if held["settings"] != settings:
                raise SystemExit(f"{file.name} holds runs by other settings; choose another --save")
            result = held
        for seed in a.seeds:
            for side, train in SIDES.items():
                if any((r["side"], r["seed"]) == (side, seed) for r in result["runs"]):
                    continue
                before = {"load": os.getloadavg()[0], "nice": os.nice(0)}
                with tempfile.TemporaryDirectory() as folder:
                    found = train(a, data, steps, seed, Path(folder))
                told = found.pop("predictions")
                true = [list(e.tags) for e in conll.read(str(data / "test.txt")).examples]
                if told["true"] != true:
                    raise SystemExit(f"{side} was scored on other tags than the file's")
                test = judged(true, told["found"])
                result["runs"].append(
                    {"side": side, "seed": seed, "before": before, "nice_after": os.nice(0), "test": test} | found
                )
                shown, result["table"], result["verdict"] = summary(result["runs"])
                print(shown, flush=True)
                if a.save != "-":
                    save(a.save, result)
    shown, _, verdict = summary(result["runs"])
    print(shown)
    below = verdict["f1_points"] < -100 * ALLOWED
    print(
        f"ours {verdict['f1_points']:+.2f} points of F1 (allowed {-100 * ALLOWED:+.1f}): {'short' if below else 'met'}"
    )
    print(*[f"{name} {value:.2f} of theirs" for name, value in list(verdict.items())[1:]], sep=", ")
    sys.exit(below)


if __name__ == "__main__":
    main()
