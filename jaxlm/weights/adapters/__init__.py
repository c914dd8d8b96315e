"""Adapters fine-tune few parameters: one method, or a few close kin, has a file. Each row of `METHODS` is a record
(`method.py`) with a class of settings of its own, which config files import from here: `adapter=Lora(rank=16,
base="nf4")`."""

from typing import Any

from jaxlm.core.registry import ConfigTable
from jaxlm.weights.adapters import (
    adalora,
    base_weights,
    bottleneck,
    dora,
    ia3,
    lora,
    orthogonal_lora,
    pissa,
    prefix,
    progressive,
    prompt,
    vera,
)
from jaxlm.weights.adapters.adalora import AdaLora
from jaxlm.weights.adapters.base_weights import BitFit, Norms
from jaxlm.weights.adapters.bottleneck import Houlsby, Parallel, Pfeiffer
from jaxlm.weights.adapters.dora import Dora
from jaxlm.weights.adapters.ia3 import Ia3
from jaxlm.weights.adapters.lora import Lora
from jaxlm.weights.adapters.method import Method
from jaxlm.weights.adapters.orthogonal_lora import OrthogonalLora
from jaxlm.weights.adapters.pissa import Pissa
from jaxlm.weights.adapters.prefix import Prefix
from jaxlm.weights.adapters.progressive import Progressive
from jaxlm.weights.adapters.prompt import Prompt, PTuning
from jaxlm.weights.adapters.vera import Vera

__all__ = [
    "METHODS", "AdaLora", "BitFit", "Dora", "Houlsby", "Ia3", "Lora", "Norms", "OrthogonalLora", "PTuning", "Parallel",
    "Pfeiffer", "Pissa", "Prefix", "Progressive", "Prompt", "Vera",
]  # fmt: skip

METHODS: ConfigTable[Method[Any]] = ConfigTable(
    "adapter",
    {
        "none": base_weights.none,
        "lora": lora.method,
        "dora": dora.method,
        "pissa": pissa.method,
        "adalora": adalora.method,
        "vera": vera.method,
        "ia3": ia3.method,
        "houlsby": bottleneck.houlsby,
        "pfeiffer": bottleneck.pfeiffer,
        "parallel": bottleneck.parallel,
        "prefix": prefix.method,
        "prompt": prompt.prompt,
        "p_tuning": prompt.p_tuning,
        "bitfit": base_weights.bitfit,
        "norms": base_weights.norms,
        "orthogonal_lora": orthogonal_lora.method,
        "progressive": progressive.method,
    },
)
