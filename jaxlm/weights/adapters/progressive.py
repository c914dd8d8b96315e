"""Progressive columns (Rusu et al. 2016) in a Transformer: every task has a column of bottlenecks of its own on the
frozen base, which reads the activations of the columns before it.

At each place with the state x, column k has z_k = act(x·D_k + b_k + Σ_{j<k} z_j·L_kj), and the output of task k is
x + z_k·U_k + c_k: of the columns' outputs only its own counts. Columns of earlier tasks stay as they were, so that each
of them computes bit for bit what it did. U_k, c_k and L_kj begin as zeros: a new task begins as the base alone, and
gradients reach D_k, b_k and L_kj from the second update on.

D model width, N bottleneck's width, C columns before the newest.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp

from jaxlm.core.config import Adapter
from jaxlm.core.ranges import Natural
from jaxlm.core.spec import Init, Spec, fan_in, zeros
from jaxlm.nn.layers import ACTIVATIONS, add_bias
from jaxlm.nn.layout import Layout
from jaxlm.weights.adapters import bottleneck
from jaxlm.weights.adapters.bottleneck import Bottleneck, BottleneckAdapter
from jaxlm.weights.adapters.method import Columns, Growth, Method, Specs, Weights
from jaxlm.weights.matrices import Matrix

EACH = {"down": 2, "down_bias": 1, "up": 2, "up_bias": 1}
"""A column's weights, with their dimensions in one layer; those of earlier columns are stacked in `previous_…`."""
LATERALS = "previous_lateral"  # C C N N: from the second index to the first; zero where it isn't before it
USED = ("lateral", "previous_down", "previous_down_bias", LATERALS)


@dataclass(frozen=True, kw_only=True)
class Progressive(BottleneckAdapter):
    """Bottlenecks stand after attention and ffn, a column of them for each task (progressive columns, Rusu et al.
    2016). A run that starts from a run with it adds a column, which reads those before."""

    previous: Natural = 0
    """How many columns earlier tasks have; the model that a run starts from says it."""


class Column(Bottleneck):
    """Holds a matrix and the bottleneck of the newest column behind it."""

    lateral: jax.Array | None = None
    """C N N."""
    previous_down: jax.Array | None = None
    """C D N."""
    previous_down_bias: jax.Array | None = None
    """C N."""
    previous_lateral: jax.Array | None = None
    vectors: ClassVar[tuple[str, ...]] = ("down_bias", "up_bias", "previous_down_bias")

    def _hidden(self, x_BTD: jax.Array, shard: Layout) -> jax.Array:
        h_BTN = super()._hidden(x_BTD, shard)
        if self.lateral is None:
            return h_BTN
        assert self.previous_down is not None and self.previous_down_bias is not None
        assert self.previous_lateral is not None
        act, before = ACTIVATIONS[self.activation], list[jax.Array]()
        for j in range(len(self.lateral)):
            own_BTN = shard.einsum("btd,dn->btn", x_BTD, self.previous_down[j], "batch", "seq", None)
            own_BTN = add_bias(own_BTN, self.previous_down_bias[j])
            before.append(act(_with(own_BTN, before, self.previous_lateral[j], shard)))
        return _with(h_BTN, before, self.lateral, shard)

    def gathered(self, s: Spec, shard: Layout) -> "Column":
        found = {name: w for name in USED if (w := getattr(self, name)) is not None}
        used = {n: w if n in self.vectors else w.astype(shard.dtype) for n, w in found.items()}
        used = {n: shard(w, *[None] * w.ndim) for n, w in used.items()}
        return cast(Column, super().gathered(s, shard).replace(**used))


def _with(h_BTN: jax.Array, before: list[jax.Array], lateral_CNN: jax.Array, shard: Layout) -> jax.Array:
    """Adds to a column what it reads of those before."""
    for z_BTN, w_NN in zip(before, lateral_CNN, strict=False):
        h_BTN += shard.einsum("btn,nm->btm", z_BTN, w_NN, "batch", "seq", None)
    return h_BTN


