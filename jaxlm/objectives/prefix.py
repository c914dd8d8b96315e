"""Prefix language modelling (Raffel et al. 2020, section 3.2.3): a beginning read both ways, the rest learned."""

import itertools
from dataclasses import dataclass

import numpy as np

from jaxlm.core.ranges import BelowOne, NonNegative
from jaxlm.data.packing import Window
from jaxlm.objectives import causal
from jaxlm.objectives.objective import Example, Objective, RowShape, Tokenizer


@dataclass(frozen=True)
class Config:
    label_smoothing: BelowOne = 0.0
    z_loss: NonNegative = 0.0
    """Weight of log²Z, which keeps logits from drifting."""


def example(c: Config, record: Window, row: RowShape, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    """Makes a causal row with `prefix` [T]: tokens that all of their document sees, and that therefore are no targets.

    Each document of the window is split anew, after any of its tokens but the last: every length is equally likely.
    """
    out = causal.shifted(record)
    segments = record["segments"]
    prefix = np.zeros(len(segments), bool)
    edges = np.flatnonzero(np.diff(segments, prepend=-1, append=-1))
    for begin, end in itertools.pairwise(edges):
        if segments[begin] and end - begin > 1:
            prefix[begin : begin + rng.integers(1, end - begin)] = True
    return out | Example(weights=out["weights"] * ~prefix[1:], prefix=prefix[:-1])


objective = Objective(Config, "packed", ("decoder",), example=example, totals=causal.totals, loss=causal.loss,
                      prompts_read_both_ways=True, outputs=causal.outputs)  # fmt: skip
