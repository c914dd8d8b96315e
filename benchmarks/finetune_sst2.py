"""Sentiment of sentences (SST-2): `jaxlm train configs/sst2.py` beside Hugging Face's Trainer, from the same weights.

    python benchmarks/finetune_sst2.py MODEL_DIR --data SST2_DIR --torch-python TORCH_VENV/bin/python

MODEL_DIR is a Hugging Face directory, SST2_DIR holds GLUE's train.tsv and dev.tsv. Both sides: the first --examples
texts of the training file, --steps updates of 32 of them, AdamW at 1e-4 falling to 0, clipping at 1, at most 48 tokens,
float32, and one validation on dev.tsv at the end. The Trainer pads each batch to its longest text. The sides take
turns, each in a process of its own under the allocator settings of the command line.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from finetune_ner import ROOT, timed
from worker import HERE, machine, save, table

RECIPE = {"batch": 32, "lr": 1e-4, "longest": 48}


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--torch-python", required=True, help="a Python that has torch, transformers and accelerate")
    p.add_argument("--examples", type=int, default=9600)
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--save", default="finetune_sst2", help="name under results/ (- : don't save)")
    return p.parse_args()


def ours(a: argparse.Namespace, train: Path, seed: int, folder: Path) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "jaxlm", "train", str(ROOT / "configs" / "sst2.py"), "--start", str(a.model.resolve()),
        "--data.train", str(train), "--data.valid", str((a.data / "dev.tsv").resolve()), "--out", str(folder),
        "--seed", str(seed), "--train.steps", str(a.steps), "--train.batch-size", str(RECIPE["batch"]),
        "--train.seq-len", str(RECIPE["longest"]), "--optim.lr", str(RECIPE["lr"]), "--train.eval-every", "0",
        "--train.save-every", "0", "--train.use", "last",
    ]  # fmt: skip
    times, _ = timed(command, a, {"PYTHONPATH": str(ROOT)})
    lines = [json.loads(line) for line in (folder / "sst2" / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [line["time"]["step_s"] for line in lines if line["kind"] == "train"]
    accuracy = [line["accuracy"] for line in lines if line["kind"] == "valid"][-1]
    return times | {"accuracy": accuracy, "step_s": statistics.median(steps)}


def theirs(a: argparse.Namespace, train: Path, seed: int, folder: Path) -> dict[str, Any]:
    valid = str((a.data / "dev.tsv").resolve())
    given = RECIPE | {"model": str(a.model.resolve()), "train": str(train), "valid": valid, "folder": str(folder),
                      "seed": seed, "steps": a.steps, "threads": a.threads}  # fmt: skip
    times, _ = timed([a.torch_python, str(HERE / "finetune_sst2_torch.py"), json.dumps(given)], a, {"PYTHONPATH": ""})
    told: dict[str, Any] = json.loads((folder / "told.json").read_text("utf-8"))
    return times | told


SIDES = {"jaxlm": ours, "Hugging Face": theirs}


def main() -> None:
    a = arguments()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as made:
        train = Path(made) / "train.tsv"
        lines = (a.data / "train.tsv").read_text("utf-8").splitlines(keepends=True)
        train.write_text("".join(lines[: 1 + a.examples]), "utf-8")
        for seed in a.seeds:
            for side, run in SIDES.items():
                with tempfile.TemporaryDirectory() as folder:
                    found.append({"side": side, "seed": seed} | run(a, train, seed, Path(folder)))
                print(found[-1], flush=True)
    mean = {side: {key: statistics.mean(r[key] for r in found if r["side"] == side)
                   for key in ("wall_s", "cpu_s", "step_s", "accuracy")} for side in SIDES}  # fmt: skip
    rows = [[side, 100 * m["accuracy"], m["wall_s"], m["cpu_s"], m["step_s"]] for side, m in mean.items()]
    print(table(rows, ["", "accuracy", "s of the command", "CPU s", "s a step"]))
    ratios = {key: mean["Hugging Face"][key] / mean["jaxlm"][key] for key in ("wall_s", "cpu_s", "step_s")}
    print("theirs over ours:", {key: round(x, 2) for key, x in ratios.items()})
    if a.save != "-":
        settings = RECIPE | {"examples": a.examples, "steps": a.steps, "threads": a.threads}
        save(a.save, {"machine": machine(), "settings": settings, "runs": found, "mean": mean, "ratios": ratios})


if __name__ == "__main__":
    main()
