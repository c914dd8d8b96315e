"""Methods that add no weights and train some of the model's own: biases (BitFit, Ben Zaken et al. 2022), or norms."""

from dataclasses import dataclass
from typing import get_args

from jaxlm.core.config import Adapter
from jaxlm.core.spec import Role
from jaxlm.weights.adapters.method import Method


@dataclass(frozen=True, kw_only=True)
class BitFit(Adapter):
    """BitFit (Ben Zaken et al. 2022): the model's biases are trained."""


@dataclass(frozen=True, kw_only=True)
class Norms(Adapter):
    """The scales and biases of the model's norms are trained."""


none = Method[Adapter](Config=Adapter, trained_roles=get_args(Role))
bitfit = Method[BitFit](Config=BitFit, trained_roles=("bias", "norm_bias", "selection_bias"))
norms = Method[Norms](Config=Norms, trained_roles=("norm", "norm_bias"))
