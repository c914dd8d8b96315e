"""Continual learning: what each method keeps of earlier stages, what it learns of new ones, and what it costs.

    python benchmarks/continual.py text --data DATA_DIR            # English prose, then Python, then German
    python benchmarks/continual.py tasks --data DATA_DIR --model MODEL_DIR   # five unlike labelled tasks in a row
    python benchmarks/continual.py chain --data DATA_DIR --model SMOLLM2.gguf --methods lora "orthogonal lora" …

DATA_DIR has the folders tinyshakespeare, multi30k, sst2, conll2003, semeval2010_task8, gsm8k, dialogsum; MODEL_DIR is a
Hugging Face directory of a small encoder. `text` trains a decoder of a million weights from nothing, on bytes, and
scores bits per byte of held-out text; `tasks` fine-tunes with a head for each task; `chain` teaches a pretrained chat
model three kinds of answers, and scores their loss. Each method is a stream of its own with the same seeds, beside
training without any and training on everything at once; `over plain` is the difference to the former in the average at
the end, with seeds paired. What is finished is kept in --out, and the same command goes on; results/ keeps the methods
that weren't run, and `--methods` without a name shows them. --scale multiplies the strengths of METHODS; those of ewc
and si were chosen so, with a seed of their own:

    python benchmarks/continual.py text --data DATA_DIR --seeds 100 --scale 0.1 1 10 --save - --methods ewc si
"""

import argparse
import itertools
import json
import math
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from worker import HERE, machine, save, table

from jaxlm.assembly import stream
from jaxlm.core import config
from jaxlm.core.config import Adapter
from jaxlm.core.continual import L2, MAS, SI, Continual, Ewc, Features, Gem, LwF, PackNet, Replay, RWalk
from jaxlm.core.stream import MergeBack, Stage, Stream
from jaxlm.evaluation.forgetting import over_seeds
from jaxlm.models import llama
from jaxlm.objectives import causal, classify, relate, sft, tag
from jaxlm.weights.adapters import Lora, OrthogonalLora, Progressive


class Variant(NamedTuple):
    """What a stream does that keeps what it learned."""

    continual: Continual = Continual()
    adapter: Adapter = Adapter()
    """Over the model that a stream starts from, at ten times the learning rate."""
    merge_back: MergeBack | None = None


def _replayed(*more: str, **settings: Any) -> Continual:
    """Returns methods that keep 512 rows, which are a quarter of each batch."""
    return Continual(more or ("replay",), **({"replay": Replay(share=0.25, examples=512)} | settings))


LORA = Lora(targets=("all",))
METHODS = {
    "none": Variant(),
    "l2": Variant(Continual(("l2",), l2=L2(strength=0.3))),
    "ewc": Variant(Continual(("ewc",), ewc=Ewc(strength=1.0, examples=128))),
    "si": Variant(Continual(("si",), si=SI(strength=1.0))),
    "mas": Variant(Continual(("mas",), mas=MAS(strength=0.1, examples=128))),
    "rwalk": Variant(Continual(("rwalk",), rwalk=RWalk(strength=10.0))),
    "lwf": Variant(Continual(("lwf",), lwf=LwF(strength=1.0))),
    "features": Variant(Continual(("features",), features=Features(strength=1.0))),
    "replay": Variant(_replayed()),
    "replay 5 %": Variant(_replayed(replay=Replay(share=0.0625, examples=512))),
    "replay, all rows": Variant(_replayed(replay=Replay(share=0.25, examples=32768))),
    "pseudo-replay": Variant(_replayed(replay=Replay(share=0.25, examples=512, source="model"))),
    "replay + ewc": Variant(_replayed("replay", "ewc", ewc=Ewc(1.0, 128))),
    "der++": Variant(_replayed("replay", "der")),
    "der++, half": Variant(_replayed("replay", "der", replay=Replay(share=0.5, examples=4096))),
    "agem": Variant(_replayed("agem")),
    "gem": Variant(_replayed("gem", gem=Gem(margin=0.5))),
    "merge back": Variant(merge_back=MergeBack(weight=0.5)),
    "packnet": Variant(Continual(("packnet",), packnet=PackNet(tasks=5))),
    "lora": Variant(adapter=LORA),
    "orthogonal lora": Variant(adapter=OrthogonalLora(targets=("all",))),
    "lora + replay": Variant(_replayed(), LORA),
    "task adapters": Variant(Continual(adapters="task"), LORA),
    "progressive": Variant(adapter=Progressive()),
}


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=list(STREAMS))
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--model", type=Path, help="tasks, chain: where each stream starts")
    p.add_argument(
        "--methods",
        nargs="*",
        choices=list(METHODS),
        help="default: all; adapters where the stream starts from a model",
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, help="of each stage")
    p.add_argument("--scale", type=float, nargs="+", default=[1.0], help="of the strengths")
    p.add_argument("--out", type=Path, default=Path("runs/continual"))
    p.add_argument("--save", help="name under results/ (- : don't save); default: continual_text or continual_tasks")
    return p.parse_args()


