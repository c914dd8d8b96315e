"""Workers within one program: each trains on its own for some steps, on its part of the mesh's `replica` axis, and then
the outer optimizer brings them together (DiLoCo, Douillard et al. 2023; streaming DiLoCo, 2025).

Trees of workers have a leading axis W, which the `replica` axis shards; workers of one device take turns. Nothing
travels over `replica` but in `exchange`.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.core import config
from jaxlm.runtime.mesh import mapped_over_replica
from jaxlm.training.distributed import compression, outer
from jaxlm.training.distributed.exchange import AXIS, mean
from jaxlm.training.distributed.fragments import Fragments
from jaxlm.training.step import State


class Global(struct.PyTreeNode):
    """A Global holds what all workers share, in the place of `State.outer`."""

    params: Any
    """The global weights, float32."""
    opt: tuple[Any, ...]
    """The outer optimizer's state of each fragment."""
    error: Any
    """What compression has left out of each worker's deltas, [W, …]; None: nothing is compressed, or nothing is
    kept."""
    learned: Any
    """The weight of what each worker has learned from since each fragment was exchanged, [W, fragments]; None where all
    workers weigh the same."""


def workers(run: config.Run) -> int:
    """Returns how many workers a run of one program has; 1 without distributed training."""
    return (run.distributed.workers or run.mesh.replica) if run.distributed.method == "diloco" else 1


