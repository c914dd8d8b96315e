"""Prunes a quarter of a model's layers and trains on: how much of the loss comes back (Minitron's recipe, Muralidharan
et al. 2024).

    python benchmarks/shrink.py                           # a model of 0.5 million parameters on Tiny Shakespeare
    python benchmarks/shrink.py --steps 1000 --regain-steps 300 --retrain activation magnitude

A Llama of bytes is trained, made smaller by each importance, and trained on for a part of the first steps: on text
alone, and on the original's logits alone (`distilled`). Beside it stand a model of the smaller shape that is trained
from scratch for as long as the smaller one was trained on, and the original trained on for as long. `regained` is the
share of the loss that came back by either way, and `of longer` that of text alone against the original trained on.
Losses are in nats a byte of held-out text. Runs that are finished are kept in --out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from worker import machine, save, table

import jaxlm
from jaxlm.core import config
from jaxlm.core.distillation import Distill
from jaxlm.models import llama
from jaxlm.objectives import causal

WAYS: dict[str, dict[str, Any]] = {
    "activation": {},
    "activation, compensated": dict(compensate=True),
    "loss": dict(importance="loss"),
    "magnitude": dict(importance="magnitude"),
}
SEQ = 128


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, default=Path("../shared/data/tinyshakespeare/input.txt"))
    p.add_argument("--steps", type=int, default=1000, help="of the first training")
    p.add_argument("--regain-steps", type=int, default=300)
    p.add_argument("--share", type=float, default=0.25)
    p.add_argument("--retrain", nargs="+", choices=WAYS, default=["activation", "magnitude"])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("runs/shrink"))
    return p.parse_args()


def texts(source: Path, folder: Path) -> tuple[str, str]:
    """Writes documents of 2,000 letters; the last tenth is held out."""
    text = source.read_text("utf-8")
    rows = [json.dumps({"text": text[i : i + 2000]}) + "\n" for i in range(0, len(text), 2000)]
    n = len(rows) * 9 // 10
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:n]), ("valid", rows[n:])):
        (folder / f"{name}.jsonl").write_text("".join(part), "utf-8")
    return str(folder / "train.jsonl"), str(folder / "valid.jsonl")


def run_of(
    name: str, a: argparse.Namespace, steps: int, model: Any = None, start: str = "", teacher: str = ""
) -> config.Run:
    train, valid = texts(a.text, a.out / "texts")
    c = llama.Config(
        vocab=264, layers=4, width=96, heads=6, kv_heads=6, head_width=16, ffn=256, positions=SEQ, tied=True
    )
    lr = 3e-3 if not start else 1.5e-3
    return config.Run(
        name, model or c, causal.Config(),
        config.Data((train,), valid=(valid,), tokenizer="bytes", cache=str(a.out / "cache"), tokenize_workers=1),
        config.Optim(lr=lr, warmup=30),
        train=config.Train(
            steps=steps, batch_size=16, seq_len=SEQ, eval_every=0, save_every=0, prompts=(), sample_tokens=1
        ),
        execution=config.Execution(dtype="float32"), seed=a.seed, out=str(a.out), start=start,
        distill=Distill(teacher=teacher, labels=0.0 if teacher else 1.0),
    )  # fmt: skip


def trained(run: config.Run, start: str = "") -> float:
    """Trains a run unless it is finished, and returns its loss on the held-out text."""
    if not (run.folder / "loss.json").is_file():
        jaxlm.train(jaxlm.load(run, start=start) if start else run)
        (run.folder / "loss.json").write_text(json.dumps(jaxlm.evaluate(run.folder)["loss"]))
    return float(json.loads((run.folder / "loss.json").read_text()))


def main() -> None:
    a = arguments()
    original = run_of("original", a, a.steps)
    first = trained(original)
    rows, smaller_shape = [], None
    for name, how in WAYS.items():
        slug = name.replace(", ", "-")
        folder = a.out / f"pruned-{slug}"
        if not folder.is_dir():
            jaxlm.shrink(original.folder, folder, share=a.share, held_out_batches=10**6, **how)
        record = json.loads((folder / "shrunk.json").read_text())
        smaller_shape = jaxlm.RunDirectory(folder).config.model
        row: dict[str, Any] = dict(importance=name, original=first, pruned=record["figures"]["loss"][1])
        row["parameters"] = record["sizes"]["parameters"]
        if name in a.retrain:
            for way, teacher in (("trained on", ""), ("distilled", str(original.folder))):
                run = run_of(f"{way}-{slug}".replace(" ", "-"), a, a.regain_steps, smaller_shape, str(folder), teacher)
                row[way] = trained(run, str(folder))
            row["regained"] = [
                (row["pruned"] - row[way]) / (row["pruned"] - first) for way in ("trained on", "distilled")
            ]
        rows.append(row)
    scratch = trained(run_of("scratch", a, a.regain_steps, smaller_shape))
    longer = trained(run_of("original-longer", a, a.regain_steps, start=str(original.folder)), str(original.folder))
    for row in rows:
        if "trained on" in row:  # what the original gains from the same steps counts as lost too
            row["of longer"] = (row["pruned"] - row["trained on"]) / (row["pruned"] - longer)
    figures = dict(rows=rows, original=first, original_trained_on=longer, from_scratch=scratch)
    figures |= dict(steps=a.steps, regain_steps=a.regain_steps, share=a.share, window=SEQ, seed=a.seed)
    columns = ["importance", "original", "pruned", "trained on", "distilled", "regained", "of longer"]
    shown = [{**row, "regained": " and ".join(f"{x:.0%}" for x in row.get("regained", ()))} for row in rows]
    print(table([[row.get(name, "") for name in columns] for row in shown], columns))
    print(f"original trained on {longer:.4f}; smaller shape from scratch {scratch:.4f}")
    save("shrink", {"what": __doc__} | figures | machine())


if __name__ == "__main__":
    main()