def text_stream(a: argparse.Namespace) -> Stream:
    """Returns the stream of three languages: 500 kB of each, and 20 kB to score."""
    folder = a.out / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    python = "\n\n".join((library / f"{name}.py").read_text("utf-8") for name in (
        "argparse", "ast", "calendar", "configparser", "csv", "dataclasses", "datetime", "difflib", "doctest", "enum",
        "fractions", "ftplib", "functools", "gettext", "inspect", "ipaddress", "mailbox", "optparse", "pathlib/_local",
        "pdb", "pickle", "platform", "shutil", "smtplib", "socket", "statistics", "tarfile", "textwrap", "threading",
        "traceback", "turtle", "typing", "uuid", "zipfile/__init__",
    ) if (library / f"{name}.py").is_file())  # fmt: skip
    texts = {
        "english": (a.data / "tinyshakespeare" / "input.txt").read_text("utf-8"),
        "python": python,
        "german": (a.data / "multi30k" / "train.de").read_text("utf-8"),
    }
    stages = []
    for name, text in texts.items():
        parts = {"train": text[:500_000], "valid": text[500_000:520_000]}
        for part, content in parts.items():
            (folder / f"{name}.{part}.txt").write_text(content, "utf-8")
        stages.append(Stage(name, {f"data.{part}": (str(folder / f"{name}.{part}.txt"),) for part in parts}))
    run = config.Run(
        name="text", out=str(a.out), objective=causal.Config(),
        model=llama.Config(vocab=384, layers=3, width=128, heads=4, kv_heads=4, head_width=32, ffn=384),
        data=config.Data(tokenizer="bytes", cache=str(a.out / "cache"), tokenize_workers=0),
        optim=config.Optim(lr=2e-3, warmup=20, weight_decay=0.0),
        train=config.Train(steps=a.steps or 150, batch_size=16, seq_len=64, eval_every=0, save_every=0, prompts=()),
        execution=config.Execution(dtype="float32"),
    )  # fmt: skip
    return Stream(run, tuple(stages), seeds=tuple(a.seeds))


def _cut(source: Path, target: Path, count: int, between: str = "\n", head: str = "") -> str:
    """Writes the first `count` examples of a file, which stand in a text between `between`; returns the path."""
    target.write_text(head + between.join(source.read_text("utf-8").split(between)[:count]) + "\n", "utf-8")
    return str(target)


