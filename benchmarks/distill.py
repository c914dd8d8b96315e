"""A 3-layer student of a fine-tuned 6-layer MiniLM on phrases of SST-2, with the teacher and without it.

    python benchmarks/distill.py MODEL_DIR --data SST2_DIR --work FOLDER
    python benchmarks/distill.py MODEL_DIR … --student model --steps 480 --unlabelled 15360 --save distill_pretrained

MODEL_DIR is all-MiniLM-L6-v2 as a Hugging Face directory; SST2_DIR holds GLUE's train.tsv and dev.tsv. The data are
phrases of 4 to 12 words, so that the whole takes less than an hour on two busy cores: 6,400 to train the teacher on,
1,920 of them for the students, 320 to validate and 1,500 to test on, none of which stands in the training file. The
teacher trains 200 steps of 32 phrases. All students are its layers 1, 3 and 5 with its head, or with `--student model`
those layers of MODEL_DIR with a new head, and train `--steps` steps of 32 phrases at the same rate: on the labels; on
half the labels' loss and the teacher's logits (T = 2), which are cached on disk; on these and the hidden states of the
three layers; or on the teacher's logits alone, of 7,680 other phrases that nobody labelled (0 and 1 in turn stand where
labels would be, and are not learned from). Every finished run is saved at once, and the same command goes on.

Exit status 1 if the best of the taught students is on the mean of all seeds below 97 % of the teacher's accuracy, or
not above the untaught one.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from worker import HERE, launcher_environment, machine, save, table

ROOT = HERE.parent
SHARE = 0.97
LAYERS = ("1", "3", "5")
LOGITS = ("--distill.labels", "0.5")
STATES = ("--distill.losses", "logits", "hidden", "--distill.hidden.layers", "0=1", "1=3", "2=5")
ARMS = {
    "labels": (),
    "teacher": LOGITS,
    "teacher and states": (*LOGITS, *STATES),
    "teacher, unlabelled": ("--distill.labels", "0"),
}


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--work", type=Path, required=True, help="a folder for the runs, which is kept")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=240)
    p.add_argument(
        "--student", choices=("teacher", "model"), default="teacher", help="whose layers students begin with"
    )
    p.add_argument("--unlabelled", type=int, default=7680, help="phrases that nobody labelled")
    p.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    p.add_argument("--save", default="distill", help="name under results/ (- : don't save)")
    return p.parse_args()


def lay_out(a: argparse.Namespace) -> dict[str, int]:
    """Writes the phrases, and returns how many each file has."""

    def phrases(name: str) -> list[str]:
        lines = (a.data / name).read_text("utf-8").splitlines()[1:]
        return [line for line in lines if 4 <= len(line.split("\t")[0].split()) <= 12]

    rng = random.Random(0)
    train, held = phrases("train.tsv"), phrases("dev.tsv")
    rng.shuffle(train)
    rng.shuffle(held)
    seen = {line.split("\t")[0].strip() for line in train}
    held = [line for line in held if line.split("\t")[0].strip() not in seen]
    unlabelled = [
        "\t".join((line.split("\t")[0], str(i % 2))) for i, line in enumerate(train[6400 : 6400 + a.unlabelled])
    ]
    parts = dict(train=train[:6400], student=train[:1920], unlabelled=unlabelled, valid=held[:320], test=held[320:1820])
    a.work.mkdir(parents=True, exist_ok=True)
    for name, lines in parts.items():
        (a.work / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(f"{line}\n" for line in lines), "utf-8")
    return {name: len(lines) for name, lines in parts.items()}


def train(a: argparse.Namespace, name: str, start: Path, part: str, steps: int, *more: str) -> dict[str, Any]:
    """Trains a run, and returns its test accuracy with the interval, and the seconds of its steps."""
    env = os.environ | launcher_environment() | {"PYTHONPATH": str(ROOT)}
    command = [
        sys.executable, "-m", "jaxlm", "train", "sst2", "--name", name, "--out", str(a.work / "runs"),
        "--start", str(start.resolve()), "--data.train", str(a.work / f"{part}.tsv"),
        "--data.valid", str(a.work / "valid.tsv"), "--data.test", str(a.work / "test.tsv"),
        "--train.steps", str(steps), "--train.seq-len", "16", "--optim.lr", "1e-4", "--optim.warmup", "10",
        "--train.eval-every", "0", "--train.save-every", "50", "--train.use", "last",
        "--optim.freeze", "^(embed|position|type)$", *more,
    ]  # fmt: skip
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in (a.work / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    test = next(line for line in lines if line.get("name") == "test")
    valid = [line["accuracy"] for line in lines if line["kind"] == "valid"]
    return {
        "accuracy": test["figures"]["accuracy"], "interval": test["intervals"]["accuracy"], "valid": valid,
        "parameters": next(line["parameters"] for line in lines if line.get("name") == "model"),
        "step_s": statistics.median(line["time"]["step_s"] for line in lines if line["kind"] == "train"),
    }  # fmt: skip


def summary(found: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """Returns a table, and the verdict as far as runs are there."""
    teacher = found["teacher"]["accuracy"]
    rows = [["teacher, 6 layers", "-", 100 * teacher, 100.0, found["teacher"]["step_s"]]]
    means = {}
    for arm in ARMS:
        runs = sorted((r for r in found["students"] if r["arm"] == arm), key=lambda r: r["seed"])
        rows += [[f"student on {arm}", r["seed"], 100 * r["accuracy"], 100 * r["accuracy"] / teacher, r["step_s"]]
                 for r in runs]  # fmt: skip
        if runs:
            means[arm] = statistics.mean(r["accuracy"] for r in runs)
            rows.append([f"student on {arm}, mean", "", 100 * means[arm], 100 * means[arm] / teacher, ""])
    verdict = {}
    if "labels" in means and len(means) > 1:
        best = max(mean for arm, mean in means.items() if arm != "labels")
        verdict = {"share_of_teacher": best / teacher, "gain": best - means["labels"]}
    return table(rows, ["", "seed", "test accuracy", "% of teacher", "s a step"]), verdict


def main() -> None:
    a = arguments()
    about = {
        "phrases": lay_out(a),
        "steps": a.steps,
        "layers": LAYERS,
        "student": a.student,
        "arms": ARMS,
        "machine": machine(),
    }
    file = HERE / "results" / f"{a.save}.json"
    found = json.loads(file.read_text()) if a.save != "-" and file.is_file() else {}
    if found.get("about", {}).get("steps") != a.steps:
        found = {"about": about, "students": []}
    found["about"] = about

    def keep() -> None:
        text, found["verdict"] = summary(found)
        print(text, flush=True)
        if a.save != "-":
            save(a.save, found)

    if "teacher" not in found:
        found["teacher"] = train(a, "teacher", a.model, "train", 200)
        keep()
    teacher = a.work / "runs" / "teacher"
    for seed in a.seeds:
        for arm in a.arms:
            more = ARMS[arm]
            if any(r["seed"] == seed and r["arm"] == arm for r in found["students"]):
                continue
            taught = ("--distill.teacher", str(teacher)) if more else ()
            cache = ("--distill.cache", str(a.work / "logits")) if more == LOGITS else ()
            name, part = "-".join(arm.replace(",", "").split()), "unlabelled" if "unlabelled" in arm else "student"
            start = teacher if a.student == "teacher" else a.model
            run = train(a, f"{name}{seed}", start, part, a.steps, "--seed", str(seed),
                        "--start-layers", *LAYERS, *more, *taught, *cache)  # fmt: skip
            found["students"].append({"arm": arm, "seed": seed, **run})
            keep()
    verdict = found["verdict"]
    sys.exit(verdict["share_of_teacher"] < SHARE or verdict["gain"] <= 0)


if __name__ == "__main__":
    main()