def check(run: config.Run, replicas: int, ways: int) -> None:
    """Raises ValueError where workers can't train apart as the run says, on a mesh of so many replicas whose devices
    share a micro-batch `ways` times."""
    c = run.distributed
    if c.method != "diloco":
        return
    count, rows = workers(run), run.train.batch_size // run.train.micro_batches
    if count % replicas:
        raise ValueError(
            f"distributed.workers: {count} workers do not divide over mesh.replica {replicas}; choose a multiple of it"
        )
    if rows % (ways * (count // replicas)):
        raise ValueError(
            f"train.batch_size: {rows} rows (per micro-batch) do not divide over {count} workers; choose a multiple of "
            f"{ways * (count // replicas)}"
        )
    if c.every % c.fragments:
        raise ValueError(
            f"distributed.fragments: {c.fragments} do not divide distributed.every {c.every}; each fragment's turn is "
            "as long as the others'"
        )
    if c.overlap >= c.every // c.fragments:
        raise ValueError(
            f"distributed.overlap: {c.overlap} steps are not below the {c.every // c.fragments} between two exchanges "
            "(distributed.every / distributed.fragments)"
        )
    if run.optim.ema:
        raise ValueError("optim.ema: workers that train apart keep no average of their weights; set it to 0")
    if run.optim.moments == "start":
        raise ValueError("optim.moments: workers that train apart begin with fresh moments; set it to fresh")
    if run.continual.methods:
        raise ValueError(
            f"continual.methods: {', '.join(run.continual.methods)} do not work with workers that train apart; leave "
            "them out, or set distributed.method to none"
        )
    if run.mesh.rounds > 1:
        raise ValueError("mesh.rounds: workers that train apart have pipelines of one round; set it to 1")
    if run.mesh.axis_type == "explicit":
        raise ValueError("mesh.axis_type: workers that train apart need auto")


def describe(run: config.Run, fragments: Fragments) -> str:
    """Returns how the workers of a run train, for people."""
    c, largest = run.distributed, max(fragments.sizes)
    size = compression.size(c.compress, largest) / 1e6
    turn = f", {fragments.count} fragments in turn" if fragments.count > 1 else ""
    kind = "float32" if c.compress == "none" else c.compress
    return (
        f"{workers(run)} train apart for {c.every} steps{turn}; then {size:,.1f} MB of each in {kind}, and "
        f"{c.outer.name} brings them together"
    )


@dataclass(frozen=True)
class Due:
    """A Due says what happens with which fragments around an update."""

    send: tuple[int, ...] = ()
    """They are exchanged in the program of the update, from the weights before it."""
    exchange: tuple[int, ...] = ()
    """They are exchanged after the update, and taken up at once."""
    take: tuple[int, ...] = ()
    """They were sent before, and the workers take them up after the update."""


def due(c: config.Distributed, update: int, last: int) -> Due:
    """Returns what is due at an update (1, 2, …). At the `last` one everything is exchanged, so that no worker's work
    is lost.

    Fragment p is exchanged every H steps, H / fragments after fragment p − 1. With an overlap of τ steps it travels
    during the first of them, and is taken up after the last.
    """
    if c.method != "diloco":
        return Due()
    apart, everything = c.every // c.fragments, tuple(range(c.fragments))

    def ends(step: int) -> tuple[int, ...]:
        """Returns the fragment whose turn ends with a step."""
        return ((step // apart - 1) % c.fragments,) if 0 < step < last and step % apart == 0 else ()

    if not c.overlap:
        return Due(exchange=everything if update == last else ends(update))
    take = ends(update - c.overlap)
    if update == last:
        flying = [p for step in range(max(1, last - c.overlap), last) for p in ends(step)]
        return Due(send=ends(update - 1), exchange=everything, take=tuple(dict.fromkeys([*take, *flying])))
    return Due(send=ends(update - 1), take=take)


def begin(c: config.Distributed, fragments: Fragments, state: State, count: int) -> State:
    """Returns the state in which `count` workers start from one state."""
    each = lambda x: jnp.broadcast_to(x, (count, *x.shape))  # noqa: E731
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), state.params)
    params = jax.tree.map(each, state.params)
    held = Global(
        params=weights,
        opt=tuple(outer.init(c.outer, fragments.take(weights, p)) for p in range(c.fragments)),
        error=jax.tree.map(jnp.zeros_like, params) if c.compress != "none" and c.error_decay else None,
        learned=jnp.zeros((count, c.fragments)) if c.weigh == "tokens" else None,
    )
    return state.replace(params=params, opt=jax.tree.map(each, state.opt), outer=held)


def shardings(c: config.Distributed, fragments: Fragments, one: State, whole: Any) -> State:
    """Returns where the workers' state lives, from where `one` worker's does and the replicated sharding."""
    by_worker = lambda tree_: jax.tree.map(_by_worker, tree_)  # noqa: E731

    def of_opt(p: int) -> Any:
        parts = fragments.take_like(one.params, p)
        shapes = jax.eval_shape(lambda: outer.init(c.outer, {path: jnp.zeros(()) for path in parts}))

        def place(key_path: tuple, leaf: Any) -> Any:
            names = [k.key for k in key_path if isinstance(k, jax.tree_util.DictKey)]
            return parts[names[-1]] if names else whole

        return jax.tree_util.tree_map_with_path(place, shapes)

    held = Global(
        params=one.params,
        opt=tuple(of_opt(p) for p in range(c.fragments)),
        error=by_worker(one.params) if c.compress != "none" and c.error_decay else None,
        learned=_by_worker(whole) if c.weigh == "tokens" else None,
    )
    return one.replace(params=by_worker(one.params), opt=by_worker(one.opt), outer=held)


def _by_worker(s: Any) -> Any:
    """Returns the sharding of an array with a leading axis of workers."""
    if not isinstance(s, NamedSharding):
        return s
    return NamedSharding(s.mesh, P(AXIS, *s.spec), memory_kind=s.memory_kind)


def for_all(step: Callable[..., Any], count: int, mesh: jax.sharding.Mesh | None) -> Callable[[State, Any], Any]:
    """Returns the step of all workers: `(state, batch) → (state, metrics [W])`, from that of one, `(state, batch,
    worker) → (state, metrics)`.

    Leaves of the batch are [micro, rows, …]; a worker has the rows that rest on its part of the mesh.
    """
    replicas = 1 if mesh is None else mesh.shape[AXIS]
    local = count // replicas

    def all_workers(state: State, batch: Any) -> tuple[State, Any]:
        def one(part: tuple[Any, Any], rows: Any, worker: jax.Array) -> Any:
            params, opt = part
            new, metrics = step(state.replace(params=params, opt=opt, outer=None), rows, worker)
            return (new.params, new.opt), metrics

        inner = _alone(one) if local == 1 else lambda *a: jax.lax.map(lambda each: one(*each), a)
        mapped = _alone(inner) if replicas == 1 else jax.vmap(inner, spmd_axis_name=AXIS)
        halves = lambda x: x.reshape(replicas, local, *x.shape[1:])  # noqa: E731
        given = ((state.params, state.opt), jax.tree.map(lambda x: _rows(x, count), batch), jnp.arange(count))
        with mapped_over_replica() if replicas > 1 else nullcontext():
            out = mapped(*jax.tree.map(halves, given))
        (params, opt), metrics = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), out)
        held = state.outer
        if held.learned is not None:
            seen = next(value for name, value in metrics.items() if name.startswith("weight/"))
            held = held.replace(learned=held.learned + seen[:, None])
        return state.replace(step=state.step + 1, params=params, opt=opt, outer=held), metrics

    return all_workers


