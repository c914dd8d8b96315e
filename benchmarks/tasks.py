"""Every task's recipe, from its config to a score on the held-out split beside what needs no model: minutes on a CPU.

    python benchmarks/tasks.py --data ../shared/data --encoder MINILM_DIR --decoder SMOLLM2.gguf [--only sst2,gsm8k]

Each task is a `jaxlm train CONFIG` with the overrides that the config's docstring gives for a CPU, and a `jaxlm eval`,
in a temporary folder that the data's splits are written or linked into. The baseline is what the same metric says of
the commonest label, a fixed span, a copy of the source, the first turns of a dialogue, the commonest answer, a body
that returns nothing; where there is something to choose, the training data choose it. `results/tasks.json` is written
after each task and keeps those that weren't run. Exit status 1 if a score isn't above its baseline.
"""

import argparse
import collections
import csv
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker import HERE, machine, save, table

from jaxlm.evaluation import metrics, pass_at_k, sandbox, text_metrics

SUMMARIZE = "Summarize this dialogue in one or two sentences.\n\n"
Found = tuple[float, str]
"""A baseline's figure, and what it is."""


@dataclass(frozen=True)
class Task:
    metric: str
    config: str
    files: Callable[[Path, Path], Any]
    """(data, folder): puts the splits into the folder."""
    baseline: Callable[[Path], Found]
    """Of the splits in the folder."""
    train: str
    """Arguments after the config; `encoder` and `decoder.gguf` are the models."""
    quick: str
    """Those that make it a matter of minutes, which stand in the config's docstring."""
    evaluate: str = "--data {test}"
    test: str = "test.tsv"

    def commands(self) -> list[str]:
        return [f"jaxlm train {self.config} {self.train} {self.quick}",
                f"jaxlm eval runs/{self.config} {self.evaluate.format(test=self.test)} --json"]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ encoders


def link(data: Path, folder: Path, names: dict[str, str]) -> None:
    for name, source in names.items():
        (folder / name).symlink_to((data / source).resolve())


def lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def write(path: Path, rows: Sequence[Any]) -> None:
    """Lines as they are, records as JSON."""
    shown = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(shown) + "\n", "utf-8")


def sst2(data: Path, folder: Path) -> None:
    link(data, folder, {"train.tsv": "sst2/train.tsv", "test.tsv": "sst2/test.tsv"})
    write(folder / "valid.tsv", lines(data / "sst2/dev.tsv")[:201])


def column(path: Path, name: str, header: Sequence[str] | None = None) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, fieldnames=header, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [row[name].strip() for row in reader]


def commonest(values: Sequence[str]) -> str:
    return collections.Counter(values).most_common(1)[0][0]


def commonest_label(folder: Path) -> Found:
    true, told = column(folder / "test.tsv", "label"), commonest(column(folder / "train.tsv", "label"))
    return metrics.classes(true, [told] * len(true), sorted(set(true)))[0]["accuracy"], "the commonest label"


def semeval(data: Path, folder: Path) -> None:
    every = lines(data / "semeval2010_task8/train.tsv")
    write(folder / "train.tsv", every[:-200])
    write(folder / "valid.tsv", every[-200:])
    write(folder / "test.tsv", lines(data / "semeval2010_task8/test.tsv")[:800])


def commonest_relation(folder: Path) -> Found:
    train, true = (column(folder / f"{part}.tsv", "label", ("e1", "e2", "label", "text")) for part in ("train", "test"))
    labels = sorted({*train, *true})
    negative = next(label for label in labels if label.casefold() == "other")
    told = commonest([label for label in train if label != negative])
    found = metrics.relations(true, [told] * len(true), labels, negative)[0]["f1_macro"]
    return found, f"always {told}, the commonest relation"


