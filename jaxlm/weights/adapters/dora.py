"""DoRA (Liu et al. 2024): LoRA's update gives a weight its direction, and the length of each output's column is learned
apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxlm.core.spec import Spec, ones
from jaxlm.weights.adapters import lora, low_rank
from jaxlm.weights.adapters.lora import ScaledLowRank
from jaxlm.weights.adapters.method import Method, Specs, Weights
from jaxlm.weights.adapters.peft_format import PeftFormat, PeftTensor
from jaxlm.weights.matrices import Matrix


@dataclass(frozen=True, kw_only=True)
class Dora(ScaledLowRank):
    """DoRA (Liu et al. 2024) is LoRA with a learned magnitude of each output."""


def specs(c: Dora, target: Matrix) -> Specs:
    return low_rank.pair(c, target) | dict(m=Spec(target.out_shape, target.out_axes, ones, role="scale"))


def initial_values(c: Dora, target: Matrix, base: Any, adapter: Weights) -> Weights:
    """Returns the weights with the magnitudes that the base has."""
    return adapter | dict(m=low_rank.leaf(c, target, base, adapter).norm())


def peft_settings(c: Dora, rank: int, others: Mapping[str, int]) -> dict[str, Any]:
    return lora.peft_settings(c, rank, others) | dict(use_dora=True)


method = Method[Dora](
    Config=Dora,
    targets=low_rank.TARGETS,
    specs=specs,
    bind=low_rank.bind,
    initial_values=initial_values,
    rate=lora.rate,
    defining=lora.DEFINING,
    peft=PeftFormat[Dora](
        reads=("LORA",),
        variant=lambda values: bool(values.get("use_dora")),
        config=lora.peft_config(Dora),
        settings=peft_settings,
        tensors=lora.TENSORS | dict(m=PeftTensor("lora_magnitude_vector", "scale")),
        required=("m",),
        b_factor=lora.peft_b_factor,
    ),
)
