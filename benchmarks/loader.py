"""Tokens a second that the loader makes of real text, beside what the train step consumes, and tokenising speed.

    python benchmarks/loader.py --shapes gpt2-17m bert-17m --require 20

The text is Python's standard library. Tokenising starts from an empty cache; the loader then reads it by memory map
as in training: packed windows with document masks, shuffled, through Grain's prefetching. The step runs on the same
machine in turns with the loader, never at the same time. Exit status 1 if a ratio is below --require.
"""

import argparse
import dataclasses
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shapes import SHAPES
from step_jaxlm import make_run
from worker import Worker, launcher_environment, machine, save, table

from jaxlm.assembly.corpus import Corpus, training_loader
from jaxlm.assembly.run_objective import bind_run
from jaxlm.data import loader, tokenizer, train_tokenizer
from jaxlm.data import token_cache as caches
from jaxlm.objectives import causal, masked

OBJECTIVE = {
    "causal": causal.Config(),
    "masked": masked.Config(),
    "masked, whole words": masked.Config(whole_word=True),
}


def tokenise(folder: Path, workers: int) -> tuple[dict[str, Any], dict[str, Path]]:
    """MB/s of UTF-8 text into a fresh cache, by tokenizer; 1 MB is 10⁶ bytes."""
    out, made = {}, {}
    texts = list(caches.texts("stdlib", part="train"))
    started = time.perf_counter()
    pieces = train_tokenizer.train_sentencepiece(texts, folder / "pieces.model", vocab_size=8192)
    training = time.perf_counter() - started
    for name, tokens in (("bytes", tokenizer.load("bytes")), ("sentencepiece:8192", pieces)):
        started = time.perf_counter()
        paths = caches.prepare("stdlib", tokens, folder / name, holdout=0.0, workers=workers, progress=False)
        seconds = time.perf_counter() - started
        opened = caches.open_cache(paths["train"])
        size, count = int(opened.raw_bytes.sum()), len(opened.tokens)
        out[name] = {"MB": size / 1e6, "tokens": count, "seconds": seconds, "MB_per_s": size / 1e6 / seconds}
        made[name] = paths["train"]
    out["sentencepiece:8192"]["training_s"] = training
    return out, made


def loaders(shape: str, caches_of: dict[str, Path], folder: Path) -> dict[str, loader.Loader]:
    """By objective, tokenizer and workers, with the shape's batch and sequence length."""
    out = {}
    tokens = {"bytes": tokenizer.load("bytes"), "sentencepiece:8192": tokenizer.load(folder / "pieces.model")}
    kinds = ["causal"] if SHAPES[shape]["family"] != "bert" else ["masked", "masked, whole words"]
    for kind, (name, path), workers in itertools.product(kinds, caches_of.items(), (0, 2)):
        run = make_run(shape, [])
        run = dataclasses.replace(run, objective=OBJECTIVE[kind], data=dataclasses.replace(run.data, workers=workers))
        corpus = Corpus([caches.open_cache(path)], [1.0], [])
        out[f"{kind}, {name}, {workers} workers"] = training_loader(run, bind_run(run, tokens[name]), corpus, None)
    return out


def rate(made: loader.Loader, seconds: float, start: int) -> float:
    """Tokens a second once the first batches are there."""
    batches = made.iterate(start)
    for _ in range(4):
        first = next(batches)
    size, count, began = first["tokens"].size, 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        next(batches)
        count += 1
    elapsed = time.perf_counter() - began
    batches.close()  # type: ignore[attr-defined]
    return size * count / elapsed


def compare(shape: str, made: dict[str, loader.Loader], rounds: int, seconds: float, threads: int) -> dict[str, Any]:
    environment = launcher_environment() | {"PYTHONPATH": str(Path(__file__).parents[1])}
    step = Worker(sys.executable, "step_jaxlm.py", {"shape": shape}, environment, threads)
    step.ask("steps", n=2)
    tokens = SHAPES[shape]["batch"] * SHAPES[shape]["seq"]
    consumed: list[float] = []
    produced: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds):
        consumed.append(tokens / step.ask("steps", n=3)["seconds"])
        for name, one in made.items():
            produced[name].append(rate(one, seconds, 1000 * turn))
    about = step.ask("describe")
    step.close()
    return {"step": consumed, "loader": produced, "device": about["device"], "versions": about["versions"]}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", default=["gpt2-17m", "bert-17m"], choices=SHAPES)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=2.0, help="of each loader in each round")
    p.add_argument("--workers", type=int, default=2, help="processes that tokenise")
    p.add_argument("--require", type=float, default=20.0, help="least ratio of loader to step")
    p.add_argument("--save", default="loader", help="name under results/; - : don't save")
    a = p.parse_args()
    host, rows, found = machine(), [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenising, made = tokenise(folder, a.workers)
        for name, t in tokenising.items():
            print(f"tokenising, {name}: {t['MB']:.1f} MB in {t['seconds']:.1f} s: {t['MB_per_s']:.2f} MB/s", flush=True)
        for shape in a.shapes:
            found[shape] = compare(shape, loaders(shape, made, folder), a.rounds, a.seconds, os.cpu_count() or 1)
            step = statistics.median(found[shape]["step"])
            for name, samples in found[shape]["loader"].items():
                typical = statistics.median(samples)
                rows.append([shape, name, round(typical), round(step), typical / step])
    header = ["step of", "loader", "loader tokens/s", "step tokens/s", "ratio"]
    print(table(rows, header))
    if a.save != "-":
        save(a.save, {
            "what": "loader tokens/s beside the step's; tokenising MB/s of Python's standard library",
            "machine": host, "settings": {"tokenising_workers": a.workers, "seconds": a.seconds, "source": "stdlib"},
            "tokenising": tokenising, "samples": found,
            "table": [dict(zip(header, row, strict=True)) for row in rows],
        })  # fmt: skip
    return 1 if min(row[-1] for row in rows) < a.require else 0


if __name__ == "__main__":
    sys.exit(main())
