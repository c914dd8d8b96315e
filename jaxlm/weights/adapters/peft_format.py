"""How Hugging Face PEFT's files hold an adapter: the part of a method's record that `formats/peft.py` reads and writes
by. Nothing here opens a file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from jaxlm.core.config import Adapter
from jaxlm.weights.matrices import Matrix

C = TypeVar("C", bound=Adapter)
Layer = dict[str, np.ndarray]
"""One layer's adapter weights of one matrix, by their names."""


def _never(matrix: Matrix) -> bool:
    return False


class PeftTensor(NamedTuple):
    """One of an adapter's weights in the file: what is appended to its module's name, and how it is stored there."""

    ending: str
    kind: Literal["a", "b", "rank", "scale"]
    """a: [R, inputs]; b: [outputs, R]; rank: one number of each direction; scale: one of each output or input."""
    column: bool = False
    """Whether the file has a second dimension of one."""
    scales_inputs: Callable[[Matrix], bool] = _never
    """Whether a matrix has its inputs scaled, not its outputs."""


def _always(settings: Mapping[str, Any]) -> bool:
    return True


def _as_it_is(layer: Layer) -> Layer:
    return layer


@dataclass(frozen=True)
class PeftFormat(Generic[C]):
    """A method's `adapter_config.json` and the names of its tensors."""

    reads: tuple[str, ...]
    """Values of `peft_type` that are read as this method; empty: it is only written, as another method's files."""
    config: Callable[[Mapping[str, Any], tuple[str, ...], int], C]
    """(settings of the file, patterns of its targets, its largest rank or number of virtual tokens) → our settings."""
    settings: Callable[[C, int, Mapping[str, int]], dict[str, Any]]
    """(our settings, rank, ranks of modules that have another one) → settings of the file."""
    variant: Callable[[Mapping[str, Any]], bool] = _always
    """Whether these settings of one of the types in `reads` are this method's and not those of its kin."""
    tensors: Mapping[str, PeftTensor] = field(default_factory=dict)
    """Our weights of a target, by their names, in the file."""
    on_table: Mapping[str, PeftTensor] = field(default_factory=dict)
    """The same of a table whose rows are looked up."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors in the file that hold the weights which all targets share; each is transposed there."""
    shared_remedy: str = ""
    """What to do where the file lacks them."""
    left_out: float = 0.0
    """Value of what the file leaves out: that which does nothing."""
    required: tuple[str, ...] = ()
    """Weights which every layer of a target must have in the file."""
    b_factor: Callable[[C, Mapping[str, Any], str, int], float] | None = None
    """(our settings, settings of the file, module, rank) → what its `b` is multiplied by to have our scale."""
    on_plain_base: Callable[[Layer], Layer] = _as_it_is
    """One layer's weights → those which do the same on the base as it was before training."""
    fused: Callable[[Sequence[Matrix], Mapping[str, Layer]], tuple[dict[str, Layer], int]] | None = None
    """(matrices that are one module in the file, weights of those with an adapter) → weights of all of them, and the
    module's rank, 0 without one; None: PEFT has no such files."""
    inputs_setting: str = ""
    """Name of the setting that lists modules whose inputs are scaled."""
