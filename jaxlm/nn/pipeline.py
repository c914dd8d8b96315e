"""Runs layers in stages on devices of their own, which hand activations on.

They do so once (GPipe, Huang et al. 2019), or in several rounds with a few layers each time, which leaves them idle for
less (interleaved, Narayanan et al. 2021).

All stages run as one program: a stage is a row of arrays that are split over the mesh axis `stage`, each of its steps
works on all rows at once, and one `ppermute` moves all of them on. Within a layer arrays are split over the other axes
as ever. S stages, M micro-batches, R rounds, N = layers / (S·R) of one stage in one round, B rows, b = B / M.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxlm.core import config, tree
from jaxlm.core.spec import is_spec
from jaxlm.nn.layout import Layout
from jaxlm.runtime.mesh import is_mapped, reshape, spec_of

AXIS = "stage"


def stages() -> int:
    """Returns the stages of the mesh that a program is traced for."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get(AXIS, 1)


def types_checked() -> bool:
    """Returns whether `shard_map` within a layer may check what differs between devices; its rules know no stages, and
    no workers that train apart."""
    return stages() == 1 and not is_mapped()


def vary(x: Any, axes: tuple[str, ...]) -> Any:
    """Tells shard_map that these arrays differ between devices from here on; their gradients are then added up."""
    if not types_checked():
        return x

    def one(a: jax.Array) -> jax.Array:
        missing = tuple(m for m in axes if m not in jax.typeof(a).manual_axis_type.varying)
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(one, x)


def micro_batches(shard: Layout, mesh: Any, rows: int) -> int:
    """Returns how many parts a pass's rows are cut into: as asked for, or up to twice as many as stages.

    Raises ValueError where they don't divide the rows, or are too few for the rounds.
    """
    S, R, count = mesh.shape[AXIS], shard.mesh.rounds, shard.mesh.pipeline_micro
    ways = math.prod(mesh.shape[a] for a in shard.compute.get("batch", ()))
    rows_per_device = rows // ways
    if count is None:
        count = max(n for n in range(1, 2 * S + 1) if rows_per_device % n == 0) if rows_per_device else 1
    elif count < 1 or rows_per_device % count or rows % ways:
        raise ValueError(
            f"mesh.pipeline_micro: {count} parts do not divide the {rows} rows of a pass over {ways} devices of the "
            f"batch; choose a divisor of {rows_per_device}, or another train.batch_size"
        )
    if R > 1 and count < S:
        raise ValueError(
            f"mesh.rounds: {R} rounds over {S} stages need at least {S} micro-batches, and {rows} rows over {ways} "
            f"devices of the batch make {count}; set mesh.rounds=1, or raise train.batch_size"
        )
    return count


def bubble(S: int, M: int, R: int) -> float:
    """Returns the share of the time that a stage has nothing to do."""
    return (S - 1) / (R * M + S - 1)


@dataclass(frozen=True)
class PipelineChoice:
    """A PipelineChoice says how a run's layers are pipelined."""

    stages: int
    rounds: int
    micro_batches: int
    repeated: tuple[str, ...]
    """Paths of the stacks with fewer layers than stages, all of which every stage computes."""

    def describe(self) -> str:
        """Returns the choice as people read it."""
        kind = "GPipe" if self.rounds == 1 else f"interleaved, {self.rounds} rounds"
        idle = bubble(self.stages, self.micro_batches, self.rounds)
        repeated = "".join(f"; every stage computes all of {path}" for path in self.repeated)
        return (
            f"{kind} over {self.stages} stages, {self.micro_batches} micro-batches a pass, idle {idle:.1%} of the time"
            f"{repeated}"
        )


def choose(shard: Layout, mesh: Any, specs: Any, train: config.Train) -> PipelineChoice | None:
    """Returns how a run's layers are pipelined, or None on a mesh without stages.

    Raises ValueError where layers or rows don't divide, and where `mesh` asks for rounds or parts of no pipeline.
    """
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
    if not stacks:
        raise ValueError(f"mesh.stage: {S} stages, and this model has no stacked layers to cut into them; use 1")
    if max(stacks.values()) < S:
        raise ValueError(f"mesh.stage: {S} stages for {max(stacks.values())} layers; make mesh.stage smaller")
    for n in stacks.values():
        if n >= S:
            depth(S, R, [None] * n)
    return PipelineChoice(S, R, M, tuple(path for path, n in stacks.items() if n < S))


