"""Implements a mixture of experts: each token goes to a few of many feed-forward networks, which a router picks for it.

B batch, T position, N = B·T tokens, K choices a token, E experts, D model width, F an expert's width.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.core.ranges import Count, Natural, NonNegative, Positive
from jaxlm.core.spec import Spec, bias, fan_in, zeros
from jaxlm.nn import expert_ffn, expert_parallel, layers, pipeline
from jaxlm.nn.kernels import grouped_matmul
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import is_leaf


@dataclass(frozen=True)
class Moe:
    """A Moe configures a mixture of experts: its sizes, how a router chooses among them, and how their load is
    balanced."""

    experts: Count = 8
    top_k: Count = 2
    """Experts that a token goes to."""
    ffn: Count = 2048
    """Width of each expert."""
    shared: Natural = 0
    """Width of a feed-forward network that every token goes through as well; 0: none."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = True
    """A token's weights add up to `scale`. (Softmax over the chosen experts alone is the same as this.)"""
    scale: Positive = 1.0
    """What the weights of the chosen experts are multiplied by."""
    groups: Count = 1
    """Experts stand in this many equal groups, and a token chooses within the best `top_groups` of them. A group is as
    good as its best expert (softmax, DeepSeek V2), or as its two best together (sigmoid, DeepSeek V3)."""
    top_groups: Count = 1
    selection_bias: bool = False
    """Experts are balanced by a bias that counts in the choice alone and that moves against the load (DeepSeek V3)."""
    capacity: Positive | None = None
    """Places an expert has for a row's tokens, as a multiple of an equal share of those that are no padding; tokens
    beyond skip the expert. First choices come before second ones, then earlier tokens before later ones. None: no token
    is ever dropped."""
    balance: NonNegative = 0.01
    """Weight of the balance loss E · Σ f·P of each row (Fedus et al. 2021), with f the share of choices, P of scores;
    1 · `balance` where experts are used evenly."""
    router_z: NonNegative = 0.0
    """Weight of the router's z-loss: mean squared log Z (Zoph et al. 2022)."""


class Tally(NamedTuple):
    """A Tally holds figures of each row over its real tokens, summed over layers."""

    aux_B: Any
    """Balance and z-loss, with their coefficients."""
    dropped_B: Any
    """Share of choices that found no place."""

    def plus(self, other: "Tally") -> "Tally":
        """Returns the sum with another layer's figures."""
        return Tally(self.aux_B + other.aux_B, self.dropped_B + other.dropped_B)

    def shown(self, c: Moe, layers: int) -> dict[str, jax.Array] | None:
        """Returns the figures for `layers.Output.shown_B`, after so many layers have been added up; None without a
        capacity."""
        return None if c.capacity is None else {"dropped": self.dropped_B / layers}


BIAS_PULL = 1e-6  # so small that the biases' gradient, whose sign alone counts, adds nothing to the global norm


def specs(c: Moe, width: int, *, deep: float = 1.0, biases: bool = False) -> dict[str, Any]:
    """Returns the specs of a mixture's weights: `router` (D E), `experts` and `shared` (gate, up: D F; down: F D).

    `deep` scales the initial weights of what goes to the residual stream; `biases` adds those of router and experts.
    Raises ValueError where the sizes don't fit each other.
    """
    E, D, F, S = c.experts, width, c.ffn, c.shared
    if not 0 < c.top_k <= E:
        raise ValueError(f"model.moe.top_k: {c.top_k} choices among {E} experts")
    if E % c.groups or not 0 < c.top_groups <= c.groups or c.top_k > E // c.groups * c.top_groups:
        raise ValueError(
            f"model.moe.groups: {c.top_groups} of {c.groups} groups of {E} experts do not hold {c.top_k} choices"
        )
    up = Spec((E, D, F), ("experts", "embed", "ffn"), fan_in(1))
    experts = dict(gate=up, up=up, down=Spec((E, F, D), ("experts", "ffn", "embed"), fan_in(1, scale=deep)))
    out: dict[str, Any] = dict(router=Spec((D, E), ("embed", "router"), fan_in(0), role="router"), experts=experts)
    if biases:
        out["router_bias"] = bias(E, "router")
        experts |= {f"{n}_bias": bias((E, F), "experts", "ffn") for n in ("gate", "up")}
        experts["down_bias"] = bias((E, D), "experts", "embed")
    if c.selection_bias:
        out["selection_bias"] = Spec((E,), ("router",), zeros, role="selection_bias")
    if S:
        wide = Spec((D, S), ("embed", "ffn"), fan_in(0))
        out["shared"] = dict(gate=wide, up=wide, down=Spec((S, D), ("ffn", "embed"), fan_in(0, scale=deep)))
    return out


