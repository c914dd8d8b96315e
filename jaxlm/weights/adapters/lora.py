"""LoRA (Hu et al. 2021): two narrow matrices whose product is added to a weight; with rsLoRA's scale (Kalajdzievski
2023) and LoRA+'s learning rate (Hayou et al. 2024)."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxlm.core.ranges import NonNegative, Positive
from jaxlm.weights.adapters import low_rank, on_tables
from jaxlm.weights.adapters.low_rank import LowRankAdapter
from jaxlm.weights.adapters.method import Method
from jaxlm.weights.adapters.peft_format import PeftFormat, PeftTensor

TENSORS = dict(a=PeftTensor("lora_A.weight", "a"), b=PeftTensor("lora_B.weight", "b"))
DEFINING = ("rank", "alpha", "rank_stabilized")


@dataclass(frozen=True, kw_only=True)
class ScaledLowRank(LowRankAdapter):
    """Settings of LoRA and of the methods that scale their update as LoRA does."""

    alpha: Positive = 16.0
    """The product is scaled by alpha / rank."""
    rank_stabilized: bool = False
    """Scale by alpha / √rank instead (rsLoRA)."""
    b_lr: NonNegative = 1.0
    """Learning rate of b as a multiple of that of a (LoRA+; 16 is usual)."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@dataclass(frozen=True, kw_only=True)
class Lora(ScaledLowRank):
    """LoRA (Hu et al. 2021): a product of two narrow matrices is added to a weight."""


def rate(c: Any, name: str) -> float:
    return c.b_lr if name == "b" else 1.0


S = TypeVar("S", bound=ScaledLowRank)


def peft_config(Config: type[S]) -> Callable[[Mapping[str, Any], tuple[str, ...], int], S]:
    """Returns what makes settings of those of PEFT's LoRA. The scale is that of the file's rank `r`, whatever the
    largest rank of a module is."""

    def config(values: Mapping[str, Any], targets: tuple[str, ...], rank: int) -> S:
        grown, stabilized = rank / int(values["r"]), bool(values.get("use_rslora"))
        return Config(
            targets=targets, rank=rank, dropout=float(values.get("lora_dropout", 0)), rank_stabilized=stabilized,
            alpha=float(values["lora_alpha"]) * (math.sqrt(grown) if stabilized else grown),
        )  # fmt: skip

    return config


def peft_settings(c: ScaledLowRank, rank: int, others: Mapping[str, int]) -> dict[str, Any]:
    rank = rank or c.rank

    def alpha(n: int) -> float:
        """Returns the alpha with which a module of rank `n` has the scale that ours have."""
        return c.scale * (math.sqrt(n) if c.rank_stabilized else n)

    ranks = {re.escape(module): n for module, n in others.items() if n}
    return dict(
        peft_type="LORA", r=rank, lora_alpha=alpha(rank), lora_dropout=c.dropout, use_rslora=c.rank_stabilized,
        use_dora=False, bias="none", rank_pattern=ranks,
        alpha_pattern={module: alpha(n) for module, n in ranks.items()},
    )  # fmt: skip


def peft_b_factor(c: ScaledLowRank, values: Mapping[str, Any], module: str, rank: int) -> float:
    """Returns the scale that a file gives to one module's product, as a multiple of ours."""
    alphas = dict(values.get("alpha_pattern") or {})
    alpha = next(
        (a for pattern, a in alphas.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)), values["lora_alpha"]
    )
    return float(alpha) / (math.sqrt(rank) if values.get("use_rslora") else rank) / c.scale


method = Method[Lora](
    Config=Lora,
    targets=low_rank.TARGETS,
    specs=low_rank.pair,
    bind=low_rank.bind,
    rate=rate,
    factors=low_rank.factors,
    bind_table=on_tables.bind,
    defining=DEFINING,
    peft=PeftFormat[Lora](
        reads=("LORA",),
        variant=lambda values: not values.get("use_dora"),
        config=peft_config(Lora),
        settings=peft_settings,
        tensors=TENSORS,
        on_table=dict(a=PeftTensor("lora_embedding_A", "a"), b=PeftTensor("lora_embedding_B", "b")),
        b_factor=peft_b_factor,
        fused=low_rank.side_by_side,
    ),
)
