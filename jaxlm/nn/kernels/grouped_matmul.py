"""Rows times the matrix of their group: what experts without a capacity compute.

P rows, those of a group next to each other and the groups in order, G groups, D and F the sides of a matrix.
XLA's `ragged_dot` multiplies all rows with the matrices of all groups, on a CPU and a GPU always and on a TPU for the
matrices' gradients. Here each row meets its own matrix alone: by JAX's kernels on a TPU, elsewhere block after block.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn import pipeline
from jaxlm.runtime.mesh import platform

INTERPRET = False  # for tests without a TPU
WIDTH = 1024  # of a kernel's tile, at most
ROWS = 512  # of a block or a kernel's tile, at most: enough to make reading a matrix worth while
BLOCK = {"cpu": 128}  # where fewer rows are better: what caches hold

Run = Callable[[Any, jax.Array], jax.Array]


def way() -> tuple[str, str]:
    """How rows meet their matrices on this backend, in a word and in words."""
    if platform() == "tpu":
        return "kernel", "JAX's grouped products for TPUs"
    return "blocks", "blocks of rows of one expert, one after another"


def checked() -> bool:
    """Whether `shard_map` may check what differs between devices: a kernel says nothing of it."""
    return way()[0] == "blocks"


def block(rows: int, groups: int) -> int:
    """Rows of a block or of a kernel's tile: no more than one group has if all have the same."""
    kernel = way()[0] == "kernel"
    low, high = (128, ROWS) if kernel else (8, BLOCK.get(platform(), ROWS))
    return 1 << int(math.log2(min(high, max(low, rows // groups))))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def dot(x_PD: jax.Array, w_GDF: jax.Array, size_G: jax.Array, tile: int) -> jax.Array:
    """`[P, F]`. Rows past the last group get whatever was in memory, also as gradients. P is a multiple of `tile`."""
    return _kernel("gmm", x_PD, w_GDF, size_G, x_PD.dtype, (tile, *w_GDF.shape[1:]))


def _dot_forward(x_PD, w_GDF, size_G, tile):
    return dot(x_PD, w_GDF, size_G, tile), (x_PD, w_GDF, size_G)


def _dot_backward(tile, kept, dy_PF):
    x_PD, w_GDF, size_G = kept
    D, F = w_GDF.shape[1:]
    dx_PD = _kernel("gmm", dy_PF, w_GDF, size_G, x_PD.dtype, (tile, F, D), transpose_rhs=True)
    dw_GDF = _kernel("tgmm", x_PD.T, dy_PF, size_G, w_GDF.dtype, (tile, D, F))
    return dx_PD, dw_GDF, None


dot.defvjp(_dot_forward, _dot_backward)


def _kernel(name: str, a: jax.Array, b: jax.Array, size_G: jax.Array, dtype: Any, most: Any, **more: Any) -> jax.Array:
    """MegaBlocks (Gale et al. 2022) as JAX has it. `most`: rows of a tile, and the sides that tiles are cut of."""
    from jax.experimental.pallas.ops.tpu.megablox import ops

    tiles = (most[0], *(min(WIDTH, n) for n in most[1:]))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return getattr(ops.backend, name)(a, b, size_G, dtype, tiles, interpret=INTERPRET, **more)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_blocks(run: Run, w: Any, x_PD: jax.Array, group_N: jax.Array, used: jax.Array) -> jax.Array:
    """`[P, D]`: the first `used` of N blocks of rows, each by `run(matrices of its group, rows)`; zeros after them."""
    size = x_PD.shape[0] // group_N.shape[0]

    def one(n: jax.Array, y_PD: jax.Array) -> jax.Array:
        y = run(_of(w, group_N[n]), _cut(x_PD, n, size))
        return jax.lax.dynamic_update_slice_in_dim(y_PD, y, n * size, 0)

    return _loop(group_N.shape[0], used, one, _zeros(x_PD))


def _in_blocks_forward(run, w, x_PD, group_N, used):
    return in_blocks(run, w, x_PD, group_N, used), (w, x_PD, group_N, used)


def _in_blocks_backward(run, kept, dy_PD):
    """The gradient of one group's matrices at a time adds up in float32, and rests after each of its blocks."""
    w, x_PD, group_N, used = kept
    size = x_PD.shape[0] // group_N.shape[0]

    def one(n, done):
        sums, dw, dx_PD = done
        group, goes_on = group_N[n], (n > 0) & (group_N[n] == group_N[jnp.maximum(n - 1, 0)])
        _, pull = jax.vjp(run, _of(w, group), _cut(x_PD, n, size))
        dw_n, dx = pull(_cut(dy_PD, n, size))
        sums = jax.tree.map(lambda a, b: jnp.where(goes_on, a, 0) + b.astype(a.dtype), sums, dw_n)
        dw = jax.tree.map(lambda d, a: d.at[group].set(a.astype(d.dtype)), dw, sums)
        return sums, dw, jax.lax.dynamic_update_slice_in_dim(dx_PD, dx, n * size, 0)

    start = jax.tree.map(lambda a: _zeros(a[0], jnp.float32), w), jax.tree.map(_zeros, w), _zeros(x_PD)
    _, dw, dx_PD = _loop(group_N.shape[0], used, one, start)
    return dw, dx_PD, None, None


in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def _loop(most: int, used: jax.Array, one: Callable[[jax.Array, Any], Any], start: Any) -> Any:
    """`fori_loop` to the number of blocks used. Its condition also names the most there can be, for who counts."""
    zero = jnp.zeros_like(used)
    return jax.lax.while_loop(
        lambda c: (c[0] < most) & (c[0] < used), lambda c: (c[0] + 1, one(*c)), (zero, start)
    )[1]  # fmt: skip


def _of(w: Any, group: jax.Array) -> Any:
    return jax.tree.map(lambda a: a[group], w)


def _cut(x_PD: jax.Array, n: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_PD, n * size, size)


def _zeros(x: jax.Array, dtype: Any = None) -> jax.Array:
    return pipeline.vary(jnp.zeros(x.shape, dtype or x.dtype), tuple(jax.typeof(x).manual_axis_type.varying))
