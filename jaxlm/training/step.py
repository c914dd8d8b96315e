"""Makes one update: (state, batch) → (state, metrics). It is pure, and jitted at the edge, with the state donated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxlm.core import spec as weights
from jaxlm.core import tree
from jaxlm.core.batch import Batch
from jaxlm.runtime.mesh import constrain
from jaxlm.training.optimizers import Optimizer, state_shardings

Loss = Callable[..., dict[str, dict[str, jax.Array]]]
"""(weights, batch, key, and the state's memory where there is one) → sums."""
Totals = Callable[[Batch[jax.Array]], dict[str, jax.Array]]


class State(struct.PyTreeNode):
    """A State holds everything that a checkpoint saves. Trees of weights are nested dicts."""

    step: jax.Array
    """The number of updates made, int32."""
    params: Any
    """The weights that the optimizer moves; None where `frozen` has the weight."""
    frozen: Any
    opt: Any
    ema: Any
    """The moving average of `params`, or None."""
    tracks: Any = None
    """What methods of continual learning note along the way, or None."""
    memory: Any = None
    """What they know of earlier tasks and training leaves as it is, or None; a run keeps it beside its checkpoints."""
    outer: Any = None
    """What workers that train apart share (`training.distributed.replicas.Global`), or None. `params` and `opt` then
    have a leading axis of workers."""

    @property
    def all_params(self) -> Any:
        """Returns trained and frozen weights as one tree: the global ones, where workers train apart."""
        return tree.merge(self.params if self.outer is None else self.outer.params, self.frozen)

    @property
    def eval_params(self) -> Any:
        """Returns the weights to validate and sample with: averaged ones where an average is kept."""
        return self.all_params if self.ema is None else tree.merge(self.ema, self.frozen)


class Keeping(NamedTuple):
    """A Keeping holds what methods of continual learning do to an update; its defaults do nothing."""

    parts: Callable[[Any], list[Any]] = lambda batch: [batch]
    """(batch) → the parts of it whose gradients are taken apart."""
    combine: Callable[[list[Any]], Any] = lambda gradients: gradients[0]
    """(gradient of each part) → the gradient."""
    learned: Callable[[str], bool] = lambda loss: True
    """(name of a loss) → whether it is learned; one that only bounds the gradient isn't part of the loss that is
    told."""
    penalty: Callable[[Any, Any], jax.Array] | None = None
    """(params, memory) → what is added to the mean loss; its gradient is taken once an update."""
    observe: Callable[[Any, Any, Any, Any], Any] | None = None
    """(tracks, gradient without the penalty, params before and after the update) → tracks."""
    movable: Callable[[Any, "State"], Any] | None = None
    """(gradient, state) → the gradient with zeros for weights that must not move."""
    settle: Callable[["State", "State"], "State"] | None = None
    """(state before an update, state after it) → the state after it, in which such weights are what they have to be."""


NOTHING_KEPT = Keeping()


def init_state(specs: Any, optimizer: Optimizer, key: jax.Array, ema: bool) -> State:
    """Returns a fresh state; jit it with `out_shardings` and every weight is born on its own device."""
    params, frozen = tree.partition(weights.init(specs, key), optimizer.trainable)
    return start(params, frozen, optimizer, ema)


def start(params: Any, frozen: Any, optimizer: Optimizer, ema: bool, tracks: Any = None) -> State:
    """Returns the state before the first update of these weights."""
    average = jax.tree.map(jnp.copy, params) if ema else None  # donated buffers may not be shared
    return State(jnp.zeros((), jnp.int32), params, frozen, optimizer.tx.init(params), average, tracks)


class UpdateShardings(NamedTuple):
    """An UpdateShardings says where trainable weights, and what has their shapes, are during an update (ZeRO,
    Rajbhandari et al. 2020)."""

    weights: Any
    gradients: Any
    """Gradients of micro-batches, while they add up."""
    moments: Any

    @classmethod
    def of(cls, zero: int, weight_shardings: Any, moments: Any, optimizer: Optimizer) -> "UpdateShardings":
        """Returns the shardings of a ZeRO stage, from those of all weights (`weight_shardings`), and from those that
        they would have if they were moments."""
        whole, updated = (tree.partition(t, optimizer.trainable)[0] for t in (weight_shardings, moments))
        return cls(whole, whole if zero == 1 else updated, updated)


def shardings(
    specs: Any,
    weight_shardings: Any,
    optimizer: Optimizer,
    ema: bool,
    whole: Any,
    moments: Any = None,
    host: bool = False,
) -> State:
    """Returns where each leaf of a State lives: moments and averages where `moments` says, or else with their weights.

    `weight_shardings` are the shardings of all weights, `whole` is the replicated one. With `host` the optimizer's
    state waits in the host's memory.
    """
    params, frozen = tree.partition(weight_shardings, optimizer.trainable)
    updated = params if moments is None else tree.partition(moments, optimizer.trainable)[0]
    shapes, _ = tree.partition(weights.abstract(specs), optimizer.trainable)
    return State(
        step=whole,
        params=params,
        frozen=frozen,
        opt=state_shardings(optimizer.tx, shapes, updated, whole, host),
        ema=updated if ema else None,
    )


def _move(opt: Any, space: Any) -> Any:
    """Moves the optimizer's state to a memory space, but for counters, which stay."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, opt)


def _with_clocks_of(moved: Any, opt: Any) -> Any:
    """Returns an optimizer's state whose schedules stand where those of `moved` do: at the step, which goes on where an
    update is left out. Moments and what they are corrected by count the updates made."""
    is_clock = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    return jax.tree.map(lambda a, b: a if is_clock(a) else b, moved, opt, is_leaf=is_clock)


def flat_metrics(sums: dict[str, dict[str, jax.Array]], totals: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns means `{"loss", "nll", "accuracy"}`, prefixed by the loss's name where an objective has several."""
    single = len(sums) == 1
    means = {
        (metric if single else f"{name}/{metric}"): value / totals[name]
        for name, part in sums.items()
        for metric, value in part.items()
    }
    return means if single else means | {"loss": sum((means[f"{name}/loss"] for name in sums), jnp.zeros(()))}


def num_tokens(batch: Batch[jax.Array]) -> jax.Array:
    """Returns how many tokens a batch has on both sides; padding is none."""
    count = jnp.count_nonzero(batch["segments"])
    return count + jnp.count_nonzero(batch["source_segments"]) if "source_segments" in batch else count


def _gradients(
    loss: Loss, totals: dict[str, jax.Array], state: State, batch: Batch[jax.Array], key: jax.Array, keeping: Keeping,
    shardings: UpdateShardings | None,
) -> tuple[Any, dict[str, dict[str, jax.Array]]]:  # fmt: skip
    """Returns the gradient of the mean loss over all micro-batches, and the sums of the losses."""

    def objective(params: Any, part: Batch[jax.Array], k: jax.Array) -> tuple[jax.Array, Any]:
        known = () if state.memory is None else (state.memory,)
        sums = loss(tree.merge(params, state.frozen), part, k, *known)
        return sum((sums[n]["loss"] / totals[n] for n in sums), jnp.zeros(())), sums

    def micro(part: Batch[jax.Array], k: jax.Array) -> tuple[Any, Any]:
        found = [jax.grad(objective, has_aux=True)(state.params, one, k) for one in keeping.parts(part)]
        return [grads for grads, _ in found], {n: values for _, sums in found for n, values in sums.items()}

    def pin_gradients(grads_and_sums: tuple[Any, Any]) -> tuple[Any, Any]:
        if shardings is None:
            return grads_and_sums
        grads, sums = grads_and_sums
        return [constrain(g, shardings.gradients) for g in grads], sums

    n = jax.tree.leaves(batch)[0].shape[0]
    keys = jax.random.split(key, n)
    first = jax.tree.map(lambda x: x[0], (batch, keys))
    if n == 1:
        grads, sums = pin_gradients(micro(*first))
    else:  # all run in the loop: outside it a compiler might keep the activations of two at a time
        no_sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro, *first)[1])
        add = lambda total, part: (jax.tree.map(jnp.add, total, pin_gradients(micro(*part))), None)  # noqa: E731
        nothing = [jax.tree.map(jnp.zeros_like, state.params) for _ in keeping.parts(first[0])]
        (grads, sums), _ = jax.lax.scan(add, pin_gradients((nothing, no_sums)), (batch, keys))
    return keeping.combine(grads), sums


