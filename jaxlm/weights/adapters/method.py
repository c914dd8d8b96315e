"""A method of fine-tuning few parameters is a record whose defaults change nothing.

At rest an adapter is a tree of its own beside the model's weights, under `adapter/`, with the paths of its targets.
Disabled is the base alone: nothing is ever subtracted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
import numpy as np
import optax

from jaxlm.core.config import Adapter
from jaxlm.core.spec import Role, Spec
from jaxlm.nn.leaf import Leaf, Wrapped
from jaxlm.weights.adapters.peft_format import PeftFormat
from jaxlm.weights.matrices import Matrix

C = TypeVar("C", bound=Adapter)
Specs = dict[str, Spec]
Weights = dict[str, Any]
"""Arrays by their names in an adapter's specs."""
Bind = Callable[[C, Matrix, Any, Weights, Weights, jax.Array | None], Leaf]
"""(settings, target, the base's weight, the target's adapter, what targets share, key of dropout) → what takes the
weight's place while a model runs. Without a key nothing is dropped."""


@dataclass(frozen=True, kw_only=True)
class TargetedAdapter(Adapter):
    """Settings of a method that adds weights to matrices of the layers."""

    targets: tuple[str, ...] = ()
    """Patterns of the weights that get an adapter; `all`: every matrix of the layers; empty: those usual for it. A
    decoder's `embed` and `head` are named by these words alone: lora's own dropout leaves them out, and a head that is
    tied to the table has an update of its own, so merging unties them."""


@dataclass(frozen=True)
class VirtualTokens(Generic[C]):
    """The part of a method whose adapter is embeddings of tokens before the text, under `adapter/prompt`."""

    count: Callable[[C], int]
    text: Callable[[C], str]
    """Text whose embeddings the virtual tokens begin as; empty: those of tokens at random."""
    specs: Callable[[C, int], Specs]
    """(settings, width of the model) → weights, of which `rows` `[P, D]` begins as embeddings of tokens."""
    rows: Callable[[Weights], jax.Array]
    """Weights → the virtual tokens' embeddings, `[P, D]`."""


@dataclass(frozen=True)
class Columns(Generic[C]):
    """The part of an adapter that grows by columns, one a task: what a task uses of it stays as it was."""

    last: Callable[[C], int]
    """Settings → the number of the newest column."""
    settings: Callable[[C, int], C]
    """(settings, column) → settings of the adapter as it was when the column was its newest."""
    weights: Callable[[Weights, int], Weights]
    """(a target's weights, stacked or of one layer, column) → those as they were then."""


@dataclass(frozen=True)
class Growth(Generic[C]):
    """The part of a method whose adapter grows: a run that starts from a model with an adapter keeps that one and adds
    one of its own."""

    bases: tuple[type[Adapter], ...]
    """Settings of the adapters that it grows from."""
    settings: Callable[[C, Adapter], C]
    """(settings, those of the adapter that the model has which a run starts from) → settings of the run."""
    weights: Callable[[C, Any, Matrix, Weights], Weights]
    """(settings, those before, target, its adapter before) → those of the target's weights that come from it."""
    columns: Columns[C] | None = None
    """None: every task uses all of it."""


def _none(c: Any, target: Matrix) -> Specs:
    return {}


def _nothing_shared(c: Any, targets: Mapping[str, Matrix]) -> Specs:
    return {}


def _unchanged(
    c: Any, target: Matrix, base: Any, adapter: Weights, shared: Weights, key: jax.Array | None
) -> Leaf:  # fmt: skip
    return Wrapped(base)


def _same_rate(c: Any, name: str) -> float:
    return 1.0


def _same_optimizer(c: Any, tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    return tx


def _no_keys(c: Any) -> int:
    return 0


@dataclass(frozen=True)
class Method(Generic[C]):
    """A method is one way of fine-tuning few parameters."""

    Config: type[C]
    targets: tuple[str, ...] = ()
    """Patterns of the matrices that get an adapter where the settings name none; empty: the method has no targets."""
    specs: Callable[[C, Matrix], Specs] = _none
    """Weights that it adds to one layer of a target."""
    bind: Bind[C] = _unchanged
    shared: Callable[[C, Mapping[str, Matrix]], Specs] = _nothing_shared
    """Weights that all targets share, which are not trained."""
    frozen: tuple[str, ...] = ()
    """Names of a target's weights that are not trained."""
    initial_values: Callable[[C, Matrix, Any, Weights], Weights] | None = None
    """(settings, target, the base's weight, fresh weights) → first values that come from the base's."""
    needs_whole_base: bool = False
    """Whether `initial_values` takes the base's weight as it was before it was quantized."""
    rate: Callable[[C, str], float] = _same_rate
    """What the learning rate of a target's weight is multiplied by, by the weight's name."""
    wrap_optimizer: Callable[[C, optax.GradientTransformation, int], optax.GradientTransformation] = _same_optimizer
    """(settings, optimizer, steps of the run) → the optimizer with what the method does after each update."""
    penalty: Callable[[C, Any], jax.Array] | None = None
    """(settings, all weights) → what is added to the mean loss."""
    trained_roles: tuple[Role, ...] = ()
    """Roles of those weights of the base that are trained."""
    virtual_tokens: VirtualTokens[C] | None = None
    growth: Growth[C] | None = None
    """How it grows from run to run; None: a run goes on with the adapter that it starts from."""
    num_common_keys: Callable[[C], int] = _no_keys
    """How many keys every query of a row sees, whatever its segment."""
    mergeable: bool = True
    """Whether dense weights of the model alone can do the same."""
    factors: Callable[[C, Matrix, Weights, Weights], tuple[np.ndarray, np.ndarray]] | None = None
    """(settings, target, its adapter, what targets share) → two matrices whose product is what is added to the base's
    weight; None: it is no such product, so rows of a batch can't have different adapters."""
    defining: tuple[str, ...] = ()
    """Settings without which trained weights mean nothing: a run that goes on from them must have the same."""
    bind_table: Callable[[C, Any, Weights | None, Weights | None], Leaf] | None = None
    """(settings, a table or a head, the table's adapter, the head's) → what takes its place; None: neither can be a
    target. Their weights are those of `specs`."""
    peft: PeftFormat[C] | None = None
    """How Hugging Face PEFT's files hold it; None: PEFT has none."""

    @property
    def has_own_optimizer(self) -> bool:
        """Says whether it does something of its own after each update."""
        return self.wrap_optimizer is not _same_optimizer
