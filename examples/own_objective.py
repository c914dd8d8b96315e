"""Registers an objective of one's own: causal language modelling in which capitals weigh more.

    python examples/own_objective.py

A package would name it as an entry point of the group `jaxlm.objectives`, or be loaded with `--plugin own_objective`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import jaxlm
from jaxlm.data.packing import Window
from jaxlm.objectives import causal
from jaxlm.objectives.objective import Example, Objective, RowShape, Tokenizer

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config(causal.Config):
    """The settings are those of causal language modelling, and one more."""

    capitals: float = 2.0
    """What a target that is a capital letter weighs, beside 1 for every other."""


def example(c: Config, record: Window, row: RowShape, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    """Makes a causal row in which capitals weigh more: `weights` says what each target counts in the loss."""
    out = causal.example(c, record, row, tokenizer, rng)
    is_capital = (out["targets"] >= ord("A")) & (out["targets"] <= ord("Z"))  # of the bytes tokenizer
    return out | {"weights": out["weights"] * np.where(is_capital, c.capitals, 1.0).astype(np.float32)}


objective = Objective(Config, "packed", ("decoder",), example=example, totals=causal.totals, loss=causal.loss)
jaxlm.register_objective("capitals", objective)


def main(out: str = "runs", steps: int = 20) -> jaxlm.RunDirectory:
    base = jaxlm.load("tiny_llama", out=out, name="capitals", train={"steps": steps, "prompts": (), "seq_len": 64})
    data = {"train": (str(HERE),), "holdout": 0.3, "cache": f"{out}/cache", "tokenize_workers": 1}
    run = jaxlm.load(base, objective=Config(capitals=3.0), data=data, optim={"warmup": 2})
    folder = jaxlm.train(run)
    print("losses:", [round(loss, 3) for loss in folder.losses])
    return folder


if __name__ == "__main__":
    main()
