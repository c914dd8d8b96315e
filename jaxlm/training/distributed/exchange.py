"""Computes the mean of the workers' weights: what travels over the mesh's `replica` axis, and how many bytes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.core.distributed import Distributed
from jaxlm.training.distributed import compression

AXIS = "replica"
LARGE = 1 << 16
"""Numbers on a device from which a weight is exchanged by itself; smaller ones travel together as one vector. One
vector of all would be made, and taken apart, by copies of everything."""

LANES = 128
"""What the rows of arrays in a TPU's memory are a multiple of."""


def mean(
    c: Distributed, part: dict[str, Any], weights: dict[str, Any], error: dict[str, Any] | None, learned: Any,
    homes: dict[str, Any], mesh: jax.sharding.Mesh | None, beside: jax.Array | None = None,
) -> tuple[dict[str, Any], dict[str, Any] | None]:  # fmt: skip
    """Returns the mean of the workers' weights as it arrives, and the errors that they keep.

    `beside`: [W], whether each worker's update is finite (1 or 0), of a step that computes meanwhile. What a worker's
    devices tell each other follows it, else a compiler may make one message of that and of the step's own, which would
    then wait for what arrives.
    """
    share = None if learned is None else learned / jnp.maximum(jnp.sum(learned), 1e-30)
    free_axes = {path: _free(home, mesh) for path, home in homes.items()}

    def local(part: Any, weights: Any, error: Any, share: Any, beside: Any) -> tuple[Any, Any]:
        means: dict[str, Any] = {}
        errors: dict[str, Any] = {}
        groups: dict[tuple[tuple[str, ...], str], list[str]] = {}
        for path, free in free_axes.items():
            groups.setdefault((free, path if weights[path].size >= LARGE else ""), []).append(path)
        for (free, _), paths in groups.items():
            own = None if error is None else [error[n] for n in paths]
            arrived, kept = _mean_of_group(
                c, [part[n] for n in paths], [weights[n] for n in paths], own, share, free, mesh, beside
            )
            means |= dict(zip(paths, arrived, strict=True))
            errors |= {} if kept is None else dict(zip(paths, kept, strict=True))
        return means, errors if error is not None else None

    if mesh is None:
        return local(part, weights, error, share, beside)
    one = {path: home.spec for path, home in homes.items()}
    many = {path: P(AXIS, *spec) for path, spec in one.items()}
    return jax.shard_map(
        local, mesh=mesh, check_vma=False,
        in_specs=(many, one, None if error is None else many, None if share is None else P(),
                  None if beside is None else P(AXIS)),
        out_specs=(one, None if error is None else many),
    )(part, weights, error, share, beside)  # fmt: skip


def _free(home: Any, mesh: jax.sharding.Mesh | None) -> tuple[str, ...]:
    """Returns the axes of a worker's mesh over which a weight is not cut: their devices hold the same."""
    if mesh is None:
        return ()
    used = {a for axes in home.spec if axes is not None for a in ((axes,) if isinstance(axes, str) else axes)}
    return tuple(a for a in mesh.axis_names if a != AXIS and mesh.shape[a] > 1 and a not in used)


def _mean_of_group(
    c: Distributed, part: list[Any], weights: list[Any], error: list[Any] | None, share: Any,
    free: tuple[str, ...], mesh: jax.sharding.Mesh | None, beside: jax.Array | None,
) -> tuple[list[Any], list[Any] | None]:  # fmt: skip
    """Returns means and errors of weights that are cut alike, on a device: all are one vector, of which it exchanges
    its share."""
    replicas = 1 if mesh is None else mesh.shape[AXIS]
    ways = 1 if mesh is None else math.prod(mesh.shape[a] for a in free)
    local = part[0].shape[0]
    count = sum(w.size for w in weights)
    length = -(-count // (ways * compression.BLOCK)) * compression.BLOCK if ways > 1 else count
    mine = jax.lax.axis_index(free) * length if ways > 1 else 0
    # Another shape may be another layout, and then it is a copy. But of what is cut from a weight a TPU fills up narrow
    # rows, and sends what it filled in.
    narrow = c.fragments > 1 and weights[0].ndim > 0 and weights[0].shape[-1] % LANES > 0
    as_it_is = c.compress in ("none", "bfloat16") and ways == 1 and len(weights) == 1 and not narrow

    def vector(arrays: list[Any], many: bool) -> jax.Array:
        if as_it_is:
            return arrays[0].astype(jnp.float32)
        lead = (local,) if many else ()
        flat = jnp.concatenate([a.astype(jnp.float32).reshape(*lead, -1) for a in arrays], axis=-1)
        if ways == 1:
            return flat
        flat = jnp.pad(flat, [(0, 0)] * len(lead) + [(0, ways * length - count)])
        return jax.lax.dynamic_slice_in_dim(flat, mine, length, axis=-1)

    def arrays(x: jax.Array, many: bool) -> list[Any]:
        if as_it_is:
            return [x]
        if ways > 1:
            if beside is not None:  # a barrier would be gone before compilers put messages together
                x = jnp.where(jnp.max(beside) > 1, 0.0, x)
            x = jax.lax.all_gather(x, free, axis=x.ndim - 1, tiled=True)
        out, at = [], 0
        for w in weights:
            out.append(x[..., at : at + w.size].reshape((local, *w.shape) if many else w.shape))
            at += w.size
        return out

    first = 0 if replicas == 1 else jax.lax.axis_index(AXIS) * local
    own = None if share is None else jax.lax.dynamic_slice_in_dim(share, first, local)
    x_WN = vector(part, True)
    if c.compress == "none":
        total = jnp.sum(x_WN if own is None else own.reshape(-1, *(1,) * (x_WN.ndim - 1)) * x_WN, axis=0)
        total = total if replicas == 1 else jax.lax.psum(total, AXIS)
        return arrays(total / (replicas * local) if own is None else total, False), None
    g_N = vector(weights, False)
    delta_WN = g_N[None] - x_WN
    kept = None if error is None else vector(error, True)
    pack = lambda d, e: compression.with_feedback(c.compress, d, e, c.error_decay)  # noqa: E731
    packed, left = jax.vmap(pack)(delta_WN, jnp.zeros_like(delta_WN) if kept is None else kept)
    if replicas > 1:
        packed = {name: jax.lax.all_gather(x, AXIS, axis=0, tiled=True) for name, x in packed.items()}
    shares = jnp.full(replicas * local, 1 / (replicas * local)) if share is None else share

    def add(total: jax.Array, each: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
        return total + each[1] * compression.decompress(c.compress, each[0], total.size), None

    mean_N, _ = jax.lax.scan(add, jnp.zeros_like(g_N), (packed, shares))
    return arrays(g_N - mean_N, False), None if kept is None else arrays(left, True)