def _drawn_anew(init: Init, number: int) -> Init:
    """Returns an initializer that draws other numbers: with the same seed all columns would begin alike."""
    return lambda key, shape: init(jax.random.fold_in(key, number), shape)


def specs(c: Progressive, target: Matrix) -> Specs:
    own, C = bottleneck.of_output(c, target), c.previous
    if not C:
        return own
    N = own["down"].shape[1]
    own["down"] = own["down"]._replace(init=_drawn_anew(own["down"].init, C))
    before = {
        f"previous_{n}": s._replace(shape=(C, *s.shape), axes=(None, *s.axes), init=zeros) for n, s in own.items()
    }
    before["previous_down"] = before["previous_down"]._replace(init=fan_in(1))
    lateral = Spec((C, N, N), (None, None, None), zeros)
    return own | before | {"lateral": lateral, LATERALS: Spec((C, C, N, N), (None,) * 4, zeros)}


def bind(c: Progressive, target: Matrix, base: Any, adapter: Weights, shared: Weights, key: jax.Array | None) -> Column:
    used = {name: w for name, w in adapter.items() if name in (*EACH, *USED)}
    return Column(base, **used, activation="silu", scale=1.0, parallel=False)


def settings_after(c: Progressive, before: Adapter) -> Progressive:
    """Returns the settings of a run that starts from a model with the adapter `before`. ValueError: the columns would
    be of unlike width."""
    if not isinstance(before, Progressive):
        return dataclasses.replace(c, previous=0)
    if before.reduction != c.reduction:
        raise ValueError(
            f"adapter.reduction: {c.reduction:g}, and the columns before have {before.reduction:g}; all are of one "
            "width, so leave it out"
        )
    return dataclasses.replace(c, previous=before.previous + 1)


def grown(c: Progressive, before: Progressive, target: Matrix, adapter: Weights) -> Weights:
    """Returns the columns of earlier tasks from all of the adapter before, its newest the last."""
    out: Weights = {}
    for name, ndim in EACH.items():
        newest = jnp.expand_dims(adapter[name], -1 - ndim)
        parts = [adapter[f"previous_{name}"]] if before.previous else []
        out[f"previous_{name}"] = jnp.concatenate([*parts, newest], -1 - ndim)
    N = adapter["down"].shape[-1]
    if before.previous:
        wider = [jnp.expand_dims(adapter["lateral"], -4), adapter[LATERALS]]
        new, old = (jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, 1), (0, 0), (0, 0)]) for x in wider)
        out[LATERALS] = jnp.concatenate([old, new], -4)
    else:
        out[LATERALS] = jnp.zeros((*adapter["down"].shape[:-2], 1, 1, N, N), adapter["down"].dtype)
    return out


def column(adapter: Weights, number: int) -> Weights:
    """Returns the adapter as it was when a column was the newest."""
    at: Callable[..., jax.Array] = jax.lax.index_in_dim
    out = {n: at(adapter[f"previous_{n}"], number, -1 - ndim, keepdims=False) for n, ndim in EACH.items()}
    if not number:
        return out
    first: Callable[..., jax.Array] = jax.lax.slice_in_dim
    before = {f"previous_{n}": first(adapter[f"previous_{n}"], 0, number, axis=-1 - ndim) for n, ndim in EACH.items()}
    laterals = first(adapter[LATERALS], 0, number, axis=-3)
    lateral = at(laterals, number, -4, keepdims=False)
    return out | before | {"lateral": lateral, LATERALS: first(laterals, 0, number, axis=-4)}


method = Method[Progressive](
    Config=Progressive,
    targets=bottleneck.houlsby.targets,
    specs=specs,
    bind=bind,
    frozen=(*(f"previous_{name}" for name in EACH), LATERALS),
    growth=Growth[Progressive](
        bases=(Progressive,),
        settings=settings_after,
        weights=grown,
        columns=Columns[Progressive](
            last=lambda c: c.previous, settings=lambda c, k: dataclasses.replace(c, previous=k), weights=column
        ),
    ),
    mergeable=False,
    defining=("reduction",),
)
