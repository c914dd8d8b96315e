"""Layers in stages on devices of their own, which hand activations on (GPipe, Huang et al. 2019), or do so in several
rounds with a few layers each time, which leaves them idle for less (interleaved, Narayanan et al. 2021).

All stages run as one program: a stage is a row of arrays that are split over the mesh axis `stage`, each of its steps
works on all rows at once, and one `ppermute` moves all of them on. What is inside a layer is split over the other axes
as ever. S stages, M micro-batches, R rounds, N = layers / (S·R) of one stage in one round, B rows, b = B / M.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxlm.core import config, tree
from jaxlm.core.spec import is_spec
from jaxlm.nn.layout import Layout

AXIS = "stage"


def stages() -> int:
    """Of the mesh that a program is traced for."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get(AXIS, 1)


def types_checked() -> bool:
    """Whether `shard_map` within a layer may check what differs between devices: its rules don't know of stages."""
    return stages() == 1


def vary(x: Any, axes: tuple[str, ...]) -> Any:
    """Tell shard_map that these differ between devices from here on; their gradients are then added up."""
    if not types_checked():
        return x

    def one(a: jax.Array) -> jax.Array:
        missing = tuple(m for m in axes if m not in jax.typeof(a).manual_axis_type.varying)
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(one, x)


def micro_batches(shard: Layout, mesh: Any, rows: int) -> int:
    """How many parts a pass's rows are cut into: as asked, or up to twice as many as stages."""
    S, R, asked = mesh.shape[AXIS], shard.mesh.rounds, shard.mesh.pipeline_micro
    ways = math.prod(mesh.shape[a] for a in shard.compute.get("batch", ()))
    per = rows // ways
    if asked is None:
        asked = max(n for n in range(1, 2 * S + 1) if per % n == 0) if per else 1
    elif asked < 1 or per % asked or rows % ways:
        raise ValueError(
            f"mesh.pipeline_micro: {asked} parts do not divide the {rows} rows of a pass over {ways} devices of the "
            f"batch; choose a divisor of {per}, or another train.batch_size"
        )
    if R > 1 and asked < S:
        raise ValueError(
            f"mesh.rounds: {R} rounds over {S} stages need at least {S} micro-batches, and {rows} rows over {ways} "
            f"devices of the batch make {asked}; set mesh.rounds=1, or raise train.batch_size"
        )
    return asked


def bubble(S: int, M: int, R: int) -> float:
    """Share of the time that a stage has nothing to do."""
    return (S - 1) / (R * M + S - 1)