def make_train_step(
    loss: Loss,
    totals_of: Totals,
    optimizer: Optimizer,
    *,
    seed: int | jax.Array,
    clip: float,
    ema: float,
    shardings: UpdateShardings | None = None,
    host: bool = False,
    keeping: Keeping = NOTHING_KEPT,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """Returns the function `(state, batch) → (state, metrics)` that makes one update; `batch` leaves are `[micro,
    batch, …]`. Where workers train apart, each also gives its number, so that their dropout differs.

    Micro-batches add up sums, each divided by the weight of the whole batch, so 1, 2 or 4 of them are the same update.
    An update whose loss or gradient is not finite is left out: `finite` is 0, and the state is unchanged but for `step`
    and schedules, which go on. With `shardings` (on a mesh) each device reduces and updates the part of the weights
    that it keeps moments of. With `host` the optimizer's state comes from the host's memory for the update, and goes
    back. `keeping` is what keeps earlier tasks in mind.
    """

    def train_step(
        state: State, batch: Batch[jax.Array], worker: jax.Array | None = None
    ) -> tuple[State, dict[str, jax.Array]]:
        totals = totals_of(batch)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if worker is not None:  # the first one's key is that of a run without workers
            key = jnp.where(worker == 0, key, jax.random.fold_in(key, worker))

        grads, sums = _gradients(loss, totals, state, batch, key, keeping, shardings)

        if shardings is not None:
            grads = constrain(grads, shardings.moments)
            state = state.replace(params=constrain(state.params, shardings.moments))
        if host:
            state = state.replace(opt=_move(state.opt, jax.memory.Space.Device))
        grads = optimizer.moved(grads)
        metrics = flat_metrics(sums, totals) | {f"weight/{name}": total for name, total in totals.items()}
        if bounds := [name for name in sums if not keeping.learned(name)]:
            metrics["loss"] -= sum(metrics[f"{name}/loss"] for name in bounds)
        of_task = grads
        if keeping.penalty is not None:
            extra, pull = jax.value_and_grad(keeping.penalty)(state.params, state.memory)
            grads = jax.tree.map(jnp.add, grads, optimizer.moved(pull))
            metrics |= {"penalty": extra}
        if keeping.movable is not None:
            grads = keeping.movable(grads, state)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        if clip:
            scale = jnp.minimum(1.0, clip / (norm + 1e-12))
            grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt = optimizer.tx.update(grads, state.opt, state.params)
        new = state.replace(params=optax.apply_updates(state.params, updates), opt=opt)
        if ema:
            decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))  # young averages forget faster
            new = new.replace(ema=jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, new.params))
        if keeping.observe is not None:
            new = new.replace(tracks=keeping.observe(state.tracks, of_task, state.params, new.params))
        # What stays is left out: not every compiler sees that both choices are the same, and some write it anew.
        moved, unmoved = new.replace(frozen=None, memory=None), state.replace(frozen=None, memory=None)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), moved, unmoved)
        new = new.replace(frozen=state.frozen, memory=state.memory)
        new = new.replace(opt=_with_clocks_of(opt, new.opt))
        if keeping.settle is not None:
            new = keeping.settle(state, new)
        if shardings is not None:
            new = new.replace(params=constrain(new.params, shardings.weights))
        if host:
            new = new.replace(opt=_move(new.opt, jax.memory.Space.Host))
        if "segments" in batch:
            metrics |= {"tokens": num_tokens(batch)}
        metrics |= dict(grad_norm=norm, lr=optimizer.schedule(state.step), finite=finite.astype(jnp.float32))
        return new.replace(step=state.step + 1), metrics

    return train_step