def route(c: Moe, logits: jax.Array, bias_E: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses experts by float32 logits `[…, E]`; returns weights `[…, K]`, experts `[…, K]`, scores that add up to one
    `[…, E]`."""
    E = c.experts
    if c.score == "softmax":
        score, preference = jax.nn.softmax(logits, -1), logits
    else:
        score = preference = jax.nn.sigmoid(logits)
    if bias_E is not None:
        preference = preference + bias_E.reshape((1,) * (preference.ndim - 1) + (E,))
    if c.groups > 1:
        preference_G = preference.reshape(*preference.shape[:-1], c.groups, E // c.groups)
        if c.score == "sigmoid":
            group = jax.lax.top_k(preference_G, min(2, E // c.groups))[0].sum(-1)
        else:
            group = preference_G.max(-1)
        is_best = jax.nn.one_hot(jax.lax.top_k(group, c.top_groups)[1], c.groups, dtype=bool).any(-2)
        preference = jnp.where(jnp.repeat(is_best, E // c.groups, -1), preference, -jnp.inf)
    chosen = jax.lax.top_k(preference, c.top_k)[1]
    if not c.normalized:
        weights = jnp.take_along_axis(score, chosen, -1)
    elif c.score == "softmax":
        weights = jax.nn.softmax(jnp.take_along_axis(logits, chosen, -1), -1)
    else:
        weights = jnp.take_along_axis(score, chosen, -1)
        weights /= weights.sum(-1, keepdims=True) + 1e-20
    if c.score == "sigmoid":
        score = score / score.sum(-1, keepdims=True)
    return weights * c.scale, chosen, score


TRAINED_WITH = ("capacity", "balance", "router_z")  # these matter in training alone: published files omit them


def check_published(c: Moe, published: Moe, model_type: str) -> None:
    """Refuses a mixture that files of this `model_type`, which have the fields of `published`, can't express."""
    for f in dataclasses.fields(Moe):
        if f.name not in TRAINED_WITH and getattr(c, f.name) != getattr(published, f.name):
            raise ValueError(
                f"model.moe.{f.name}: {getattr(c, f.name)} is not in files of model_type {model_type!r}, which have "
                f"{getattr(published, f.name)}; set that, or another model.model_type"
            )


def silu_gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns silu(gate) · up."""
    return jax.nn.silu(gate) * up


EXPERT_AXES = {
    "gate": ("experts", None, "ffn"),
    "up": ("experts", None, "ffn"),
    "down": ("experts", "ffn", None),
    "gate_bias": ("experts", "ffn"),
    "up_bias": ("experts", "ffn"),
    "down_bias": ("experts", None),
}


def mixture(
    c: Moe,
    p: dict,
    x_BTD: jax.Array,
    segments_BT: jax.Array | None,
    *,
    shard: Layout,
    act: expert_ffn.Gated = silu_gated,
    may_drop: bool = True,
) -> tuple[jax.Array, Tally]:
    """Applies the experts' part of a block to `[B, T, D]`; returns `[B, T, D]` and the layer's figures.

    On a mesh no expert's weights move. Where the batch is split over the experts' axes tokens travel to their experts
    and back; else every device sends the tokens through its own experts, and results are added up. Parts of an expert's
    width are added up either way. `act` combines the products of gate and up. With `may_drop` off (generation) routing
    has no capacity.
    """
    real_BT = jnp.ones(x_BTD.shape[:2], bool) if segments_BT is None else segments_BT > 0
    routed = {k: v for k, v in p.items() if k in ("router", "router_bias", "selection_bias", "experts")}
    if any(map(is_leaf, p["experts"].values())):  # of a calibration
        _, chosen_BTK, _ = _chosen(c, p, x_BTD)
        sent_BTE = jax.nn.one_hot(chosen_BTK, c.experts).sum(2) * real_BT[..., None]
        x_BTD, routed["experts"] = expert_ffn.noted(p["experts"], x_BTD, sent_BTE.reshape(-1, c.experts).T, act)
    y_BTD, tally = _routed(c if may_drop else dataclasses.replace(c, capacity=None), routed, x_BTD, real_BT, shard, act)
    return (y_BTD + layers.mlp(p["shared"], x_BTD, "silu", shard) if "shared" in p else y_BTD), tally


def start(x_BTD: jax.Array, shard: Layout) -> Tally:
    """Returns the figures before any layer, to which blocks add theirs."""
    zero_B = shard(jnp.zeros(x_BTD.shape[0], jnp.float32), "batch")
    return Tally(zero_B, zero_B)


@dataclass(frozen=True)
class MoeChoice:
    """A MoeChoice says how a mixture's experts are computed, and how tokens reach those of other devices."""

    capacity: float | None
    """The places of an expert as a multiple of an equal share; None: it computes on as many rows as it has."""
    matmul: grouped_matmul.GroupedMatmulChoice
    """How experts without a capacity multiply rows."""
    devices: int
    """How many devices share the experts."""
    exchange: expert_parallel.ExchangeChoice | None
    """How tokens travel to those devices; None: every device has all tokens."""

    def describe(self) -> str:
        """Returns the choice as people read it."""
        how = self.matmul.description if self.capacity is None else f"capacity {self.capacity:g}"
        if self.devices == 1:
            return how
        if self.exchange is None:
            return f"{how}; every device has all tokens"
        return f"{how}; tokens travel ({self.exchange.describe()})"


def choose(c: Moe, layout: Layout, mesh: jax.sharding.Mesh | None) -> MoeChoice:
    """Returns how a mixture is computed by this layout on this mesh."""
    devices = 1 if mesh is None else mesh.shape["expert"]
    travels = devices > 1 and "expert" in layout.over("batch")
    return MoeChoice(c.capacity, grouped_matmul.choose(), devices, expert_parallel.choose() if travels else None)


def _routed(
    c: Moe, p: dict, x_BTD: jax.Array, real_BT: jax.Array, shard: Layout, act: expert_ffn.Gated
) -> tuple[jax.Array, Tally]:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _local(p, x_BTD, real_BT, c=c, act=act, axes=_Axes())
    axes = _Axes(*(shard.compute.get(a, ()) for a in ("batch", "seq", "experts", "ffn")))
    if math.prod(mesh.shape[a] for a in axes.experts) == 1:
        axes = axes._replace(experts=())
    if 0 < len(shared := set(axes.experts) & set(axes.batch)) < len(axes.experts):
        raise ValueError(
            f"mesh.compute: experts are over {'+'.join(axes.experts)}, and the batch over {'+'.join(shared)} of these; "
            "give it all of them (tokens travel) or none"
        )
    scatters = shard.streams and shard.over("stream") == axes.seq + axes.ffn
    if shard.mesh.axis_type == "explicit" and pipeline.stages() > 1:
        scatters = False  # JAX's rule for vmapped reduce-scatters knows no explicit axes: summed whole, then cut
    specs = {k: PartitionSpec() for k in p} | {"experts": {k: shard.spec(EXPERT_AXES[k]) for k in p["experts"]}}
    token_spec, row_spec = shard.spec(("batch", "seq", None)), shard.spec(("batch",))
    run = jax.shard_map(
        partial(_local, c=c, act=act, axes=axes, scatters=scatters),
        check_vma=pipeline.types_checked() and grouped_matmul.types_checked(),
        in_specs=(specs, token_spec, shard.spec(("batch", "seq"))),
        out_specs=(shard.spec(("batch", "stream", None)) if scatters else token_spec, Tally(row_spec, row_spec)),
    )
    y_BTD, tally = run(p, shard(x_BTD, "batch", "seq", None), shard(real_BT, "batch", "seq"))
    return shard(y_BTD, "batch", "stream", None), tally


class _Axes(NamedTuple):
    """Mesh axes over which rows, positions, experts and their width are split: empty on one device."""

    batch: tuple[str, ...] = ()
    seq: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    ffn: tuple[str, ...] = ()

    @property
    def travels(self) -> bool:
        """Returns whether a token's experts may be on devices that don't have the token."""
        return bool(self.experts) and set(self.experts) <= set(self.batch)


def _sum(x: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.psum(x, axes) if axes else x


def _local(
    p: dict, x_BTD: jax.Array, real_BT: jax.Array, *, c: Moe, act: expert_ffn.Gated, axes: _Axes, scatters: bool = False
) -> tuple[Any, Tally]:
    """Sends one device's tokens through its experts, or through all. With `scatters` positions are split as parts add
    up."""
    B, T, D = x_BTD.shape
    (logits_BTE, bias_E), chosen_BTK, (weights_BTK, scores_BTE) = _chosen(c, p, x_BTD)
    places, placed_BTK, place_BTK = 0, None, None
    if c.capacity is not None:
        # A row has places by its real tokens, so that what it drops doesn't depend on how far it is padded.
        by_tokens = [math.ceil(c.capacity * n * c.top_k / c.experts) for n in range(T * _ways(axes.seq) + 1)]
        places, n_B = by_tokens[-1], _sum(real_BT.sum(1, dtype=jnp.int32), axes.seq)
        places_B = jnp.asarray(by_tokens, jnp.int32)[n_B]
        placed_BTK, place_BTK = expert_ffn.assign_places(chosen_BTK, real_BT, c.experts, places_B, axes.seq)
    tally = _tally(c, logits_BTE, scores_BTE, chosen_BTK, real_BT, bias_E, placed_BTK, axes.seq)

    every = tuple(dict.fromkeys(axes.batch + axes.seq + axes.experts + axes.ffn))
    w, x_ND, weights_NK, chosen_NK = pipeline.vary(
        (p["experts"], *(a.reshape(B * T, -1) for a in (x_BTD, weights_BTK, chosen_BTK))), every
    )
    if "down_bias" in w and axes.ffn:  # the bias is added once, though every part of the width gives a part of the sum
        w = w | {"down_bias": w["down_bias"] * (jax.lax.axis_index(axes.ffn) == 0).astype(w["down_bias"].dtype)}
    E = w["gate"].shape[0]
    summed_over = () if axes.travels else axes.experts
    sent_over = axes.experts if axes.travels else ()
    first_expert, reached = E * jax.lax.axis_index(summed_over) if summed_over else 0, E * _ways(sent_over)
    reached_NK = (chosen_NK >= first_expert) & (chosen_NK < first_expert + reached)
    chosen_NK = jnp.where(reached_NK, chosen_NK - first_expert, reached)
    if placed_BTK is None or place_BTK is None:
        run_experts = partial(expert_ffn.without_capacity, w, act=act)
        if sent_over:
            y_NKD = expert_parallel.dispatch(x_ND, chosen_NK, E, sent_over, run_experts)
        else:
            y_NKD = run_experts(x_ND, chosen_NK)
    else:
        size = min(places, T)  # no more of this device's tokens can want an expert
        row_N1 = (jnp.arange(B * T) // T)[:, None]
        slot_NK = (chosen_NK * B + row_N1) * size + place_BTK.reshape(B * T, -1)
        placed_NK = placed_BTK.reshape(B * T, -1) & reached_NK
        slot_NK = jnp.where(placed_NK, slot_NK, reached * B * size)
        y_NKD = expert_ffn.with_capacity(w, x_ND, slot_NK, B * size, act, sent_over)
    y_ND = (y_NKD.astype(jnp.float32) * weights_NK[..., None]).sum(1)
    y_BTD = _sum(y_ND.astype(x_BTD.dtype).reshape(B, T, D), summed_over if scatters else summed_over + axes.ffn)
    return (jax.lax.psum_scatter(y_BTD, axes.ffn, scatter_dimension=1, tiled=True) if scatters else y_BTD), tally


def _chosen(c: Moe, p: dict, x_BTD: jax.Array) -> tuple[Any, jax.Array, Any]:
    """Returns (logits, the bias of the choice or None), the experts of each token, (their weights, all scores)."""
    # Routing is float32 throughout, on any hardware: rounding that changes an order sends tokens to other experts.
    logits_BTE = jnp.einsum(
        "btd,de->bte", x_BTD.astype(jnp.float32), p["router"].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    if "router_bias" in p:
        logits_BTE += p["router_bias"].astype(jnp.float32)[None, None]
    bias_E = p["selection_bias"].astype(jnp.float32) if "selection_bias" in p else None
    weights_BTK, chosen_BTK, scores_BTE = route(c, logits_BTE, bias_E)
    return (logits_BTE, bias_E), chosen_BTK, (weights_BTK, scores_BTE)


def _ways(axes: tuple[str, ...]) -> int:
    return jax.lax.axis_size(axes) if axes else 1


def _tally(
    c: Moe,
    logits_BTE: jax.Array,
    scores_BTE: jax.Array,
    chosen_BTK: jax.Array,
    real_BT: jax.Array,
    bias_E: jax.Array | None,
    placed_BTK: jax.Array | None,
    seq: tuple[str, ...],
) -> Tally:
    """Computes each row's figures by itself, so that micro-batches and meshes add up to the same loss."""

    def total(x_BT: jax.Array) -> jax.Array:
        real = real_BT.reshape(*real_BT.shape, *(1,) * (x_BT.ndim - 2))
        return _sum(jnp.where(real, x_BT, 0).sum(1), seq)

    n_B = jnp.maximum(_sum(real_BT.sum(1, dtype=jnp.float32), seq), 1)
    used_BE = total(jax.nn.one_hot(chosen_BTK, c.experts).sum(2)) / (c.top_k * n_B[:, None])
    aux_B = c.balance * c.experts * (used_BE * total(scores_BTE) / n_B[:, None]).sum(-1)
    if c.router_z:
        aux_B += c.router_z * total(jnp.square(jax.nn.logsumexp(logits_BTE, -1))) / n_B
    if (
        bias_E is not None
    ):  # its value is zero; its gradient says which experts are used too much, for the optimizer `balance`
        constant = jax.lax.stop_gradient
        aux_B += BIAS_PULL * (constant(c.experts * used_BE - 1) * (bias_E - constant(bias_E))[None]).sum(-1)
    if placed_BTK is None:
        return Tally(aux_B, jnp.zeros_like(aux_B))
    return Tally(aux_B, total((~placed_BTK).sum(-1, dtype=jnp.float32)) / (c.top_k * n_B))
