"""AdaLoRA (Zhang et al. 2023): LoRA whose rank goes where it counts. What allocates ranks is a part of the optimizer.

L layers, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.core import tree
from jaxlm.core.ranges import BelowOne, Count, NonNegative, Positive
from jaxlm.core.spec import Spec, normal, zeros
from jaxlm.weights.adapters import lora, low_rank
from jaxlm.weights.adapters.low_rank import LowRankAdapter
from jaxlm.weights.adapters.method import Method, Specs
from jaxlm.weights.adapters.peft_format import PeftFormat, PeftTensor
from jaxlm.weights.matrices import Matrix

BETA = 0.85  # of both averages
ROOT = "adapter/"


@dataclass(frozen=True, kw_only=True)
class AdaLora(LowRankAdapter):
    """AdaLoRA (Zhang et al. 2023): LoRA whose ranks fall in training where they count least. `rank`, that of the start,
    is usually half as much again as `target_rank`."""

    alpha: Positive = 16.0
    """The product is scaled by alpha / rank."""
    b_lr: NonNegative = 1.0
    """Learning rate of b as a multiple of that of a."""
    target_rank: Count = 8
    """Mean rank at the end."""
    warmup: BelowOne = 0.1
    """Share of all steps before ranks begin to fall."""
    final_tuning: BelowOne = 0.2
    """Share of all steps, the last ones, with the ranks that are left."""
    orthogonal: NonNegative = 0.5
    """Weight of the loss that keeps a and b orthogonal."""

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank + 1e-5)


def specs(c: AdaLora, target: Matrix) -> Specs:
    return low_rank.pair(c, target, normal(0.02), normal(0.02)) | dict(e=Spec((c.rank,), (None,), zeros, role="scale"))


class State(NamedTuple):
    """The state holds the optimizer's and what the allocator remembers of the adapter's weights."""

    inner: Any
    step: jax.Array
    importance: Any
    """Average of |weight · gradient|, of each number of a, b and e."""
    uncertainty: Any
    """Average of how far |weight · gradient| is from its average."""
    kept: Any
    """1 where a direction counts, `[L, R]` of each e."""


def budget(c: AdaLora, steps: int, step: Any) -> Any:
    """Returns the share of directions kept after so many updates: all, then falling by a cube, then `target_rank` /
    `rank`."""
    first, last = round(c.warmup * steps), steps - round(c.final_tuning * steps)
    left = 1 - jnp.clip((step - first) / max(1, last - first), 0.0, 1.0)
    target = c.target_rank / c.rank
    return target + (1 - target) * left**3


def allocating(c: AdaLora, tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """Returns `tx` such that the directions that count least, over all targets and layers, are zero after each update.

    Importance is taken from the weights that the gradient belongs to, those before the update.
    """
    last = steps - round(c.final_tuning * steps)

    def directions(params: Any) -> dict[str, jax.Array]:
        return {path: e for path, e in tree.flatten(params).items() if path.startswith(ROOT) and path.endswith("/e")}

    def adapter_of(params: Any) -> Any:
        return {"adapter": params["adapter"]}

    def init(params: Any) -> State:
        zero = jax.tree.map(jnp.zeros_like, adapter_of(params))
        kept = tree.map_named(lambda path, x: jnp.ones_like(x) if path.endswith("/e") else None, adapter_of(params))
        return State(tx.init(params), jnp.zeros((), jnp.int32), zero, jax.tree.map(jnp.copy, zero), kept)

    def update(grads: Any, state: State, params: Any = None) -> tuple[Any, State]:
        updates, inner = tx.update(grads, state.inner, params)
        now = jax.tree.map(lambda p, g: jnp.abs(p * g), adapter_of(params), adapter_of(grads))
        average = lambda old, new: BETA * old + (1 - BETA) * new  # noqa: E731
        importance = jax.tree.map(average, state.importance, now)
        deviation = jax.tree.map(lambda i, n: jnp.abs(n - i), importance, now)
        uncertainty = jax.tree.map(average, state.uncertainty, deviation)
        score = tree.flatten(jax.tree.map(jnp.multiply, importance, uncertainty))

        def merit(path: str) -> jax.Array:
            target = path.removesuffix("e")
            a, b = score[target + "a"], score[target + "b"]
            return score[path] + a.mean(tuple(range(1, a.ndim - 1))) + b.mean(tuple(range(2, b.ndim)))

        es = directions(params)
        merits = {path: merit(path) for path in es}
        every = jnp.concatenate([m.reshape(-1) for m in merits.values()])
        keep = jnp.round(budget(c, steps, state.step + 1) * every.size).astype(jnp.int32)
        # By order and not by value, so that equal ones (all of them, at first) don't go together.
        position = jnp.zeros(every.size, jnp.int32).at[jnp.argsort(-every)].set(jnp.arange(every.size, dtype=jnp.int32))
        chosen, start = {}, 0
        for path, m in merits.items():
            chosen[path] = (position[start : start + m.size] < keep).reshape(m.shape).astype(jnp.float32)
            start += m.size
        old = tree.flatten(state.kept)
        kept = {path: jnp.where(state.step + 1 > last, old[path], new) for path, new in chosen.items()}

        def masked(path: str, u: jax.Array) -> jax.Array:
            return kept[path] * (es[path] + u) - es[path] if path in kept else u

        mask = tree.map_named(lambda path, x: kept.get(path), adapter_of(params))
        return tree.map_named(masked, updates), State(inner, state.step + 1, importance, uncertainty, mask)

    return optax.GradientTransformation(init, update)


def penalty(c: AdaLora, params: Any) -> jax.Array:
    """Returns `orthogonal` · the mean over all matrices of ‖aᵀa - 1‖ and ‖b·bᵀ - 1‖."""
    norms = []
    for path, x in tree.flatten(params["adapter"], prefix=ROOT).items():
        side = path.rpartition("/")[2]
        if side in ("a", "b"):
            gram = low_rank.inner_products(x, x, side)
            difference = gram - jnp.eye(gram.shape[-1])[None]
            norms.append(jnp.sqrt(jnp.square(difference).sum((1, 2)) + 1e-12))
    return c.orthogonal * jnp.concatenate(norms).mean()


def ranks(params: Any) -> dict[str, list[int]]:
    """Returns how many directions are left in each layer of each target."""
    flat = tree.flatten(params["adapter"])
    return {p.removesuffix("/e"): [int(n) for n in (x != 0).sum(1)] for p, x in flat.items() if p.endswith("/e")}


def peft_config(values: Mapping[str, Any], targets: tuple[str, ...], rank: int) -> AdaLora:
    """Returns the settings of a file, whose scale is that of the rank it began with."""
    return AdaLora(
        targets=targets, rank=int(values["init_r"]), dropout=float(values.get("lora_dropout", 0)),
        alpha=float(values["lora_alpha"]), target_rank=int(values["target_r"]),
        orthogonal=float(values["orth_reg_weight"]),
    )  # fmt: skip


def peft_settings(c: AdaLora, rank: int, others: Mapping[str, int]) -> dict[str, Any]:
    return dict(
        peft_type="ADALORA", init_r=c.rank, target_r=c.target_rank, lora_alpha=c.alpha, total_step=1,
        lora_dropout=c.dropout, orth_reg_weight=c.orthogonal, rank_pattern=None, bias="none",
    )  # fmt: skip


method = Method[AdaLora](
    Config=AdaLora,
    targets=low_rank.TARGETS,
    specs=specs,
    bind=low_rank.bind,
    rate=lora.rate,
    wrap_optimizer=allocating,
    penalty=penalty,
    factors=low_rank.factors,
    defining=("rank", "alpha"),
    peft=PeftFormat[AdaLora](
        reads=("ADALORA",),
        config=peft_config,
        settings=peft_settings,
        tensors=dict(
            a=PeftTensor("lora_A", "a"), b=PeftTensor("lora_B", "b"), e=PeftTensor("lora_E", "rank", column=True)
        ),
    ),
)