def depth(S: int, R: int, kinds: list[Any]) -> int:
    """Returns the layers of one stage in one round.

    Raises ValueError where they don't divide, or are of kinds that don't repeat in each stage.
    """
    layers = len(kinds)
    if layers % (S * R):
        also = f" × {R} rounds (mesh.rounds)" if R > 1 else ""
        raise ValueError(
            f"mesh.stage: {layers} layers do not divide into {S} stages{also}; change mesh.stage or the model's depth"
        )
    n = layers // (S * R)
    if any(kinds[i] != kinds[i % n] for i in range(layers)):
        distinct = ", ".join(map(str, dict.fromkeys(kinds)))
        raise ValueError(
            f"mesh.stage: layers are of different kinds ({distinct}), in an order that does not repeat every {n} "
            "layers, a stage's; choose a mesh.stage (or mesh.rounds) whose stages are alike"
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
    """Sends `x` and `rows` (arrays `[B, …]`) through all layers; returns the last one's `x`.

    `stage(weights, x, rows, keys)` applies N layers, with weights and keys stacked `[N, …]`. Checkpoints hold layers in
    their order, and so do devices, L / S in a row each; R > 1 rounds move the weights once a pass (`_deal`).
    Micro-batch m has rows m, m + M, m + 2M …, so that each device keeps its rows. Its dropout is drawn with its own
    keys: the numbers differ from those of an unpipelined run.
    """
    S, R, mesh = stages(), shard.mesh.rounds, jax.sharding.get_abstract_mesh()
    M = micro_batches(shard, mesh, jax.tree.leaves(x)[0].shape[0])
    stage_numbers = _on_stages(jnp.arange(S))
    weights = jax.tree.map(lambda w: _on_stages(_deal(w, S, R, n)), params)
    bits = None if keys is None else _on_stages(_deal(jax.random.key_data(keys), S, R, n, moved=False))
    stream = jax.tree.map(lambda a: _copy_to_stages(_cut(a, M)), x)
    shared = jax.tree.map(lambda a: _skewed(_cut(a, M)), rows)

    def one_stage(s: jax.Array, t: jax.Array, first: Any, before: Any, rows: Any, weights: Any, bits: Any) -> Any:
        x = jax.tree.map(lambda a, b: jnp.where(s == 0, a, b), first, before)
        m = (t - s) % M
        weights = jax.tree.map(lambda w: _fold_in(w, m), weights)
        own_keys = None if keys is None else _fold_in(jax.random.wrap_key_data(bits, impl=jax.random.key_impl(keys)), m)
        return stage(weights, x, rows, own_keys)

    all_stages = jax.vmap(one_stage, (0, None, 0, 0, 0, 0, 0), spmd_axis_name=AXIS)

    def tick(carry: Any, t: jax.Array) -> tuple[Any, None]:
        stream, before = carry
        take = lambda tree, i: jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, 1, False), tree)  # noqa: E731
        own_weights, own_bits = _current_round((weights, bits), t, M, R)
        done = _hand_on(
            all_stages(stage_numbers, t, take(stream, t % M), before, take(shared, t % M), own_weights, own_bits), S
        )
        # The micro-batch that comes to the first stage from the last has ended its round, and waits in `stream` for the
        # next one or the end.
        slot = (t - S + 1) % M
        store = lambda a, old, new: jax.lax.dynamic_update_index_in_dim(a, jnp.where(t >= S - 1, new, old), slot, 1)  # noqa: E731
        return (jax.tree.map(store, stream, take(stream, slot), done), done), None

    # No stage starts from zeros, whose gradients may be NaN: results of the empty pipe are dropped, but must be finite.
    start = jax.tree.map(lambda a: a[:, 0], stream)
    (stream, _), _ = jax.lax.scan(tick, (stream, start), jnp.arange(R * M + S - 1))
    return jax.tree.map(lambda a: _joined(_first_stage(a)), stream)


def _cut(x: jax.Array, M: int) -> jax.Array:
    """Cuts `[B, …]` into micro-batches, `[M, b, …]`."""
    rows, *rest = spec_of(x)
    return jnp.swapaxes(reshape(x, (x.shape[0] // M, M, *x.shape[1:]), (rows, None, *rest)), 0, 1)


def _joined(x: jax.Array) -> jax.Array:
    """Joins micro-batches `[M, b, …]` to `[B, …]` again."""
    x = jnp.swapaxes(x, 0, 1)
    rows, _, *rest = spec_of(x)
    return reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]), (rows, *rest))


def _fold_in(w: Any, m: jax.Array) -> Any:
    """Folds the number of a micro-batch into keys (of layers, of adapters' dropout), and passes other arrays."""
    if not jnp.issubdtype(w.dtype, jax.dtypes.prng_key):
        return w
    return jax.vmap(lambda k: jax.random.fold_in(k, m))(w)


# ------------------------------------------------------------------------------------------------- between the stages


def _each(f: Callable[[Any], Any], x: Any, ins: P, outs: P) -> Any:
    """Applies `f` on every stage; the other axes are left to the partitioner."""
    return jax.shard_map(f, in_specs=ins, out_specs=outs, axis_names={AXIS})(x)


