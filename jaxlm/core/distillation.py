"""Holds the settings of distillation: what a run's model learns from a teacher, beside the labels or instead of them.

Nothing here imports jax.
"""

from dataclasses import dataclass, field
from typing import Literal

from jaxlm.core.ranges import Count, Natural, NonNegative, Positive, Share

Matter = Literal["logits", "hidden", "relations"]
Divergence = Literal["forward", "reverse", "jsd"]


@dataclass(frozen=True)
class Logits:
    """The student's predictions keep to the teacher's (Hinton et al. 2015)."""

    weight: NonNegative = 1.0
    divergence: Divergence = "forward"
    """forward: KL(teacher ‖ student), which covers all that the teacher may say; reverse: KL(student ‖ teacher), which
    keeps to what it is likeliest to say; jsd: the generalised Jensen-Shannon divergence (Agarwal et al. 2024)."""
    temperature: Positive = 2.0
    """T, which both sides' logits are divided by; the divergence is multiplied by T²."""
    beta: Share = 0.5
    """jsd: the teacher's share of the mixture that both sides are compared with; 0 and 1 leave no divergence."""
    top_k: Natural = 0
    """Compare the teacher's k likeliest classes of each place, and all others together as one more; 0: all classes."""


@dataclass(frozen=True)
class Hidden:
    """The student's hidden states keep to the teacher's (Romero et al. 2015, Jiao et al. 2020)."""

    weight: NonNegative = 1.0
    measure: Literal["mse", "cosine"] = "mse"
    """mse: the mean squared difference; cosine: one minus the cosine of the angle."""
    layers: tuple[str, ...] = ()
    """Which layers are compared, STUDENT=TEACHER, counted from 0: `0=1 1=3 2=5`. Empty: every layer of the student with
    the last of an equal share of the teacher's."""
    project: bool = False
    """Compare a learned linear map of the student's states. Where the widths differ there always is one."""


@dataclass(frozen=True)
class Relations:
    """The student's attention relates tokens as the teacher's does: relations of queries, of keys and of values in one
    layer (Wang et al. 2021, MiniLMv2)."""

    weight: NonNegative = 1.0
    of: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
    """What is related: queries to queries, keys to keys, values to values."""
    heads: Natural = 0
    """Relation heads that each side's width is cut into, whatever heads it attends with; 0: the teacher's heads."""
    layer: Natural | None = None
    """The student's layer, counted from 0; None: its last."""
    teacher_layer: Natural | None = None
    """The teacher's layer; None: its last."""


@dataclass(frozen=True)
class OnPolicy:
    """The student learns from the teacher on texts that it writes itself (generalised knowledge distillation, Agarwal
    et al. 2024)."""

    share: Share = 0.0
    """λ: the share of the updates whose rows the student writes; their labels are not learned."""
    tokens: Count = 64
    """The most tokens that the student writes of a text."""
    temperature: NonNegative = 1.0
    """Of the student's writing; 0 writes the likeliest text."""


@dataclass(frozen=True)
class Distill:
    """Says what is learned from a teacher; without one, nothing is."""

    teacher: str = ""
    """Model that is learned from: a run directory, a Hugging Face directory, hf:OWNER/NAME, a .gguf file, or one of
    them with an adapter. Its tokenizer must be the run's. Empty: there is none."""
    losses: tuple[Matter, ...] = ("logits",)
    """What of the teacher is learned; several add up."""
    labels: NonNegative = 1.0
    """Weight of the objective's own loss; 0: the teacher alone is learned from."""
    logits: Logits = field(default_factory=Logits)
    hidden: Hidden = field(default_factory=Hidden)
    relations: Relations = field(default_factory=Relations)
    on_policy: OnPolicy = field(default_factory=OnPolicy)
    dtype: Literal["run", "float32", "bfloat16"] = "run"
    """Type of the teacher's matrix products; run: that of the run."""
    base: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"
    """How the matrices of the teacher's layers are stored."""
    cache: str = ""
    """Folder that keeps the teacher's logits of every training row, of the `logits.top_k` likeliest classes; they are
    computed once, and the teacher then takes no part in the training. Empty: it reads each batch."""