def task_stream(a: argparse.Namespace) -> Stream:
    """Returns the stream of five tasks: sentiment, names of persons and places, relations, the language of a sentence
    and parts of speech; 2,000 examples of each, and 100 to score. The last two layers are trained, and the heads."""
    from jaxlm.assembly.model_source import describe

    source = describe(a.model)
    folder = a.out / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    changes: dict[str, dict[str, Any]] = {
        name: {} for name in ("sentiment", "names", "relations", "language", "speech")
    }
    for part, count, file in (("train", 2000, "train"), ("valid", 100, "test")):
        key, at = f"data.{part}", lambda name: folder / name
        words = _cut(a.data / "conll2003" / f"{file}.txt", at(f"words.{part}.txt"), count, "\n\n")
        table = _cut(a.data / "sst2" / f"{file}.tsv", at(f"sst2.{part}.tsv"), count + 1)
        changes["sentiment"][key] = (table,)
        changes["names"][key] = changes["speech"][key] = (words,)
        table = _cut(a.data / "semeval2010_task8" / f"{file}.tsv", at(f"semeval.{part}.tsv"), count)
        changes["relations"][key] = (table,)
        sides = [
            (side, a.data / "multi30k" / f"{'val' if part == 'valid' else 'train'}.{side}") for side in ("en", "de")
        ]
        rows = [
            [f"{line}\t{side}" for line in path.read_text("utf-8").splitlines()[: count // 2]] for side, path in sides
        ]
        mixed = [row for pair in zip(*rows, strict=True) for row in pair]
        at(f"language.{part}.tsv").write_text("\n".join(["sentence\tlabel", *mixed]) + "\n", "utf-8")
        changes["language"][key] = (str(at(f"language.{part}.tsv")),)
    changes["relations"]["train.seq_len"] = 56  # some entities are far apart
    sentences = classify.Config(text="sentence", label="label")
    objectives = {"sentiment": (sentences, "accuracy"), "names": (tag.Config(), "f1"),
                  "relations": (relate.Config(columns=("e1", "e2", "label", "text")), "accuracy"),
                  "language": (sentences, "accuracy"), "speech": (tag.Config(tag=1), "word_accuracy")}  # fmt: skip
    stages = tuple(Stage(name, changes[name] | {"objective": objective}, metric=metric)
                   for name, (objective, metric) in objectives.items())  # fmt: skip
    run = config.Run(
        name="tasks", out=str(a.out), model=source.config, objective=classify.Config(), start=str(a.model),
        data=config.Data(cache=str(a.out / "cache"), tokenize_workers=0),
        optim=config.Optim(lr=2e-4, warmup=8, schedule="linear", final=0.1, weight_decay=0.0, top_layers=2),
        train=config.Train(steps=a.steps or 50, batch_size=8, seq_len=32, eval_every=0, save_every=0, prompts=()),
        execution=config.Execution(dtype="float32"),
    )  # fmt: skip
    return Stream(run, stages, seeds=tuple(a.seeds))


def _names(sentence: str) -> tuple[str, str] | None:
    """Returns a prompt that asks for the names in a sentence of CoNLL-2003, and the answer; None: it has none."""
    words = [line.split() for line in sentence.splitlines() if line.strip() and not line.startswith("-DOCSTART-")]
    names: list[tuple[str, list[str]]] = []
    for before, (word, *_, kind) in zip([["O"], *words], words, strict=False):
        if kind.startswith("B-") or (kind != "O" and before[-1][2:] != kind[2:]):
            names.append((kind[2:], [word]))
        elif kind != "O":
            names[-1][1].append(word)
    text = " ".join(word for word, *_ in words)
    answer = ", ".join(f"{' '.join(part)} ({kind})" for kind, part in names)
    return (f"Which names are in this sentence? {text}", answer) if names else None


def chain_stream(a: argparse.Namespace) -> Stream:
    """Returns the chain of three kinds of answers for a pretrained chat model: German for an English sentence, the
    working of a sum, and the names in a sentence with their kinds; 400 of each, and 16 to score, all short."""
    from jaxlm.assembly.model_source import describe

    def records(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (a.data / name).read_text("utf-8").splitlines()]

    sides = [(a.data / "multi30k" / f"train.{side}").read_text("utf-8").splitlines() for side in ("en", "de")]
    pairs = {
        "german": [(f"Translate to German: {en}", de) for en, de in zip(*sides, strict=True)],
        "sums": [(row["question"], row["answer"]) for row in records("gsm8k/train.jsonl")],
        "names": list(filter(None, map(_names, (a.data / "conll2003" / "train.txt").read_text("utf-8").split("\n\n")))),
    }
    source, folder, stages = describe(a.model), a.out / "answers", []
    folder.mkdir(parents=True, exist_ok=True)
    for name, each in pairs.items():
        short = [{"prompt": q, "completion": answer} for q, answer in each if len(q) + len(answer) < 300][:416]
        parts = {"train": short[:-16], "valid": short[-16:]}
        for part, rows in parts.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}.{part}.jsonl").write_text(text, "utf-8")
        stages.append(Stage(name, {f"data.{part}": (str(folder / f"{name}.{part}.jsonl"),) for part in parts}))
    run = config.Run(
        name="chain", out=str(a.out), model=source.config, objective=sft.Config(), start=str(a.model),
        data=config.Data(cache=str(a.out / "cache"), tokenize_workers=0),
        optim=config.Optim(lr=1e-4, warmup=3, schedule="linear", final=0.1, weight_decay=0.0),
        train=config.Train(steps=a.steps or 12, batch_size=4, seq_len=144, eval_every=0, save_every=0, prompts=()),
        execution=config.Execution(dtype="float32"),
    )  # fmt: skip
    return Stream(run, tuple(stages), seeds=tuple(a.seeds))


STREAMS = {"text": text_stream, "tasks": task_stream, "chain": chain_stream}


def main() -> None:
    a = arguments()
    made = STREAMS[a.what](a)
    results = {}
    if (methods := a.methods) is None:
        methods = [m for m, variant in METHODS.items() if made.run.start or variant.adapter == Adapter()]
    for method, scale in itertools.product(methods, a.scale):
        name = method if len(a.scale) == 1 else f"{method} × {scale:g}"
        folder = "-".join([a.what, "".join(filter(str.isalnum, method)), *([] if scale == 1 else [f"{scale:g}"])])
        continual, adapter, merge_back = METHODS[method]
        run = replace(made.run, name=folder, continual=scaled(continual, scale), adapter=adapter)
        if adapter != Adapter():
            run = replace(run, optim=replace(run.optim, lr=10 * run.optim.lr))
        references = ("joint",) if method in ("none", "lora") else ()
        one = replace(made, run=run, references=references, merge_back=merge_back)
        if stream.train(one):
            raise SystemExit(1)
        results[name] = stream.collect(one, run.folder)
    file = HERE / "results" / f"{a.save or f'continual_{a.what}'}.json"
    stored = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    results = stored.get("results", {}) | results  # what wasn't run now stays
    results = {name: results[name] for name in sorted(results, key=lambda n: -results[n]["figures"]["average"][0])}
    plain = results.get("none") or results.get("lora")
    for r in results.values() if plain else ():
        if r is not plain:
            r["figures"]["over_plain"] = over(r, plain)
    shown = ("average", "over_plain", "learned", "forgetting", "backward")
    rows = [[method, *(interval(r["figures"].get(name, [None])) for name in shown), f"{sum(r['seconds'].values()):.0f}"]
            for method, r in results.items()]  # fmt: skip
    print(table(rows, ["method", *(name.replace("_", " ") for name in shown), "seconds a seed"]))
    if a.save != "-":
        save(file.stem, {"machine": machine() if methods else stored["machine"], "seeds": a.seeds, "results": results})


def scaled(c: Continual, scale: float) -> Continual:
    """Returns the settings with the strength of each method multiplied."""
    own = {name: getattr(c, name) for name in c.methods if hasattr(getattr(c, name, None), "strength")}
    return replace(c, **{name: replace(part, strength=scale * part.strength) for name, part in own.items()})


def over(r: dict[str, Any], plain: dict[str, Any]) -> list[float | None]:
    """Returns by how much a method's average at the end is better than that of plain training, with its 95 % interval:
    the mean difference over the seeds that both have."""
    at_end = [{seed: float(np.mean(np.where(x["lower_is_better"], -1, 1) * m[-1]))
               for seed, m in zip(x["seeds"], x["matrices"], strict=True)} for x in (r, plain)]  # fmt: skip
    common = at_end[0].keys() & at_end[1].keys()
    if not common:
        return [None]
    gains = over_seeds([{"gain": at_end[0][seed] - at_end[1][seed]} for seed in common])["gain"]
    return [None if math.isnan(x) else x for x in gains]


def interval(ends: list[float | None]) -> str:
    """Returns a mean with half its 95 % interval over seeds."""
    mean, high = ends[0], ends[-1]
    if mean is None:
        return "–"
    return f"{mean:.4f}" + ("" if high is None else f" ± {high - mean:.4f}")


if __name__ == "__main__":
    main()