def _on_stages(x: jax.Array) -> jax.Array:
    """Puts a row of `[S, …]` on each stage."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.are_all_axes_explicit:
        return jax.reshard(x, P(AXIS, *jax.typeof(x).sharding.spec[1:]))
    return jax.lax.with_sharding_constraint(x, P(AXIS, *[P.UNCONSTRAINED] * (x.ndim - 1)))


def _numbers() -> jax.Array:
    """Returns `[S]`, each stage's own number. Where other axes are left to the partitioner, `axis_index` doesn't always
    compile."""
    return _on_stages(jnp.arange(stages(), dtype=jnp.int32))


def _copy_to_stages(x: jax.Array) -> jax.Array:
    """Returns `[S, …]`, a copy for each stage, which every device holds anyway."""
    if is_mapped():
        return _on_stages(jnp.broadcast_to(x[None], (stages(), *x.shape)))
    return _each(lambda x: jax.lax.pcast(x[None], (AXIS,), to="varying"), x, P(), P(AXIS))


def _skewed(x: jax.Array) -> jax.Array:
    """Returns `[S, M, …]` of `[M, …]`, such that all stages find at t what their micro-batch of tick t needs."""
    if is_mapped():
        return _on_stages(jax.vmap(lambda s: jnp.roll(x, s, 0))(_numbers()))
    return _each(lambda x: jnp.roll(x, jax.lax.axis_index(AXIS), 0)[None], x, P(), P(AXIS))


def _hand_on(tree: Any, S: int) -> Any:
    """Sends everything to the next stage, and from the last to the first."""
    if is_mapped():
        return jax.tree.map(lambda x: _on_stages(jnp.roll(x, 1, 0)), tree)
    pairs = [(s, (s + 1) % S) for s in range(S)]
    return jax.tree.map(lambda x: _each(lambda x: jax.lax.ppermute(x, AXIS, pairs), x, P(AXIS), P(AXIS)), tree)


def _first_stage(x: jax.Array) -> jax.Array:
    """Returns the first stage's part of `[S, …]`, on all stages."""
    if is_mapped():
        return x[0]

    def first(x: jax.Array) -> jax.Array:
        return jax.lax.psum(jnp.where(jax.lax.axis_index(AXIS) == 0, x[0], jnp.zeros((), x.dtype)), AXIS)

    return _each(first, x, P(AXIS), P())


def _current_round(tree: Any, t: jax.Array, M: int, R: int) -> Any:
    """Returns `[S, …]` of `[S, R, …]`: each stage's part of the round that it is in at tick t."""
    if R == 1:
        return jax.tree.map(lambda w: w[:, 0], tree)

    def select(both: Any) -> Any:
        w, t, s = both
        r = jnp.clip((t[0] - s[0]) // M, 0, R - 1)
        return jax.lax.dynamic_index_in_dim(w, r, 1, keepdims=False)

    return jax.tree.map(lambda w: _each(select, (w, _copy_to_stages(t), _numbers()), P(AXIS), P(AXIS)), tree)


def _deal(w: jax.Array, S: int, R: int, n: int, moved: bool = True) -> jax.Array:
    """Deals `[L, …]` to `[S, R, N, …]`: stage s gets the chunks s, s + S, s + 2S … of N layers.

    Layers rest in a row, chunks R·s … on stage s. Each stage gives R chunks and takes R, which are R permutations: a
    stage's weights travel once a pass, and their gradients back.
    """
    if R == 1:
        return w.reshape(S, 1, n, *w.shape[1:])
    if not moved or jnp.issubdtype(w.dtype, jax.dtypes.prng_key):
        return jnp.swapaxes(w.reshape(R, S, n, *w.shape[1:]), 0, 1)
    moves = permutations(S, R)

    def deal(both: Any) -> jax.Array:
        w, (s,) = both
        chunks = w.reshape(R, n, *w.shape[1:])
        out = jnp.zeros_like(chunks)
        for pairs, sent, received in moves:
            chunk = jax.lax.dynamic_index_in_dim(chunks, jnp.asarray(sent)[s], 0, keepdims=False)
            out = jax.lax.dynamic_update_index_in_dim(
                out, jax.lax.ppermute(chunk, AXIS, pairs), jnp.asarray(received)[s], 0
            )
        return out[None]

    return _each(deal, (w, _numbers()), P(AXIS), P(AXIS))


def permutations(S: int, R: int) -> list[tuple[list[tuple[int, int]], np.ndarray, np.ndarray]]:
    """Returns, for each of R turns: the pairs (from stage, to stage), which of its chunks each stage sends, and the
    round of the one that it receives.

    Chunk c moves from stage c // R to c % S, in turn (c + c // lcm(R, S)) % R: a stage sends and receives one a turn.
    """
    turns = []
    for turn in range(R):
        chunks = [c for c in range(S * R) if (c + c // math.lcm(R, S)) % R == turn]
        sent, received = np.zeros(S, np.int32), np.zeros(S, np.int32)
        for c in chunks:
            sent[c // R], received[c % S] = c % R, c // S
        turns.append(([(c // R, c % S) for c in chunks], sent, received))
    return turns
