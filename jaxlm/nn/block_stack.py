"""Running a model's layers: scanned or unrolled, recomputed, cached, and over pipeline stages."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from jaxlm.core.spec import Spec
from jaxlm.nn import pipeline
from jaxlm.nn.cache import Cache
from jaxlm.nn.layers import subkeys
from jaxlm.nn.layout import Layout, own_einsum
from jaxlm.nn.remat import named, remat_policy
from jaxlm.runtime.mesh import platform

# (weights, x, what else belongs to its rows, dropout key, kind of layer, what its cache keeps) → (x, what it keeps)
Block = Callable[[Any, Any, Any, jax.Array | None, Any, Any], tuple[Any, Any]]


def scanned(shard: Layout) -> bool:
    """Whether layers are a loop. XLA runs a loop's body slower on a CPU: unrolled, a forward took 0.6 of the time."""
    choice = shard.execution.scan
    return platform() != "cpu" if choice is None else choice


def run_blocks(
    block: Block,
    params: Any,
    specs: Any,
    x: Any,
    rows: Any = None,
    *,
    shard: Layout,
    key: jax.Array | None,
    kinds: Sequence[Any] | None = None,
    cache: Cache | None = None,
) -> tuple[Any, Cache | None]:
    """Apply layers in order, scanned or unrolled, with remat by name → (x, cache with what the layers keep).

    `params` is one tree of weights stacked along their first axis, or a tuple of trees, one a layer. `rows` holds all
    arrays `[B, …]` that blocks need besides `x`: they may be handed a part of the rows, so no block may take such from
    elsewhere. `kinds` says what differs between layers but their weights (a window, no rotation); it is static. A
    scan's body holds one period of the kinds. With a cache layers are always unrolled: a scan would copy the whole
    cache for each token. On a mesh with stages each has its part of the layers, but for a stack of fewer layers than
    stages, and with a cache: then all stages compute the same.
    """
    split = isinstance(params, tuple)
    n = len(params) if split else jax.tree.leaves(params)[0].shape[0]
    kinds = [None] * n if kinds is None else list(kinds)
    assert len(kinds) == n
    keys: Any = None if key is None else jax.random.split(key, n)

    def layer(kind: Any, x: Any, rows: Any, p: Any, k: Any, kept: Any) -> tuple[Any, Any]:
        x = jax.tree.map(lambda a: named(a, "input", shard), x)
        return block(_gathered(p, specs, shard), x, rows, k, kind, kept)

    again: Any = lambda f, **_: f  # noqa: E731
    if cache is None and (shard.execution.remat != "none" or shard.gathers):
        again = partial(jax.checkpoint, policy=remat_policy(shard.execution), prevent_cse=not scanned(shard))
    if cache is None and not split and 1 < pipeline.stages() <= n:
        each = pipeline.depth(pipeline.stages(), shard.mesh.rounds, kinds)

        def stage(params: Any, x: Any, rows: Any, keys: Any) -> Any:
            return _in_order(layer, kinds[:each], x, rows, params, keys, shard)

        stage = again(stage)  # all of a stage's layers are computed again, from what the stage was handed
        return pipeline.run(stage, each, params, x, rows, keys, shard=shard), None
    layer = again(layer, static_argnums=0)
    if cache is None and not split:
        return _in_order(layer, kinds, x, rows, params, keys, shard), None
    kept = []
    for i in range(n):
        p = params[i] if split else jax.tree.map(lambda w, i=i: w[i], params)
        x, now = layer(
            kinds[i], x, rows, p, None if keys is None else keys[i], None if cache is None else cache.layers[i]
        )
        kept.append(now)
    return x, None if cache is None else cache.replace(layers=tuple(kept), fresh=False)


def _in_order(layer: Any, kinds: Sequence[Any], x: Any, rows: Any, params: Any, keys: Any, shard: Layout) -> Any:
    """Stacked layers one after another, scanned or unrolled; `keys` is None or one a layer."""
    n = len(kinds)
    if not scanned(shard):
        for i in range(n):
            p, k = jax.tree.map(lambda w, i=i: w[i], (params, keys))
            x, _ = layer(kinds[i], x, rows, p, k, None)
        return x
    for start, stop, period in stretches(kinds):

        def several(x: Any, inputs: Any, first: int = start, period: int = period) -> tuple[Any, None]:
            for i in range(period):
                p, k = jax.tree.map(lambda w, i=i: w[i], inputs) if period > 1 else inputs
                x, _ = layer(kinds[first + i], x, rows, p, k, None)
            return x, None

        def cut(w: jax.Array, start: int = start, stop: int = stop, period: int = period) -> jax.Array:
            w = w if stop - start == n else w[start:stop]
            return w if period == 1 else w.reshape(-1, period, *w.shape[1:])

        x, _ = jax.lax.scan(several, x, jax.tree.map(cut, (params, keys)))
    return x


def run_stacks(
    block: Block,
    stacks: Sequence[tuple[Any, Any, Sequence[Any]]],
    x: Any,
    rows: Any = None,
    *,
    shard: Layout,
    key: jax.Array | None,
    cache: Cache | None = None,
) -> tuple[Any, Cache | None]:
    """`run_blocks` over (params, specs, kinds) one after another: layers whose weights differ in shape."""
    kept: tuple = ()
    for (params, specs, kinds), k in zip(stacks, subkeys(key, len(stacks)), strict=True):
        part = None if cache is None else cache.replace(layers=cache.layers[len(kept) : len(kept) + len(kinds)])
        x, part = run_blocks(block, params, specs, x, rows, shard=shard, key=k, kinds=kinds, cache=part)
        kept += () if part is None else part.layers
    return x, None if cache is None else cache.replace(layers=kept, fresh=False)


def layout_of(s: Spec, shard: Layout) -> Layout:
    """The layout that a layer's weight is used by. Routers stay float32: a rounded score sends tokens elsewhere."""
    if "router" not in s.axes:
        return shard
    return dataclasses.replace(shard, execution=dataclasses.replace(shard.execution, dtype="float32"))


def _gathered(params: Any, specs: Any, shard: Layout) -> Any:
    """Weights as a block uses them."""
    return jax.tree.map(lambda w, s: layout_of(s, shard).gather(w, s), params, specs, is_leaf=own_einsum)


def stretches(kinds: Sequence[Any]) -> list[tuple[int, int, int]]:
    """(first layer, end, period) of each loop over layers: one for a repeating pattern and one for what it leaves over;
    where nothing repeats, one for each run of equal layers."""
    n = len(kinds)
    for period in range(1, n // 2 + 1):
        if all(kinds[i] == kinds[i % period] for i in range(n)):
            whole = n // period * period
            return [(0, whole, period)] + ([(whole, n, n - whole)] if whole < n else [])
    ends = list(itertools.accumulate(len(list(run)) for _, run in itertools.groupby(kinds)))
    return [(a, b, 1) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def repeated(pattern: Sequence[Any], n: int) -> list[Any]:
    """Returns one value for each of `n` layers: the pattern over and over."""
    return [pattern[i % len(pattern)] for i in range(n)]


def pattern(values: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest prefix that, repeated, gives all of them: (a, b, a, b, a) → (a, b)."""
    for n in range(1, len(values)):
        if all(v == values[i % n] for i, v in enumerate(values)):
            return tuple(values[:n])
    return tuple(values)