def _alone(f: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of arrays with a leading axis of 1, which it never sees: the program of a single worker is
    that of a run without workers."""

    def call(*a: Any) -> Any:
        return jax.tree.map(lambda x: x[None], f(*jax.tree.map(lambda x: x[0], a)))

    return call


def _rows(x: jax.Array, count: int) -> jax.Array:
    """Returns a batch's leaf [micro, rows, …] as [W, micro, rows / W, …]."""
    micro, rows = x.shape[:2]
    return jnp.moveaxis(x.reshape(micro, count, rows // count, *x.shape[2:]), 1, 0)


def exchange(
    c: config.Distributed, fragments: Fragments, state: State, before: Any, numbers: tuple[int, ...],
    one: State, mesh: jax.sharding.Mesh | None, beside: Any = None,
) -> State:  # fmt: skip
    """Returns the state in which the global weights of the fragments have moved to the workers' weights `before`.

    Each weight is an all-reduce over `replica` of float32 numbers, or an all-gather of each of its compressed arrays;
    small ones travel together. Devices that hold the same weights of a worker exchange a part each. `one`: the
    shardings of one worker's state. `beside`: as `mean` takes it.
    """
    held = state.outer
    for p in numbers:
        part = fragments.take_workers(before, p)
        error = None if held.error is None else fragments.take_workers(held.error, p)
        learned = None if held.learned is None else held.learned[:, p]
        weights = fragments.take(held.params, p)
        target, error = mean(c, part, weights, error, learned, fragments.take_like(one.params, p), mesh, beside)
        weights, opt = outer.update(c.outer, weights, held.opt[p], target)
        held = held.replace(
            params=fragments.put(held.params, p, weights),
            opt=(*held.opt[:p], opt, *held.opt[p + 1 :]),
            error=None if error is None else fragments.put_workers(held.error, p, error),
            learned=None if learned is None else held.learned.at[:, p].set(0.0),
        )
    return state.replace(outer=held)


def take_up(c: config.Distributed, fragments: Fragments, state: State, numbers: tuple[int, ...]) -> State:
    """Returns the state in which the workers have taken up the global weights of the fragments, but for the share `mix`
    of their own."""
    params = state.params
    for p in numbers:
        now = fragments.take(state.outer.params, p)
        own = fragments.take_workers(params, p)

        def one(w: jax.Array, g: jax.Array) -> jax.Array:
            mixed = c.mix * w + (1 - c.mix) * g[None] if c.mix else jnp.broadcast_to(g[None], w.shape)
            return mixed.astype(w.dtype)

        params = fragments.put_workers(params, p, {path: one(own[path], now[path]) for path in own})
    return state.replace(params=params)


def read(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    """Returns the metrics [W] of a step of the workers as those of one update: their means, `tokens` of all, and
    `finite` if all are. It waits for them. Each of several hosts knows of its own workers alone, as asking others would
    take a message."""
    out = {}
    for name, value in metrics.items():
        each = np.concatenate([np.ravel(s.data) for s in value.addressable_shards])
        total = float(np.min(each) if name == "finite" else np.mean(each))
        out[name] = total * value.size if name == "tokens" else total
    return out