def xquad(language: str) -> Callable[[Path, Path], None]:
    """Of XQuAD's 48 articles every fourth is for the test; of the others two are for validation."""

    def files(data: Path, folder: Path) -> None:
        whole = json.loads((data / f"xquad/xquad.{language}.json").read_text("utf-8"))["data"]
        rest = [article for i, article in enumerate(whole) if i % 4 != 3]
        for name, articles in (("train", rest[2:]), ("valid", rest[:2]), ("test", whole[3::4])):
            write(folder / f"{name}.json", [{"version": "1.1", "data": articles}])

    return files


def fixed_span(folder: Path) -> Found:
    """The span between two fixed places, or the first sentence, whichever is best in the training data."""

    def read(part: str) -> list[tuple[str, list[str]]]:
        articles = json.loads((folder / f"{part}.json").read_text("utf-8"))["data"]
        return [(p["context"], [a["text"] for a in q["answers"]])
                for article in articles for p in article["paragraphs"] for q in p["qas"]]  # fmt: skip

    def cut(context: str, first: int, last: int) -> str:
        unspaced = len(context.split()) * 20 < len(context)  # of Chinese, characters
        return ("" if unspaced else " ").join((context if unspaced else context.split())[first:last])

    def sentence(context: str) -> str:
        return context[: min((at for mark in ".。!?！？" if (at := context.find(mark)) > 0), default=len(context))]

    ways: dict[str, Callable[[str], str]] = {"the first sentence": sentence}
    for a in (0, 1, 2, 5, 10, 20):
        for n in (1, 2, 3, 5, 10, 20, 40, 100_000):
            shown = f"words or characters {a + 1} to {a + n}" if n < 1000 else f"all from {a + 1} on"
            ways[shown] = lambda context, a=a, n=n: cut(context, a, a + n)  # type: ignore[misc]
    train, test = read("train"), read("test")
    f1 = lambda way, pairs: sum(metrics.match(true, way(text))[1] for text, true in pairs) / len(pairs)  # noqa: E731
    best = max(ways, key=lambda name: f1(ways[name], train))
    return f1(ways[best], test), best


# ----------------------------------------------------------------------------------------------------- texts to write


def multi30k(data: Path, folder: Path) -> None:
    for end in ("en", "de"):
        link(data, folder, {f"{to}.{end}": f"multi30k/{name}.{end}" for to, name in
                            (("train", "train"), ("test", "test_2016_flickr"))})  # fmt: skip
        write(folder / f"valid.{end}", lines(data / f"multi30k/val.{end}")[:200])


def copied(folder: Path) -> Found:
    true, source = lines(folder / "test.de"), lines(folder / "test.en")
    same = [commonest(lines(folder / "train.de"))] * len(true)
    ways = {"the source itself": source, "the commonest target": same}
    return max((text_metrics.bleu(true, found).figures["bleu"], name) for name, found in ways.items())


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(path)]


def dialogsum(data: Path, folder: Path) -> None:
    def asked(rows: list[dict], summary: str) -> list[dict]:
        return [dict(prompt=SUMMARIZE + row["dialogue"], completion=row[summary]) for row in rows]

    every = asked(records(data / "dialogsum/dev.jsonl"), "summary")
    write(folder / "train.jsonl", every[:-20])
    write(folder / "valid.jsonl", every[-20:])
    write(folder / "test.jsonl", asked(records(data / "dialogsum/test.jsonl")[::8], "summary1"))


def first_turns(folder: Path) -> Found:
    def rouge(part: str, n: int) -> float:
        rows = records(folder / f"{part}.jsonl")
        lead = [" ".join(row["prompt"].removeprefix(SUMMARIZE).split("\n")[:n]) for row in rows]
        return text_metrics.rouge([row["completion"] for row in rows], lead).figures["rougeL"]

    best = max(range(1, 5), key=lambda n: rouge("train", n))
    return rouge("test", best), f"the first {best} turns"


def gsm8k(data: Path, folder: Path) -> None:
    """Problems of one step or two: those that so small a model can learn in minutes."""

    def short(part: str) -> list[str]:
        return [line for line in lines(data / f"gsm8k/{part}.jsonl") if json.loads(line)["answer"].count("<<") <= 2]

    every = short("train")
    write(folder / "train.jsonl", every[:-20])
    write(folder / "valid.jsonl", every[-20:])
    write(folder / "test.jsonl", short("test")[:300])


