"""Ways to multiply activations by a layer's matrices in few bits, forwards and backwards: what each has to say.

`nn/fp8.py`, `nn/mxfp8.py` and `nn/int8.py` hold one way each, `nn/matmul.py` chooses among them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import struct


@dataclass(frozen=True)
class Way:
    """A Way is how activations and a matrix are rounded and multiplied. In `rounded` and `product` the last `inputs`
    dimensions of activations are contracted, and the first `inputs` of a matrix."""

    words: str
    """What a run says of its products."""
    needs: str
    """The devices that can do it, in words."""
    multiplies: Callable[[Any], bool]
    """Whether a device multiplies so; a CPU computes the same numbers."""
    rounded: Callable[[jax.Array, int], Any]
    """(activations, inputs) → what products and their gradients read of the rounded activations."""
    product: Callable[[int, "Place", jax.Array, jax.Array, Any], jax.Array]
    """(inputs, place, activations, matrix, the rounded activations) → the product in the type of the activations."""
    gpu_options: Mapping[str, bool] = field(default_factory=dict)
    """Compiler options of a step on a GPU."""


@dataclass(frozen=True)
class Place:
    """A Place is where a product lies on a mesh."""

    home: Any = None
    """The result's partition on a mesh of explicit axes, else None."""
    rows: int = 1
    """Devices that share the rows of activations."""
    inputs: int = 1
    """Devices that share what is contracted."""
    outputs: int = 1


class Like(struct.PyTreeNode):
    """A Like says the type, the shape and the partition of a factor's gradient."""

    dtype: Any = struct.field(pytree_node=False)
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    home: Any = struct.field(pytree_node=False)


def like(home: Any, x: jax.Array) -> Like:
    """Returns what the gradient of a factor looks like. `home`: the partition of the product, or None."""
    return Like(x.dtype, x.shape, None if home is None else jax.typeof(x).sharding.spec)


def partitioned(home: Any) -> dict[str, Any]:
    """Returns the arguments of a product of JAX that say its partition."""
    return {} if home is None else {"out_sharding": home}
