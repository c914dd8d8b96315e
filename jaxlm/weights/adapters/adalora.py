"""AdaLoRA (Zhang et al. 2023): ranks go where they count. The allocator is a part of the optimizer.

L layers, R rank.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.core import tree
from jaxlm.core.config import Adapter

BETA = 0.85  # of both averages
ROOT = "adapter/"


class State(NamedTuple):
    inner: Any
    step: jax.Array
    importance: Any
    """Average of |weight · gradient|, of each number of a, b and e."""
    uncertainty: Any
    """Average of how far it strays."""
    kept: Any
    """1 where a direction counts, `[L, R]` of each e."""


def budget(c: Adapter, steps: int, step: Any) -> Any:
    """Share of directions kept after so many updates: all, then falling by a cube, then `target_rank` / `rank`."""
    first, last = round(c.warmup * steps), steps - round(c.settle * steps)
    left = 1 - jnp.clip((step - first) / max(1, last - first), 0.0, 1.0)
    target = c.target_rank / c.rank
    return target + (1 - target) * left**3


def allocating(tx: optax.GradientTransformation, c: Adapter, steps: int) -> optax.GradientTransformation:
    """`tx`, after whose updates the directions that count least are set to zero, over all sites and layers.

    Importance is taken from the weights that the gradient belongs to, those before the update.
    """
    last = steps - round(c.settle * steps)

    def directions(params: Any) -> dict[str, jax.Array]:
        return {path: e for path, e in tree.flatten(params).items() if path.startswith(ROOT) and path.endswith("/e")}

    def own(params: Any) -> Any:
        return {"adapter": params["adapter"]}

    def init(params: Any) -> State:
        zero = jax.tree.map(jnp.zeros_like, own(params))
        kept = tree.map_named(lambda path, x: jnp.ones_like(x) if path.endswith("/e") else None, own(params))
        return State(tx.init(params), jnp.zeros((), jnp.int32), zero, jax.tree.map(jnp.copy, zero), kept)

    def update(grads: Any, state: State, params: Any = None) -> tuple[Any, State]:
        updates, inner = tx.update(grads, state.inner, params)
        now = jax.tree.map(lambda p, g: jnp.abs(p * g), own(params), own(grads))
        average = lambda old, new: BETA * old + (1 - BETA) * new  # noqa: E731
        importance = jax.tree.map(average, state.importance, now)
        strays = jax.tree.map(lambda i, n: jnp.abs(n - i), importance, now)
        uncertainty = jax.tree.map(average, state.uncertainty, strays)
        score = tree.flatten(jax.tree.map(jnp.multiply, importance, uncertainty))

        def merit(path: str) -> jax.Array:
            site = path.removesuffix("e")
            a, b = score[site + "a"], score[site + "b"]
            return score[path] + a.mean(tuple(range(1, a.ndim - 1))) + b.mean(tuple(range(2, b.ndim)))

        es = directions(params)
        merits = {path: merit(path) for path in es}
        every = jnp.concatenate([m.reshape(-1) for m in merits.values()])
        keep = jnp.round(budget(c, steps, state.step + 1) * every.size).astype(jnp.int32)
        # By order and not by value, so that equal ones (all of them, at first) don't go together.
        place = jnp.zeros(every.size, jnp.int32).at[jnp.argsort(-every)].set(jnp.arange(every.size, dtype=jnp.int32))
        chosen, start = {}, 0
        for path, m in merits.items():
            chosen[path] = (place[start : start + m.size] < keep).reshape(m.shape).astype(jnp.float32)
            start += m.size
        old = tree.flatten(state.kept)
        kept = {path: jnp.where(state.step + 1 > last, old[path], new) for path, new in chosen.items()}

        def masked(path: str, u: jax.Array) -> jax.Array:
            return kept[path] * (es[path] + u) - es[path] if path in kept else u

        mask = tree.map_named(lambda path, x: kept.get(path), own(params))
        return tree.map_named(masked, updates), State(inner, state.step + 1, importance, uncertainty, mask)

    return optax.GradientTransformation(init, update)


def penalty(params: Any, weight: float) -> jax.Array:
    """weight · the mean over all matrices of ‖aᵀa - 1‖ and ‖b·bᵀ - 1‖."""
    norms = []
    for path, x in tree.flatten(params["adapter"], prefix=ROOT).items():
        side = path.rpartition("/")[2]
        if side in ("a", "b"):
            inner = "xyz"[: x.ndim - 2]
            eq = f"l{inner}r,l{inner}s->lrs" if side == "a" else f"lr{inner},ls{inner}->lrs"
            mesh = jax.sharding.get_abstract_mesh()
            whole = None if mesh.empty or not mesh.are_all_axes_explicit else jax.sharding.PartitionSpec()
            gram = jnp.einsum(eq, x, x, out_sharding=whole)
            away = gram - jnp.eye(gram.shape[-1])[None]
            norms.append(jnp.sqrt(jnp.square(away).sum((1, 2)) + 1e-12))
    return weight * jnp.concatenate(norms).mean()


def ranks(params: Any) -> dict[str, list[int]]:
    """Directions that are left, of each site's layers."""
    flat = tree.flatten(params["adapter"])
    return {p.removesuffix("/e"): [int(n) for n in (x != 0).sum(1)] for p, x in flat.items() if p.endswith("/e")}