def checked(shard: Layout, mesh: Any, specs: Any, train: config.Train) -> str | None:
    """In words how a run's layers are pipelined, if they are; layers or rows that don't divide are an error."""
    S, R = 1 if mesh is None else mesh.shape[AXIS], shard.mesh.rounds
    if R < 1:
        raise ValueError(f"mesh.rounds: {R} is not a number of rounds; use 1 or more")
    if S == 1:
        for name, usual in (("rounds", 1), ("pipeline_micro", None)):
            if getattr(shard.mesh, name) != usual:
                raise ValueError(f"mesh.{name}: there is one stage; leave it out, or set mesh.stage above 1")
        return None
    M = micro_batches(shard, mesh, train.batch_size // train.micro_batches)
    flat = tree.flatten(specs, is_spec)
    stacks = {path.rpartition("/")[0]: s.shape[0] for path, s in flat.items() if "layers" in s.axes}
    if max(stacks.values()) < S:
        raise ValueError(f"mesh.stage: {S} stages for {max(stacks.values())} layers; make mesh.stage smaller")
    for n in stacks.values():
        if n >= S:
            depth(S, R, [None] * n)
    kind = "GPipe" if R == 1 else f"interleaved, {R} rounds"
    whole = "".join(f"; every stage computes all of {path}" for path, n in stacks.items() if n < S)
    return f"{kind} over {S} stages, {M} micro-batches a pass, idle {bubble(S, M, R):.1%} of the time{whole}"


def depth(S: int, R: int, kinds: list[Any]) -> int:
    """Layers of one stage in one round. They differ by weights alone, or by kinds that repeat in each stage."""
    layers = len(kinds)
    if layers % (S * R):
        more = f" × {R} rounds (mesh.rounds)" if R > 1 else ""
        raise ValueError(
            f"mesh.stage: {layers} layers do not divide into {S} stages{more}; change mesh.stage or the model's depth"
        )
    n = layers // (S * R)
    if any(kinds[i] != kinds[i % n] for i in range(layers)):
        shown = ", ".join(map(str, dict.fromkeys(kinds)))
        raise ValueError(
            f"mesh.stage: layers are of different kinds ({shown}), in an order that does not repeat every {n} layers, "
            "a stage's; choose a mesh.stage (or mesh.rounds) whose stages are alike"
        )
    return n


def run(
    stage: Callable[[Any, Any, Any, Any], Any],
    n: int,
    params: Any,
    x: Any,
    rows: Any,
    keys: jax.Array | None,
    *,
    shard: Layout,
) -> Any:
    """`x` and `rows` (arrays `[B, …]`) through all layers → as `x`.

    `stage(weights, x, rows, keys)` is N layers, weights and keys stacked `[N, …]`. Checkpoints hold layers in their
    order, and so do devices, L / S in a row each; R > 1 rounds move the weights once a pass (`_dealt`). Micro-batch m
    is rows m, m + M, m + 2M …, which leaves each device its rows. Its dropout is drawn with its own keys: the numbers
    are others than those of an unpipelined run.
    """
    S, R, mesh = stages(), shard.mesh.rounds, jax.sharding.get_abstract_mesh()
    M = micro_batches(shard, mesh, jax.tree.leaves(x)[0].shape[0])
    numbers = _on_stages(jnp.arange(S))
    weights = jax.tree.map(lambda w: _on_stages(_dealt(w, S, R, n)), params)
    bits = None if keys is None else _on_stages(_dealt(jax.random.key_data(keys), S, R, n, moved=False))
    stream, shared = jax.tree.map(lambda a: _every(_cut(a, M)), x), jax.tree.map(lambda a: _skewed(_cut(a, M)), rows)

    def one(s: jax.Array, t: jax.Array, first: Any, before: Any, rows: Any, weights: Any, bits: Any) -> Any:
        x = jax.tree.map(lambda a, b: jnp.where(s == 0, a, b), first, before)
        m = (t - s) % M
        weights = jax.tree.map(lambda w: _folded(w, m), weights)
        own = None if keys is None else _folded(jax.random.wrap_key_data(bits, impl=jax.random.key_impl(keys)), m)
        return stage(weights, x, rows, own)

    every = jax.vmap(one, (0, None, 0, 0, 0, 0, 0), spmd_axis_name=AXIS)

    def tick(carry: Any, t: jax.Array) -> tuple[Any, None]:
        stream, before = carry
        now = lambda tree, i: jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, 1, False), tree)  # noqa: E731
        mine, mine_bits = _of_round((weights, bits), t, M, R)
        done = _handed_on(every(numbers, t, now(stream, t % M), before, now(shared, t % M), mine, mine_bits), S)
        # What comes to the first stage from the last has ended its round, and waits here for the next or the end.
        at = (t - S + 1) % M
        put = lambda a, old, new: jax.lax.dynamic_update_index_in_dim(a, jnp.where(t >= S - 1, new, old), at, 1)  # noqa: E731
        return (jax.tree.map(put, stream, now(stream, at), done), done), None

    # No stage begins with zeros, whose gradients may be none: what fills the pipe is thrown away, but must be finite.
    begin = jax.tree.map(lambda a: a[:, 0], stream)
    (stream, _), _ = jax.lax.scan(tick, (stream, begin), jnp.arange(R * M + S - 1))
    return jax.tree.map(lambda a: _joined(_of_first(a)), stream)


