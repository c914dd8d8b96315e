"""Prefix language modelling (Raffel et al. 2020, section 3.2.3): a beginning read both ways, the rest learned."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.objectives import causal

records = "packed"
models = ("decoder",)
both_ways = True
weights, loss = causal.weights, causal.loss


@dataclass(frozen=True)
class Config:
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    """Weight of log²Z, which keeps logits from drifting."""


def specs(c: Config, width: int) -> dict[str, Any]:
    return {}


def check(c: Config, tokenizer: Any) -> None:
    pass


def example(c: Config, record: dict, tokenizer: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A causal row with `prefix` [T]: tokens that all of their document sees, and that are therefore never targets.

    Each document of the window is split anew, after any of its tokens but the last: every length is equally likely.
    """
    out = causal.example(causal.Config(), record, tokenizer, rng)
    segments = record["segments"]
    prefix = np.zeros(len(segments), bool)
    edges = np.flatnonzero(np.diff(segments, prepend=-1, append=-1))
    for begin, end in itertools.pairwise(edges):
        if segments[begin] and end - begin > 1:
            prefix[begin : begin + rng.integers(1, end - begin)] = True
    return out | dict(weights=out["weights"] * ~prefix[1:], prefix=prefix[:-1])
