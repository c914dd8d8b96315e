"""Runs a model's layers: scanned or unrolled, recomputed, cached, and over pipeline stages."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxlm.core.spec import Spec, is_spec
from jaxlm.nn import pipeline
from jaxlm.nn.cache import Cache
from jaxlm.nn.layers import subkeys
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import is_leaf
from jaxlm.nn.matmul import WAYS, Activations, is_narrow
from jaxlm.nn.remat import named, remat_policy
from jaxlm.nn.taps import HIDDEN
from jaxlm.runtime.mesh import platform

# (weights, x, what else belongs to its rows, dropout key, kind of layer, its cache) → (x, its new cache)
Block = Callable[[Any, Any, Any, jax.Array | None, Any, Any], tuple[Any, Any]]


@dataclass
class Window:
    """A Window takes the place of a stack's weights in one call of a family's `forward`: only some layers of the stack
    run then, on states that are given, and it notes what states come and go.

    So a family that says nothing of single layers can be run layer by layer. It holds tracers: make one in each trace.
    """

    layers: Sequence[Any] = ()
    """The weights of the layers that run, one tree a layer; none: states pass as they are."""
    first: int = 0
    """The number of the first of them."""
    x: Any = None
    """The states that the first of them reads; None: those that reach the stack."""
    entered: Any = None
    """The states that reached the stack."""
    left: Any = None
    """The states that came out."""
    kinds: tuple[Any, ...] = ()
    """How all layers of the stack differ apart from their weights."""
    met: list["Window"] = field(default_factory=list)
    """Windows in the order in which `forward` comes to them, where they share this list."""


def scanned(shard: Layout) -> bool:
    """Returns whether layers are a loop of the program; by default they are, but on a CPU.

    XLA runs a loop's body slower on a CPU: unrolled, a forward pass took 0.6 of the time.
    """
    choice = shard.execution.scan
    return platform() != "cpu" if choice is None else choice


class _Kind(NamedTuple):
    """How a layer differs from others: what its model says, and whether it multiplies in few bits."""

    own: Any
    narrow: bool


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
    """Applies layers in order, scanned or unrolled, with remat by name; returns (x, cache with what the layers store).

    `params` is one tree of weights stacked along their first axis, a tuple of trees, one a layer, or a `Window`. `rows`
    holds all arrays `[B, …]` that blocks need besides `x`: they may be handed a part of the rows, so no block may take
    such from elsewhere. `kinds` says how layers differ apart from their weights (a window, no rotation); it is static.
    A scan's body holds one period of the kinds. With a cache layers are always unrolled: a scan would copy the whole
    cache for each token. On a mesh with stages each stage runs its part of the layers. With a cache, where a stack has
    fewer layers than stages, and where the layout itself has one stage, all stages compute the same.
    """
    if isinstance(params, Window):
        return _in_window(params, block, specs, x, rows, shard, kinds), None
    separate = isinstance(params, tuple)
    n = len(params) if separate else jax.tree.leaves(params)[0].shape[0]
    kinds = [None] * n if kinds is None else list(kinds)
    assert len(kinds) == n
    kinds = [_Kind(kind, cache is None and is_narrow(shard.execution, i, n)) for i, kind in enumerate(kinds)]
    keys: Any = None if key is None else jax.random.split(key, n)

    def layer(kind: _Kind, x: Any, rows: Any, p: Any, k: Any, layer_cache: Any) -> tuple[Any, Any]:
        x = jax.tree.map(lambda a: named(a, "input", shard), x)
        narrow = Activations(WAYS[shard.execution.matmul]) if kind.narrow else None
        weights = _gathered(p, specs, dataclasses.replace(shard, narrow=narrow))
        if shard.taps is None or cache is not None:
            return block(weights, x, rows, k, kind.own, layer_cache)
        with shard.taps.layer() as seen:
            x, _ = block(weights, x, rows, k, kind.own, layer_cache)
            shard.taps.note(HIDDEN, jax.tree.leaves(x)[0])  # the residual stream stands before what goes with it
        return x, seen

    rematerialized: Any = lambda f, **_: f  # noqa: E731
    staged, in_loop = shard.mesh.stage != 1 and 1 < pipeline.stages() <= n, scanned(shard) and not separate
    if cache is None and (shard.execution.remat != "none" or shard.gathers or in_loop):
        policy = remat_policy(shard.execution, in_loop)
        rematerialized = partial(jax.checkpoint, policy=policy, prevent_cse=not scanned(shard))
    if cache is None and not separate and staged:
        if shard.taps is not None:
            raise ValueError("mesh.stage: the states of single layers don't leave pipeline stages; set it to 1")
        stage_depth = pipeline.depth(pipeline.stages(), shard.mesh.rounds, [kind.own for kind in kinds])

        def stage(params: Any, x: Any, rows: Any, keys: Any) -> Any:
            return _in_order(layer, kinds[:stage_depth], x, rows, params, keys, shard)[0]

        stage = rematerialized(stage)  # all of a stage's layers are computed again, from what the stage was handed
        return pipeline.run(stage, stage_depth, params, x, rows, keys, shard=shard), None
    layer = rematerialized(layer, static_argnums=0)
    if cache is None and not separate:
        x, seen = _in_order(layer, kinds, x, rows, params, keys, shard)
        if shard.taps is not None:
            shard.taps.layers += seen
        return x, None
    stored = []
    for i in range(n):
        p = params[i] if separate else jax.tree.map(lambda w, i=i: w[i], params)
        x, updated = layer(
            kinds[i], x, rows, p, None if keys is None else keys[i], None if cache is None else cache.layers[i]
        )
        stored.append(updated)
    if cache is None and shard.taps is not None:
        shard.taps.layers += stored
    return x, None if cache is None else cache.replace(layers=tuple(stored), fresh=False)


def _in_window(
    w: Window, block: Block, specs: Any, x: Any, rows: Any, shard: Layout, kinds: Sequence[Any] | None
) -> Any:
    """Runs the layers of a window on its states."""
    n = jax.tree.leaves(specs, is_leaf=is_spec)[0].shape[0]
    w.met.append(w)
    w.kinds, w.entered = tuple([None] * n if kinds is None else kinds), x
    x = x if w.x is None else w.x
    if w.layers:
        own = w.kinds[w.first : w.first + len(w.layers)]
        x, _ = run_blocks(block, tuple(w.layers), specs, x, rows, shard=shard, key=None, kinds=own)
    w.left = x
    return x


def _in_order(
    layer: Any, kinds: Sequence[Any], x: Any, rows: Any, params: Any, keys: Any, shard: Layout
) -> tuple[Any, list[Any]]:
    """Applies stacked layers one after another, scanned or unrolled; `keys` is None or one a layer. Returns also what
    somebody wanted of each layer, or None for each."""
    n = len(kinds)
    wanted: list[Any] = []
    if not scanned(shard):
        for i in range(n):
            p, k = jax.tree.map(lambda w, i=i: w[i], (params, keys))
            x, seen = layer(kinds[i], x, rows, p, k, None)
            wanted.append(seen)
        return x, wanted
    for start, stop, period in _loops(kinds):

        def several(x: Any, inputs: Any, first: int = start, period: int = period) -> tuple[Any, list[Any]]:
            each = []
            for i in range(period):
                p, k = jax.tree.map(lambda w, i=i: w[i], inputs) if period > 1 else inputs
                x, seen = layer(kinds[first + i], x, rows, p, k, None)
                each.append(seen)
            return x, each

        def cut(w: jax.Array, start: int = start, stop: int = stop, period: int = period) -> jax.Array:
            w = w if stop - start == n else w[start:stop]
            return w if period == 1 else w.reshape(-1, period, *w.shape[1:])

        x, each = jax.lax.scan(several, x, jax.tree.map(cut, (params, keys)))
        for i in range(stop - start):
            wanted.append(jax.tree.map(lambda a, at=i // period: a[at], each[i % period]))
    return x, wanted


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
    """Applies stacks of layers one after another, each given as (params, specs, kinds).

    Layers of different stacks have weights of different shapes. Arguments and results are those of `run_blocks`.
    """
    stored: tuple = ()
    for (params, specs, kinds), k in zip(stacks, subkeys(key, len(stacks)), strict=True):
        part = None if cache is None else cache.replace(layers=cache.layers[len(stored) : len(stored) + len(kinds)])
        x, part = run_blocks(block, params, specs, x, rows, shard=shard, key=k, kinds=kinds, cache=part)
        stored += () if part is None else part.layers
    return x, None if cache is None else cache.replace(layers=stored, fresh=False)


def layout_of(s: Spec, shard: Layout) -> Layout:
    """Returns the layout by which a layer's weight is used.

    Routers stay float32: rounding a score would send tokens to other experts.
    """
    if "router" not in s.axes:
        return shard
    return dataclasses.replace(shard, execution=dataclasses.replace(shard.execution, dtype="float32"))


def _gathered(params: Any, specs: Any, shard: Layout) -> Any:
    """Returns weights as a block uses them."""
    return jax.tree.map(lambda w, s: layout_of(s, shard).gather(w, s), params, specs, is_leaf=is_leaf)


def stretches(kinds: Sequence[Any]) -> list[tuple[int, int, int]]:
    """Returns (first layer, end, period) of each loop over layers.

    A repeating pattern has one loop, and what it leaves over another; where nothing repeats, each run of equal layers
    has one.
    """
    n = len(kinds)
    for period in range(1, n // 2 + 1):
        if all(kinds[i] == kinds[i % period] for i in range(n)):
            repeated = n // period * period
            return [(0, repeated, period)] + ([(repeated, n, n - repeated)] if repeated < n else [])
    ends = list(itertools.accumulate(len(list(run)) for _, run in itertools.groupby(kinds)))
    return [(a, b, 1) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _loops(kinds: Sequence[_Kind]) -> list[tuple[int, int, int]]:
    """Returns the loops of `stretches`, where first and last layers that multiply otherwise than the rest hide no
    pattern of the rest."""
    loops: list[tuple[int, int, int]] = []
    for _, run in itertools.groupby(enumerate(kinds), lambda at: at[1].narrow):
        part = list(run)
        first = part[0][0]
        loops += [(first + a, first + b, period) for a, b, period in stretches([kind.own for _, kind in part])]
    return loops


def repeated(pattern: Sequence[Any], n: int) -> list[Any]:
    """Returns one value for each of `n` layers: the pattern over and over."""
    return [pattern[i % len(pattern)] for i in range(n)]


def pattern(values: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the shortest prefix that, repeated, gives all of the values: (a, b, a, b, a) → (a, b)."""
    for n in range(1, len(values)):
        if all(v == values[i % n] for i, v in enumerate(values)):
            return tuple(values[:n])
    return tuple(values)