def commonest_number(folder: Path) -> Found:
    told = commonest([row["answer"].rpartition(" ")[2] for row in records(folder / "train.jsonl")])
    true = [row["answer"] for row in records(folder / "test.jsonl")]
    return text_metrics.number(true, [told] * len(true)).figures["number"], f"always {told}, the commonest answer"


def humaneval(data: Path, folder: Path) -> None:
    write(folder / "test.jsonl", lines(data / "humaneval/HumanEval.jsonl")[::4])


def empty_bodies(folder: Path) -> Found:
    problems = pass_at_k.read(str(folder / "test.jsonl"))
    box, _ = sandbox.opened(False)
    ways = {}
    for body in ("pass", "return None", "return 0", "return []", "return True"):
        judged = pass_at_k.judge(problems, [[f"\n    {body}"]] * len(problems), box, os.cpu_count() or 1)
        ways[body] = sum(row["samples"][0]["passed"] for row in judged) / len(problems)
    best = max(ways, key=lambda body: ways[body])
    return ways[best], f"always {best!r}, the best of {len(ways)} such bodies"


TABLES = "--data.train train.tsv --data.valid valid.tsv"
QUESTIONS = "--train.steps 250 --train.seq-len 256 --train.batch-size 12 --optim.lr 3e-4 --optim.warmup 25"
TUNE = ("--train.steps 12 --train.batch-size 2 --train.seq-len 384 --optim.warmup 2 --optim.lr 1e-4 "
        "--execution.dtype float32")  # fmt: skip
SUMS = ("--train.steps 120 --train.batch-size 4 --train.seq-len 256 --optim.warmup 10 --optim.lr 1e-4 "
        "--execution.dtype float32")  # fmt: skip
CHAT = "--start decoder.gguf --data.train train.jsonl --data.valid valid.jsonl"
TASKS = {
    "sst2": Task("accuracy", "sst2", sst2, commonest_label, f"--start encoder {TABLES}",
                 "--train.steps 200 --train.seq-len 48 --optim.lr 1e-4"),
    "semeval": Task("f1_macro", "semeval", semeval, commonest_relation,
                    f"--start encoder {TABLES} --objective.columns e1 e2 label text",
                    "--train.steps 160 --train.batch-size 16 --train.seq-len 64 --optim.lr 3e-4 --optim.warmup 16"),
    "squad_en": Task("f1", "squad", xquad("en"), fixed_span,
                     "--start encoder --data.train train.json --data.valid valid.json", QUESTIONS, test="test.json"),
    "squad_zh": Task("f1", "squad", xquad("zh"), fixed_span,
                     "--start encoder --data.train train.json --data.valid valid.json", QUESTIONS, test="test.json"),
    "translate": Task("bleu", "translate", multi30k, copied, "--data.train train --data.valid valid",
                      "--train.steps 1600 --train.batch-size 16 --optim.warmup 100 --optim.lr 2e-3 --model.layers 2 "
                      "--model.width 128 --model.ffn 512 --model.dropout 0.1 --data.tokenizer sentencepiece:4096 "
                      "--model.vocab 4096",
                      "--data {test} --metric bleu --tokens 48", test="test"),
    "dialogsum": Task("rougeL", "chat", dialogsum, first_turns, CHAT, TUNE,
                      "--data {test} --metric rouge --tokens 64", test="test.jsonl"),
    "gsm8k": Task("number", "chat", gsm8k, commonest_number, CHAT, SUMS,
                  "--data {test} --metric number --tokens 128", test="test.jsonl"),
    "humaneval": Task("pass@1", "code", humaneval, empty_bodies, "--start decoder.gguf",
                      "--train.steps 12 --train.batch-size 4 --train.seq-len 256 --train.eval-batches 2 "
                      "--optim.warmup 2 --execution.dtype float32",
                      "--code {test} --run-generated-code --samples 4 --k 1,4 --temperature 0.2 --top-p 0.95 "
                      "--tokens 100", test="test.jsonl"),
}  # fmt: skip


