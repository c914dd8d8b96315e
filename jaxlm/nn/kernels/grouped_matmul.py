"""Multiplies rows by the matrix of their group, as experts without a capacity do.

P rows, those of a group next to each other and the groups in order, G groups, D and F the sides of a matrix. XLA's
`ragged_dot` multiplies all rows by the matrices of all groups: on a CPU and a GPU always, on a TPU for the matrices'
gradients. Here each row meets its own matrix alone: by JAX's kernels on a TPU, elsewhere block after block.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.nn import pipeline
from jaxlm.runtime.mesh import platform

INTERPRET = False  # for tests without a TPU
WIDTH = 1024  # the largest side of a kernel's tile
ROWS = 512  # the most rows of a block or a kernel's tile: enough to make reading a matrix worth while
BLOCK = {"cpu": 128}  # backends on which fewer rows are better, as their caches hold no more

Run = Callable[[Any, jax.Array], jax.Array]


@dataclass(frozen=True)
class GroupedMatmulChoice:
    """A GroupedMatmulChoice says how rows are multiplied by the matrices of their groups."""

    method: Literal["kernel", "blocks"]
    description: str
    """The method as people read it."""


def choose() -> GroupedMatmulChoice:
    """Returns how rows are multiplied by their matrices on this backend."""
    if platform() == "tpu":
        return GroupedMatmulChoice("kernel", "JAX's grouped products for TPUs")
    return GroupedMatmulChoice("blocks", "blocks of rows of one expert, one after another")


def types_checked() -> bool:
    """Returns whether `shard_map` may check what differs between devices, which a kernel doesn't say."""
    return choose().method == "blocks"


def block_size(rows: int, groups: int) -> int:
    """Returns the rows of a block or of a kernel's tile: no more than each group has if all have the same."""
    kernel = choose().method == "kernel"
    low, high = (128, ROWS) if kernel else (8, BLOCK.get(platform(), ROWS))
    return 1 << int(math.log2(min(high, max(low, rows // groups))))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def dot(x_PD: jax.Array, w_GDF: jax.Array, size_G: jax.Array, tile: int) -> jax.Array:
    """Returns the products `[P, F]` of rows and their groups' matrices, by a kernel; `tile` divides P.

    Rows past the last group get whatever was in memory, also as gradients.
    """
    return _kernel("gmm", x_PD, w_GDF, size_G, x_PD.dtype, (tile, *w_GDF.shape[1:]))


def _dot_forward(x_PD, w_GDF, size_G, tile):
    return dot(x_PD, w_GDF, size_G, tile), (x_PD, w_GDF, size_G)


def _dot_backward(tile, saved, dy_PF):
    x_PD, w_GDF, size_G = saved
    D, F = w_GDF.shape[1:]
    dx_PD = _kernel("gmm", dy_PF, w_GDF, size_G, x_PD.dtype, (tile, F, D), transpose_rhs=True)
    dw_GDF = _kernel("tgmm", x_PD.T, dy_PF, size_G, w_GDF.dtype, (tile, D, F))
    return dx_PD, dw_GDF, None


dot.defvjp(_dot_forward, _dot_backward)


def _kernel(
    name: str, a: jax.Array, b: jax.Array, size_G: jax.Array, dtype: Any, largest: Any, **options: Any
) -> jax.Array:
    """Runs a kernel of MegaBlocks (Gale et al. 2022) as JAX has it.

    `largest` gives the rows of a tile, and the sides of the matrix, which bound those of a tile.
    """
    from jax.experimental.pallas.ops.tpu.megablox import ops

    tiles = (largest[0], *(min(WIDTH, n) for n in largest[1:]))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return getattr(ops.backend, name)(a, b, size_G, dtype, tiles, interpret=INTERPRET, **options)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_blocks(run: Run, size: int, w: Any, x_PD: jax.Array, group_N: jax.Array, used: jax.Array) -> jax.Array:
    """Returns `run(matrices of its group, rows)` of the first `used` of N blocks of `size` rows, `[P, D]`, and zeros
    after them."""

    def one(n: jax.Array, y_PD: jax.Array) -> jax.Array:
        y = run(_select(w, group_N[n]), _cut(x_PD, n, size))
        return jax.lax.dynamic_update_slice_in_dim(y_PD, y, n * size, 0)

    return _loop(group_N.shape[0], used, one, _zeros(x_PD))


def _in_blocks_forward(run, size, w, x_PD, group_N, used):
    return in_blocks(run, size, w, x_PD, group_N, used), (w, x_PD, group_N, used)


def _in_blocks_backward(run, size, saved, dy_PD):
    """Adds up the gradient of one group's matrices at a time in float32, and stores it after each of the group's
    blocks."""
    w, x_PD, group_N, used = saved

    def one(n, carry):
        sums, dw, dx_PD = carry
        group, continues = group_N[n], (n > 0) & (group_N[n] == group_N[jnp.maximum(n - 1, 0)])
        _, pull = jax.vjp(run, _select(w, group), _cut(x_PD, n, size))
        dw_n, dx = pull(_cut(dy_PD, n, size))
        sums = jax.tree.map(lambda a, b: jnp.where(continues, a, 0) + b.astype(a.dtype), sums, dw_n)
        dw = jax.tree.map(lambda d, a: d.at[group].set(a.astype(d.dtype)), dw, sums)
        return sums, dw, jax.lax.dynamic_update_slice_in_dim(dx_PD, dx, n * size, 0)

    start = jax.tree.map(lambda a: _zeros(a[0], jnp.float32), w), jax.tree.map(_zeros, w), _zeros(x_PD)
    _, dw, dx_PD = _loop(group_N.shape[0], used, one, start)
    return dw, dx_PD, None, None


in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def _loop(limit: int, used: jax.Array, one: Callable[[jax.Array, Any], Any], start: Any) -> Any:
    """Runs a `fori_loop` over the blocks used. Its condition also names the most there can be, for those who count
    FLOPs."""
    zero = jnp.zeros_like(used)
    return jax.lax.while_loop(
        lambda c: (c[0] < limit) & (c[0] < used), lambda c: (c[0] + 1, one(*c)), (zero, start)
    )[1]  # fmt: skip


def _select(w: Any, group: jax.Array) -> Any:
    return jax.tree.map(lambda a: a[group], w)


def _cut(x_PD: jax.Array, n: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_PD, n * size, size)


def _zeros(x: jax.Array, dtype: Any = None) -> jax.Array:
    return pipeline.vary(jnp.zeros(x.shape, dtype or x.dtype), tuple(jax.typeof(x).manual_axis_type.varying))