def _cut(x: jax.Array, M: int) -> jax.Array:
    """`[B, …]` → `[M, b, …]`."""
    return jnp.swapaxes(_shaped(x, (x.shape[0] // M, M, *x.shape[1:]), lambda b, *rest: (b, None, *rest)), 0, 1)


def _joined(x: jax.Array) -> jax.Array:
    x = jnp.swapaxes(x, 0, 1)
    return _shaped(x, (x.shape[0] * x.shape[1], *x.shape[2:]), lambda b, _, *rest: (b, *rest))


def _shaped(x: jax.Array, shape: tuple[int, ...], home: Callable[..., tuple]) -> jax.Array:
    if not jax.sharding.get_abstract_mesh().are_all_axes_explicit:
        return x.reshape(shape)
    return jax.lax.reshape(x, shape, out_sharding=P(*home(*jax.typeof(x).sharding.spec)))


def _folded(w: Any, m: jax.Array) -> Any:
    """Keys (of layers, of adapters' dropout) of a micro-batch; what isn't a key as it is."""
    if not jnp.issubdtype(w.dtype, jax.dtypes.prng_key):
        return w
    return jax.vmap(lambda k: jax.random.fold_in(k, m))(w)


# ------------------------------------------------------------------------------------------------- between the stages


def _each(f: Callable[[Any], Any], x: Any, ins: P, outs: P) -> Any:
    """`f` on every stage; the other axes are left to the partitioner."""
    return jax.shard_map(f, in_specs=ins, out_specs=outs, axis_names={AXIS})(x)


def _on_stages(x: jax.Array) -> jax.Array:
    """`[S, …]`, a row on each stage."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.are_all_axes_explicit:
        return jax.reshard(x, P(AXIS, *jax.typeof(x).sharding.spec[1:]))
    return jax.lax.with_sharding_constraint(x, P(AXIS, *[P.UNCONSTRAINED] * (x.ndim - 1)))


def _numbers() -> jax.Array:
    """`[S]`: each stage's own. Beside axes that are left to the partitioner `axis_index` doesn't always compile."""
    return _on_stages(jnp.arange(stages(), dtype=jnp.int32))


def _every(x: jax.Array) -> jax.Array:
    """`[S, …]`: a copy for each stage, which every device holds anyway."""
    return _each(lambda x: jax.lax.pcast(x[None], (AXIS,), to="varying"), x, P(), P(AXIS))


def _skewed(x: jax.Array) -> jax.Array:
    """`[M, …]` → `[S, M, …]`, such that all stages find at t what their micro-batch of tick t needs."""
    return _each(lambda x: jnp.roll(x, jax.lax.axis_index(AXIS), 0)[None], x, P(), P(AXIS))


def _handed_on(tree: Any, S: int) -> Any:
    """Everything to the next stage, and from the last to the first."""
    pairs = [(s, (s + 1) % S) for s in range(S)]
    return jax.tree.map(lambda x: _each(lambda x: jax.lax.ppermute(x, AXIS, pairs), x, P(AXIS), P(AXIS)), tree)


def _of_first(x: jax.Array) -> jax.Array:
    """`[S, …]` → the first stage's, on all."""

    def first(x: jax.Array) -> jax.Array:
        return jax.lax.psum(jnp.where(jax.lax.axis_index(AXIS) == 0, x[0], jnp.zeros((), x.dtype)), AXIS)

    return _each(first, x, P(AXIS), P())


def _of_round(tree: Any, t: jax.Array, M: int, R: int) -> Any:
    """`[S, R, …]` → `[S, …]`: each stage's of the round that it is in at tick t."""
    if R == 1:
        return jax.tree.map(lambda w: w[:, 0], tree)

    def mine(both: Any) -> Any:
        w, t, s = both
        r = jnp.clip((t[0] - s[0]) // M, 0, R - 1)
        return jax.lax.dynamic_index_in_dim(w, r, 1, keepdims=False)

    return jax.tree.map(lambda w: _each(mine, (w, _every(t), _numbers()), P(AXIS), P(AXIS)), tree)


def _dealt(w: jax.Array, S: int, R: int, n: int, moved: bool = True) -> jax.Array:
    """`[L, …]` → `[S, R, N, …]`: stage s gets the chunks s, s + S, s + 2S … of N layers.

    Layers rest in a row, chunks R·s … of stage s. Each stage gives R chunks and takes R, which are R permutations: a
    stage's weights travel once a pass, and their gradients back.
    """
    if R == 1:
        return w.reshape(S, 1, n, *w.shape[1:])
    if not moved or jnp.issubdtype(w.dtype, jax.dtypes.prng_key):
        return jnp.swapaxes(w.reshape(R, S, n, *w.shape[1:]), 0, 1)
    moves = permutations(S, R)

    def deal(both: Any) -> jax.Array:
        w, (s,) = both
        own = w.reshape(R, n, *w.shape[1:])
        out = jnp.zeros_like(own)
        for pairs, given, taken in moves:
            chunk = jax.lax.dynamic_index_in_dim(own, jnp.asarray(given)[s], 0, keepdims=False)
            out = jax.lax.dynamic_update_index_in_dim(
                out, jax.lax.ppermute(chunk, AXIS, pairs), jnp.asarray(taken)[s], 0
            )
        return out[None]

    return _each(deal, (w, _numbers()), P(AXIS), P(AXIS))


def permutations(S: int, R: int) -> list[tuple[list[tuple[int, int]], np.ndarray, np.ndarray]]:
    """R times (from stage, to stage), which of its chunks in a row each stage gives, and of which round it takes one.

    Chunk c moves from stage c // R to c % S, in turn (c + c // lcm(R, S)) % R: a stage gives and takes one a turn.
    """
    turns = []
    for turn in range(R):
        chunks = [c for c in range(S * R) if (c + c // math.lcm(R, S)) % R == turn]
        given, taken = np.zeros(S, np.int32), np.zeros(S, np.int32)
        for c in chunks:
            given[c // R], taken[c % S] = c % R, c // S
        turns.append(([(c // R, c % S) for c in chunks], given, taken))
    return turns
