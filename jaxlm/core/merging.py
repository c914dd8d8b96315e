"""Holds the settings of merging models (`jaxlm merge`). Nothing here imports jax."""

from dataclasses import dataclass
from typing import Literal

from jaxlm.core.ranges import Finite, Natural, PositiveShare, Share

MethodName = Literal[
    "linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "model_stock"
]  # fmt: skip
Rescale = Literal["density", "l1", "off"]


@dataclass(frozen=True)
class Changes:
    """These settings say by which method models are merged and what it keeps of their changes; None is the method's own
    value, where it has one."""

    method: MethodName = "linear"
    """linear: weighted mean; slerp: along the arc between two; the others add what the models changed since their base:
    task_arithmetic all of it; ties the largest changes of the sign that prevails; dare_linear and dare_ties changes
    drawn at random; breadcrumbs those of middle size; model_stock their mean, as far as they point one way."""
    density: PositiveShare | None = None
    """The share of each model's changes of a tensor that is kept; ties: 0.2, dare_linear, dare_ties and breadcrumbs
    need one."""
    gamma: Share | None = None
    """breadcrumbs: the share of the changes, the largest ones, that is dropped (0.01)."""
    rescale: Rescale | None = None
    """dare_linear, dare_ties: kept changes are divided by the density (density), made to add up to the same magnitude
    in each tensor as before (l1), or left as they are (off); density where none is given."""
    seed: Natural = 0
    """dare_linear, dare_ties: another one draws other changes."""


@dataclass(frozen=True)
class Settings(Changes):
    """These settings say how models are merged; None is the method's own value, where it has one."""

    weights: tuple[Finite, ...] = ()
    """How much each model counts, one number for each; none given: 1 each."""
    t: Share | None = None
    """slerp: how far from the first model to the second (0.5)."""
    scale: Finite | None = None
    """Multiplies the merged change (1)."""
