"""Records what a calibration tells of the inputs of a matrix: means over tokens, and the second moments that GPTQ calls
Hessian.

Means are merged as means, never as growing sums, so that float32 holds any number of tokens; inputs in float64 stay so.
N tokens, I inputs; `lead` stands for layers, experts or nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

HIGHEST = jax.lax.Precision.HIGHEST


def sums(x: jax.Array, weights: jax.Array, hessian: bool) -> dict[str, jax.Array]:
    """Returns the weighted sums over tokens of inputs `[N, I]`, each with its weight `[N]` of 0 (padding) or more.

    `count []`, `square [I]`, `abs [I]`, the largest magnitude `largest [I]`, and with `hessian` `outer [I, I]`, the sum
    of x xᵀ. What padding holds, NaN too, counts for nothing.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    weights = weights.astype(dtype)
    x = jnp.where(weights[:, None] > 0, x.astype(dtype), 0)
    weighted = x * weights[:, None]
    found = dict(
        count=weights.sum(), square=(weighted * x).sum(0), abs=jnp.abs(weighted).sum(0), largest=jnp.abs(x).max(0)
    )
    return found | ({"outer": jnp.dot(weighted.T, x, precision=HIGHEST)} if hessian else {})


class Statistics(struct.PyTreeNode):
    """A Statistics record holds means over the inputs of a matrix, or with leading dimensions of many."""

    count: jax.Array
    """How much the tokens weigh together, `[*lead]`."""
    mean_square: jax.Array
    """The mean of each input's square, `[*lead, I]`."""
    mean_abs: jax.Array
    largest: jax.Array
    """The largest magnitude of each input, `[*lead, I]`."""
    hessian: jax.Array | None
    """The mean of x xᵀ, `[*lead, I, I]`; None: it wasn't asked for."""

    @classmethod
    def none(cls, inputs: int, lead: tuple[int, ...] = (), hessian: bool = True, dtype: Any = jnp.float32) -> Any:
        """Returns the record of no tokens."""
        each = jnp.zeros((*lead, inputs), dtype)
        square = jnp.zeros((*lead, inputs, inputs), dtype) if hessian else None
        return cls(jnp.zeros(lead, dtype), each, each, each, square)

    @classmethod
    def of(cls, x: jax.Array, weights: jax.Array | None = None, hessian: bool = True) -> Any:
        """Returns the record of inputs `[…, I]` with weights `[…]`, by default all 1.

        Under `vmap` over weights `[E, …]` it is that of experts, to each of which some tokens go."""
        w = jnp.ones(x.shape[:-1], jnp.float32) if weights is None else weights
        if w.shape != x.shape[:-1]:
            raise ValueError(f"weights: {w.shape} are not those of inputs {x.shape}; give {x.shape[:-1]}")
        return cls.from_sums(sums(x.reshape(-1, x.shape[-1]), w.reshape(-1), hessian))

    @classmethod
    def from_sums(cls, s: dict[str, jax.Array]) -> Any:
        """Returns the record of what `sums` returned, with any leading dimensions."""
        n = jnp.maximum(s["count"], jnp.finfo(s["count"].dtype).tiny)
        outer = s["outer"] / n[..., None, None] if "outer" in s else None
        return cls(s["count"], s["square"] / n[..., None], s["abs"] / n[..., None], s["largest"], outer)

    def merge(self, other: "Statistics") -> "Statistics":
        """Returns the record of both records' tokens."""
        count = self.count + other.count
        share = other.count / jnp.maximum(count, jnp.finfo(count.dtype).tiny)

        def mean(a: jax.Array, b: jax.Array) -> jax.Array:
            return a + (b - a) * share.reshape(*share.shape, *(1,) * (a.ndim - share.ndim))

        if (self.hessian is None) != (other.hessian is None):
            raise ValueError("hessian: one of the records has none; record both with it or both without")
        return Statistics(
            count,
            mean(self.mean_square, other.mean_square),
            mean(self.mean_abs, other.mean_abs),
            jnp.maximum(self.largest, other.largest),
            None if self.hessian is None or other.hessian is None else mean(self.hessian, other.hessian),
        )

    def add(self, x: jax.Array, weights: jax.Array | None = None) -> "Statistics":
        """Returns the record with one more batch of inputs `[…, I]`."""
        return self.merge(Statistics.of(x, weights, self.hessian is not None))

    def needed_hessian(self) -> jax.Array:
        """Returns the Hessian; raises ValueError where none was recorded."""
        if self.hessian is None:
            raise ValueError("statistics: this method needs the Hessian; record it with hessian=True")
        return self.hessian

    def error(self, difference: jax.Array) -> jax.Array:
        """Returns each output's mean squared error `[O]` over the tokens where the weight differs by `[I, O]`: exactly
        with a Hessian, else as if inputs were uncorrelated. Without leading dimensions."""
        if self.hessian is None:
            return (self.mean_square[:, None] * jnp.square(difference)).sum(0)
        return jnp.maximum((difference * jnp.dot(self.hessian, difference, precision=HIGHEST)).sum(0), 0)


def check(statistics: Statistics, path: str, lead: str = "layer") -> None:
    """Refuses a record that no token reached, or one of inputs that aren't finite; `lead` says what its leading
    dimension counts. It waits for the device."""
    counts = np.asarray(statistics.count)
    if not counts.all():
        where = f"{path}, {lead} {', '.join(map(str, np.argwhere(counts == 0)[0]))}" if counts.ndim else path
        raise ValueError(f"calibration: no token reached {where}; give more text, or leave the weight as it is")
    bad = ~np.isfinite(np.asarray(statistics.mean_square)).all(-1)
    if bad.any():
        where = f"{path}, {lead} {', '.join(map(str, np.argwhere(bad)[0]))}" if bad.ndim else path
        raise ValueError(f"calibration: inputs of {where} are NaN or infinite; check the model on this text")
