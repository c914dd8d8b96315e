"""The settings of continual learning: what a run does so that a model keeps what it learned before.

Each method has a class of settings here and its functions in `jaxlm/training/continual/`. Nothing here imports jax.
"""

from dataclasses import dataclass, field
from typing import Literal

from jaxlm.core.ranges import BelowOne, Count, Natural, NonNegative, Positive, PositiveShare


@dataclass(frozen=True)
class L2:
    """Pulls the weights to those that training starts from."""

    strength: NonNegative = 0.1
    """λ of λ/2 · Σ (θ − θ*)²."""


@dataclass(frozen=True)
class Ewc:
    """Elastic weight consolidation (Kirkpatrick et al. 2017): λ/2 · Σ F (θ − θ*)², where F is the diagonal of the
    Fisher information, the mean over examples of the squared gradient of each one's summed loss."""

    strength: NonNegative = 1.0
    """λ."""
    examples: Count = 256
    """Rows of the earlier data that F is estimated on."""
    labels: Literal["data", "model"] = "data"
    """data: the true targets (empirical Fisher); model: targets drawn from the model's own predictions (Fisher)."""
    unit: Literal["row", "token"] = "row"
    """row: the gradient of a whole row is squared; token: that of one target of each row, drawn at random."""
    decay: NonNegative = 1.0
    """What the importances of earlier tasks are multiplied by for each further task (online EWC, below 1)."""


@dataclass(frozen=True)
class SI:
    """Synaptic intelligence (Zenke et al. 2017): importance is what a weight's path lowered the loss by, over the
    square of its way."""

    strength: NonNegative = 1.0
    """λ of λ/2 · Σ Ω (θ − θ*)²."""
    damping: Positive = 1e-3
    """Added to the square of a weight's way."""


@dataclass(frozen=True)
class MAS:
    """Memory aware synapses (Aljundi et al. 2018): importance is the mean over examples of the absolute gradient of the
    squared norm of the outputs. It needs no labels."""

    strength: NonNegative = 1.0
    """λ of λ/2 · Σ Ω (θ − θ*)²."""
    examples: Count = 256
    """Rows of the earlier data."""
    decay: NonNegative = 1.0
    """What the importances of earlier tasks are multiplied by for each further task."""


@dataclass(frozen=True)
class RWalk:
    """Riemannian walk (Chaudhry et al. 2018): importance is the Fisher information averaged along the path plus the
    score of the path, each divided by its largest value."""

    strength: NonNegative = 1.0
    """λ of λ/2 · Σ Ω (θ − θ*)²."""
    decay: BelowOne = 0.9
    """Of the moving average of the Fisher information."""


@dataclass(frozen=True)
class LwF:
    """Learning without forgetting (Li & Hoiem 2016): on the new inputs the model's earlier heads, or its vocabulary's,
    keep to what the model gave before: α · T² · KL(before ‖ now)."""

    strength: NonNegative = 1.0
    """α."""
    temperature: Positive = 2.0
    """T, which both sides' logits are divided by."""


@dataclass(frozen=True)
class Features:
    """Keeps the last layer's states on the new inputs near to those of the model before: the mean squared difference
    over the mean square."""

    strength: NonNegative = 1.0


@dataclass(frozen=True)
class Replay:
    """Rows of earlier data stand beside the new ones in each batch (experience replay); the settings of every method
    that keeps earlier rows."""

    share: PositiveShare = 0.25
    """Share of a batch's rows that are earlier ones; they replace new ones."""
    examples: Natural = 512
    """Rows kept of all earlier tasks together; 0: as many as `tokens` allows."""
    tokens: Natural = 0
    """Tokens that the kept rows may have together; 0: any number."""
    source: Literal["data", "model"] = "data"
    """data: rows of the earlier data; model: rows that the model writes before it learns the new (pseudo-rehearsal,
    Robins 1995), for when the earlier data are gone: texts from their beginning, or answers to the new prompts."""
    temperature: Positive = 1.0
    """Of what the model writes; 1 draws as often as the model says."""
    balance: Literal["none", "task", "class"] = "task"
    """none: each earlier example is kept with the same probability (reservoir sampling); task: the same number of each
    task; class: of each task's labels."""


@dataclass(frozen=True)
class Der:
    """Dark experience replay (Buzzega et al. 2020): kept rows hold the model's logits, and the model now keeps to them;
    with `replay` beside it, which learns their labels, it is DER++."""

    strength: NonNegative = 0.5
    """α of the mean squared difference of logits."""
    top: Count = 64
    """Largest logits that are stored of each prediction."""


@dataclass(frozen=True)
class Gem:
    """Gradient episodic memory (Lopez-Paz & Ranzato 2017): the gradient of an update is changed so that it opposes that
    of no earlier task."""

    margin: NonNegative = 0.0
    """Lower bound of the multipliers (γ, the memory strength)."""


@dataclass(frozen=True)
class PackNet:
    """PackNet (Mallya & Lazebnik 2018): each task keeps the largest of the weights that are free and leaves the others
    to the next; nothing moves what a task keeps."""

    keep: PositiveShare = 0.5
    """Share of the free weights of each matrix that the task keeps."""
    tasks: Natural = 0
    """So many tasks share the weights evenly, whatever `keep` says: of T the first keeps 1/T of them, the next
    1/(T - 1) of what is left, …; 0: by `keep`."""
    retrain: BelowOne = 0.3
    """Share of the run's steps, the last ones, in which the kept weights are trained without the others."""


@dataclass(frozen=True)
class Continual:
    """Says how a run that starts from another keeps what that one learned."""

    methods: tuple[str, ...] = ()
    """Any of l2, ewc, si, mas, rwalk (penalties), lwf, features (distillation), replay, der, agem, gem (earlier rows);
    several work together; or packnet (weights of each task's own) by itself."""
    heads: bool = False
    """Keep the heads of the tasks before, so that they can be evaluated; with any method they are kept in any case."""
    adapters: Literal["shared", "task"] = "shared"
    """shared: a run goes on with the adapter of the model that it starts from; task: it has one of its own over the
    frozen base, and earlier tasks keep theirs, so that none is forgotten."""
    old: tuple[str, ...] = ()
    """Sources of earlier data, read by this run's objective; empty: those of the run that this one starts from."""
    kl_rows: Natural = 64
    """Rows of the validation data on which a run with `methods` or `heads` measures KL(before ‖ now), how far it has
    moved on the new inputs; 0: it doesn't."""
    l2: L2 = field(default_factory=L2)
    ewc: Ewc = field(default_factory=Ewc)
    si: SI = field(default_factory=SI)
    mas: MAS = field(default_factory=MAS)
    rwalk: RWalk = field(default_factory=RWalk)
    lwf: LwF = field(default_factory=LwF)
    features: Features = field(default_factory=Features)
    replay: Replay = field(default_factory=Replay)
    der: Der = field(default_factory=Der)
    gem: Gem = field(default_factory=Gem)
    packnet: PackNet = field(default_factory=PackNet)