def jaxlm(command: str, folder: Path) -> str:
    """What it prints; its own `jaxlm` is this checkout's."""
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "jaxlm", *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=folder, env=env, text=True, capture_output=True)
    if done.returncode:
        told = (done.stderr.strip() or done.stdout).splitlines()[-10:]
        raise RuntimeError(f"{command}\nended with {done.returncode}:\n" + "\n".join(told))
    return done.stdout


def losses(folder: Path) -> list[float]:
    """Of the validations of the run in a folder: before training, …, at the end."""
    (file,) = folder.glob("runs/*/metrics.jsonl")
    return [row["loss"] for row in records(file) if row["kind"] == "valid"]


def children() -> float:
    """Seconds of processor time that ended commands took, whatever else ran beside them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def perform(task: Task, data: Path, models: dict[str, Path]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tasks-") as made:
        folder = Path(made)
        task.files(data, folder)
        for name, place in models.items():
            (folder / name).symlink_to(place.resolve())
        about, started, busy = machine(), time.perf_counter(), children()
        *_, shown = [jaxlm(command, folder) for command in task.commands()]
        minutes, cpu_minutes = (time.perf_counter() - started) / 60, (children() - busy) / 60
        told = json.loads(shown.splitlines()[-1])
        figures = told.get("figures") or {k: v for k, v in told.items() if isinstance(v, float)}
        intervals = {name: ends for each in told["intervals"].values() for name, ends in each.items()}
        baseline, what = task.baseline(folder)
        return dict(
            metric=task.metric, score=figures[task.metric], interval=intervals.get(task.metric), baseline=baseline,
            baseline_is=what, minutes=minutes, cpu_minutes=cpu_minutes, validation_losses=losses(folder),
            figures=figures, sizes=told["sizes"], commands=task.commands(), machine=about,
        )  # fmt: skip


def shown(found: dict[str, dict]) -> str:
    rows = []
    for name, f in found.items():
        ends = " … ".join(f"{x:.4g}" for x in f["interval"]) if f["interval"] else ""
        above = "" if f["score"] > f["baseline"] else "NOT ABOVE"
        times = [f"{f[key]:.1f}" for key in ("minutes", "cpu_minutes")]
        rows.append([name, f["metric"], f["score"], ends, f["baseline"], above, *times])
    head = table(rows, ["task", "metric", "score", "95 %", "baseline", "", "minutes", "of CPU"])
    return "\n\n".join([head, *(f"{name}: {f['baseline_is']}\n  " + "\n  ".join(f["commands"])
                                for name, f in found.items())])  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    p.add_argument("--encoder", type=Path, required=True, help="a Hugging Face directory, such as all-MiniLM-L6-v2")
    p.add_argument("--decoder", type=Path, required=True, help="a .gguf file, such as SmolLM2-135M-Instruct")
    p.add_argument("--only", default=",".join(TASKS), help="names of tasks with commas between (default: all)")
    p.add_argument("--save", default="tasks", help="name under results/ (- : don't save)")
    a = p.parse_args()
    if unknown := set(a.only.split(",")) - set(TASKS):
        p.error(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(TASKS)}")
    file = HERE / "results" / f"{a.save}.json"
    found: dict[str, dict] = {}
    for name in a.only.split(","):
        found[name] = perform(TASKS[name], a.data, {"encoder": a.encoder, "decoder.gguf": a.decoder})
        print(f"{shown({name: found[name]})}\n", flush=True)
        if a.save != "-":
            kept = json.loads(file.read_text())["tasks"] if file.exists() else {}  # another process may add to it
            every = kept | {name: found[name]}
            models = {"encoder": "/".join(a.encoder.parts[-2:]), "decoder": a.decoder.name}
            save(a.save, {"models": models, "tasks": {n: every[n] for n in TASKS if n in every}})
    print(shown(found))
    sys.exit(any(f["score"] <= f["baseline"] for f in found.values()))


if __name__ == "__main__":
    main()
