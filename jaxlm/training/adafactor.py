"""Adafactor (Shazeer & Stern 2018) for stacks of weights: each layer's and each expert's weight is one by itself.

Optax takes an array for a weight: it would factor a stack's moments over its layers, and one layer's large gradient or
small weights would decide how far all move.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.core.spec import Spec

DECAY, EPSILON = 0.8, 1e-30
LEAST_FACTORED = 128  # moments of matrices with a smaller side are kept whole
CLIP, LEAST_RMS = 1.0, 1e-3


class FactoredState(NamedTuple):
    """The state holds averages of squared gradients, of which each weight has either both factors or the whole."""

    count: jax.Array  # type: ignore[assignment]  # hides a method of tuples
    v_row: Any
    v_col: Any
    v: Any


def chain(specs: Any) -> optax.GradientTransformation:
    """Returns updates by factored second moments, clipped to RMS 1 and scaled by each weight's own RMS."""

    def clipped(updates: Any, params: Any) -> Any:
        return _each(lambda u, s: u / jnp.maximum(1.0, _rms(u, s) / CLIP), updates, specs)

    def scaled(updates: Any, params: Any) -> Any:
        return _each(lambda u, p, s: u * jnp.maximum(_rms(p, s), LEAST_RMS), updates, params, specs)

    return optax.chain(_scale_by_factored_rms(specs), optax.stateless(clipped), optax.stateless(scaled))


def own_axes(s: Spec) -> tuple[int, ...]:
    """Returns the dimensions of one weight of a stack: all but layers and experts."""
    return tuple(i for i, axis in enumerate(s.axes) if axis not in ("layers", "experts"))


def _factored(s: Spec) -> tuple[int, int] | None:
    """Returns the two largest dimensions of a weight, the largest last; None: its moments are kept whole."""
    order = sorted(own_axes(s), key=lambda i: s.shape[i])
    return (order[-2], order[-1]) if len(order) > 1 and s.shape[order[-2]] >= LEAST_FACTORED else None


def _each(f: Callable[..., Any], first: Any, *rest: Any) -> Any:
    """Maps over the weights that an optimizer was handed; it may have been handed a part of the tree."""
    hole = lambda x: x is None or isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(lambda x, *others: x if hole(x) else f(x, *others), first, *rest, is_leaf=hole)


def _rms(x: jax.Array, s: Spec) -> jax.Array:
    return jnp.sqrt(jnp.square(x).mean(own_axes(s), keepdims=True))


def _scale_by_factored_rms(specs: Any) -> optax.GradientTransformation:
    unused = lambda p: jnp.zeros((1,), p.dtype)  # noqa: E731

    def without(p: jax.Array, s: Spec, which: int) -> jax.Array:
        if (dims := _factored(s)) is None:
            return unused(p)
        return jnp.zeros(tuple(n for i, n in enumerate(p.shape) if i != dims[which]), p.dtype)

    def init(params: Any) -> FactoredState:
        return FactoredState(
            count=jnp.zeros((), jnp.int32),
            v_row=_each(lambda p, s: without(p, s, 1), params, specs),
            v_col=_each(lambda p, s: without(p, s, 0), params, specs),
            v=_each(lambda p, s: jnp.zeros_like(p) if _factored(s) is None else unused(p), params, specs),
        )

    def update(updates: Any, state: FactoredState, params: Any = None) -> tuple[Any, FactoredState]:
        decay = 1 - (state.count + 1.0) ** -DECAY

        def averaged(old: Any, over: int | None) -> Any:
            """Returns averages of squares over one of the two factored dimensions, or of the squares themselves."""

            def one(g: jax.Array, m: jax.Array, s: Spec) -> jax.Array:
                dims, square = _factored(s), jnp.square(g) + EPSILON
                if (dims is None) != (over is None):
                    return m
                return decay * m + (1 - decay) * (square if dims is None or over is None else square.mean(dims[over]))

            return _each(one, updates, old, specs)

        def scaled(g: jax.Array, row: jax.Array, col: jax.Array, v: jax.Array, s: Spec) -> jax.Array:
            if (dims := _factored(s)) is None:
                return g * v**-0.5
            d1, d0 = dims
            row /= row.mean(d1 - 1 if d1 > d0 else d1, keepdims=True)
            return g * jnp.expand_dims(row**-0.5, d0) * jnp.expand_dims(col**-0.5, d1)

        new = FactoredState(
            state.count + 1, averaged(state.v_row, 1), averaged(state.v_col, 0), averaged(state.v, None)
        )
        return _each(scaled, updates, new.v_row, new.v_col, new.v, specs), new

    return optax.GradientTransformation(init, update)
