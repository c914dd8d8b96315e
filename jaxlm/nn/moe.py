"""Mixture of experts: each token goes to a few of many feed-forward networks, which a router picks for it.

B batch, T position, N = B·T tokens, K choices a token, M = N·K (token, choice) pairs, E experts, D model width, F an
expert's width, P rows that experts compute on: the pairs, laid out expert by expert.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.core.spec import Spec, bias, fan_in, zeros
from jaxlm.nn import expert_parallel, layers, pipeline
from jaxlm.nn.kernels import grouped_matmul
from jaxlm.nn.layout import Layout


@dataclass(frozen=True)
class Moe:
    experts: int = 8
    top_k: int = 2
    """Experts that a token goes to."""
    ffn: int = 2048
    """Width of each expert."""
    shared: int = 0
    """Width of a feed-forward network that every token goes through besides; 0: none."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = True
    """A token's weights add up to `scale`. (Softmax over the chosen experts alone is the same as this.)"""
    scale: float = 1.0
    """What the weights of the chosen experts are multiplied by."""
    groups: int = 1
    """Experts stand in this many equal groups, and a token chooses within the best `top_groups` of them. A group is as
    good as its best expert (softmax, DeepSeek V2), or as its two best together (sigmoid, DeepSeek V3)."""
    top_groups: int = 1
    selection_bias: bool = False
    """Experts are balanced by a bias that counts in the choice alone and that moves against the load (DeepSeek V3)."""
    capacity: float | None = None
    """Places an expert has for a row's tokens, as a multiple of an equal share; what finds no place skips the expert.
    First choices come before second ones, then earlier tokens before later ones. None: no token is ever dropped."""
    balance: float = 0.01
    """Weight of the balance loss E · Σ f·P of each row (Fedus et al. 2021), with f the share of choices, P of scores;
    1 · `balance` where experts are used evenly."""
    router_z: float = 0.0
    """Weight of the router's z-loss: mean squared log Z (Zoph et al. 2022)."""


class Tally(NamedTuple):
    """Of each row, over its real tokens; summed over layers."""

    aux_B: Any
    """Balance and z-loss."""
    dropped_B: Any
    """Share of choices that found no place."""

    def plus(self, more: "Tally") -> "Tally":
        return Tally(self.aux_B + more.aux_B, self.dropped_B + more.dropped_B)

    def shown(self, c: Moe, layers: int) -> dict[str, jax.Array] | None:
        """For `layers.Output.shown_B`, given how many layers have been added up."""
        return None if c.capacity is None else {"dropped": self.dropped_B / layers}


BIAS_PULL = 1e-6  # so small that the biases' gradient, of which only the sign counts, is nothing in the global norm


def specs(c: Moe, width: int, *, deep: float = 1.0, biases: bool = False) -> dict[str, Any]:
    """`router` (D E), `experts` and `shared` (gate, up: D F; down: F D). `deep` scales what goes to the residual."""
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
    """Float32 logits `[…, E]` → (weights `[…, K]`, experts `[…, K]`, scores that add up to one `[…, E]`)."""
    E = c.experts
    if c.score == "softmax":
        score, merit = jax.nn.softmax(logits, -1), logits
    else:
        score = merit = jax.nn.sigmoid(logits)
    if bias_E is not None:
        merit = merit + bias_E.reshape((1,) * (merit.ndim - 1) + (E,))
    if c.groups > 1:
        merit_G = merit.reshape(*merit.shape[:-1], c.groups, E // c.groups)
        group = jax.lax.top_k(merit_G, min(2, E // c.groups))[0].sum(-1) if c.score == "sigmoid" else merit_G.max(-1)
        best = jax.nn.one_hot(jax.lax.top_k(group, c.top_groups)[1], c.groups, dtype=bool).any(-2)
        merit = jnp.where(jnp.repeat(best, E // c.groups, -1), merit, -jnp.inf)
    chosen = jax.lax.top_k(merit, c.top_k)[1]
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


TRAINED_WITH = ("capacity", "balance", "router_z")  # of training alone: published files do not say


def check_published(c: Moe, published: Moe, model_type: str) -> None:
    """Refuse a mixture that files of this `model_type`, which give `published`, can't express."""
    for f in dataclasses.fields(Moe):
        if f.name not in TRAINED_WITH and getattr(c, f.name) != getattr(published, f.name):
            raise ValueError(
                f"model.moe.{f.name}: {getattr(c, f.name)} is not in files of model_type {model_type!r}, which have "
                f"{getattr(published, f.name)}; set that, or another model.model_type"
            )


Gated = Callable[[jax.Array, jax.Array], jax.Array]


def silu_gated(gate: jax.Array, up: jax.Array) -> jax.Array:
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
    act: Gated = silu_gated,
    may_drop: bool = True,
) -> tuple[jax.Array, Tally]:
    """The experts' part of a block, `[B, T, D]` → `[B, T, D]`.

    On a mesh no expert's weights move. Where the batch is split over the experts' axes tokens travel to their experts
    and back; else every device sends the tokens through its own experts, and results are added up. Parts of an expert's
    width are added up either way. `may_drop` off (generation) is routing without capacity.
    """
    real_BT = jnp.ones(x_BTD.shape[:2], bool) if segments_BT is None else segments_BT > 0
    routed = {k: v for k, v in p.items() if k in ("router", "router_bias", "selection_bias", "experts")}
    y_BTD, tally = _routed(c if may_drop else dataclasses.replace(c, capacity=None), routed, x_BTD, real_BT, shard, act)
    return (y_BTD + layers.mlp(p["shared"], x_BTD, "silu", shard) if "shared" in p else y_BTD), tally


def start(x_BTD: jax.Array, shard: Layout) -> Tally:
    """Of no layer yet: what blocks add to."""
    zero_B = shard(jnp.zeros(x_BTD.shape[0], jnp.float32), "batch")
    return Tally(zero_B, zero_B)


def _routed(
    c: Moe, p: dict, x_BTD: jax.Array, real_BT: jax.Array, shard: Layout, act: Gated
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
    tokens, rows = shard.spec(("batch", "seq", None)), shard.spec(("batch",))
    run = jax.shard_map(
        partial(_local, c=c, act=act, axes=axes, scatters=scatters),
        check_vma=pipeline.types_checked() and grouped_matmul.checked(),
        in_specs=(specs, tokens, shard.spec(("batch", "seq"))),
        out_specs=(shard.spec(("batch", "stream", None)) if scatters else tokens, Tally(rows, rows)),
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
        """Whether a token's experts may be on devices that don't have the token."""
        return bool(self.experts) and set(self.experts) <= set(self.batch)


def _sum(x: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.psum(x, axes) if axes else x


def _local(
    p: dict, x_BTD: jax.Array, real_BT: jax.Array, *, c: Moe, act: Gated, axes: _Axes, scatters: bool = False
) -> tuple[Any, Tally]:
    """One device's tokens through its experts, or through all. `scatters`: positions are split as parts add up."""
    B, T, D = x_BTD.shape
    # Rounding that changes an order sends tokens to other experts: float32 throughout, on any hardware.
    logits_BTE = jnp.einsum(
        "btd,de->bte", x_BTD.astype(jnp.float32), p["router"].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    if "router_bias" in p:
        logits_BTE += p["router_bias"].astype(jnp.float32)[None, None]
    bias_E = p["selection_bias"].astype(jnp.float32) if "selection_bias" in p else None
    weights_BTK, chosen_BTK, scores_BTE = route(c, logits_BTE, bias_E)
    places = 0 if c.capacity is None else math.ceil(c.capacity * T * _ways(axes.seq) * c.top_k / c.experts)
    kept_BTK, place_BTK = _places(chosen_BTK, real_BT, c.experts, places, axes.seq) if places else (None, None)
    tally = _tally(c, logits_BTE, scores_BTE, chosen_BTK, real_BT, bias_E, kept_BTK, axes.seq)

    every = tuple(dict.fromkeys(axes.batch + axes.seq + axes.experts + axes.ffn))
    w, x_ND, weights_NK, chosen_NK = pipeline.vary(
        (p["experts"], *(a.reshape(B * T, -1) for a in (x_BTD, weights_BTK, chosen_BTK))), every
    )
    if "down_bias" in w and axes.ffn:  # once, though every part of the width gives a part of the sum
        w = w | {"down_bias": w["down_bias"] * (jax.lax.axis_index(axes.ffn) == 0).astype(w["down_bias"].dtype)}
    E = w["gate"].shape[0]
    here = () if axes.travels else axes.experts
    away = axes.experts if axes.travels else ()
    first, reached = E * jax.lax.axis_index(here) if here else 0, E * _ways(away)
    mine_NK = (chosen_NK >= first) & (chosen_NK < first + reached)
    chosen_NK = jnp.where(mine_NK, chosen_NK - first, reached)
    if kept_BTK is None or place_BTK is None:
        through = partial(_dropless, w, act=act)
        y_NKD = expert_parallel.dispatched(x_ND, chosen_NK, E, away, through) if away else through(x_ND, chosen_NK)
    else:
        size = min(places, T)  # no more of this device's tokens can want an expert
        row_N1 = (jnp.arange(B * T) // T)[:, None]
        slot_NK = (chosen_NK * B + row_N1) * size + place_BTK.reshape(B * T, -1)
        kept_NK = kept_BTK.reshape(B * T, -1) & mine_NK
        y_NKD = _fixed(w, x_ND, jnp.where(kept_NK, slot_NK, reached * B * size), B * size, act, away)
    y_ND = (y_NKD.astype(jnp.float32) * weights_NK[..., None]).sum(1)
    y_BTD = _sum(y_ND.astype(x_BTD.dtype).reshape(B, T, D), here if scatters else here + axes.ffn)
    return (jax.lax.psum_scatter(y_BTD, axes.ffn, scatter_dimension=1, tiled=True) if scatters else y_BTD), tally


def _ways(axes: tuple[str, ...]) -> int:
    return jax.lax.axis_size(axes) if axes else 1


def _tally(
    c: Moe,
    logits_BTE: jax.Array,
    scores_BTE: jax.Array,
    chosen_BTK: jax.Array,
    real_BT: jax.Array,
    bias_E: jax.Array | None,
    kept_BTK: jax.Array | None,
    seq: tuple[str, ...],
) -> Tally:
    """Every row for itself, so that micro-batches and meshes add up to the same loss."""

    def total(x_BT: jax.Array) -> jax.Array:
        real = real_BT.reshape(*real_BT.shape, *(1,) * (x_BT.ndim - 2))
        return _sum(jnp.where(real, x_BT, 0).sum(1), seq)

    n_B = jnp.maximum(_sum(real_BT.sum(1, dtype=jnp.float32), seq), 1)
    used_BE = total(jax.nn.one_hot(chosen_BTK, c.experts).sum(2)) / (c.top_k * n_B[:, None])
    aux_B = c.balance * c.experts * (used_BE * total(scores_BTE) / n_B[:, None]).sum(-1)
    if c.router_z:
        aux_B += c.router_z * total(jnp.square(jax.nn.logsumexp(logits_BTE, -1))) / n_B
    if bias_E is not None:  # worth zero; its gradient says which experts are used too much, for `optim.balance`
        still = jax.lax.stop_gradient
        aux_B += BIAS_PULL * (still(c.experts * used_BE - 1) * (bias_E - still(bias_E))[None]).sum(-1)
    if kept_BTK is None:
        return Tally(aux_B, jnp.zeros_like(aux_B))
    return Tally(aux_B, total((~kept_BTK).sum(-1, dtype=jnp.float32)) / (c.top_k * n_B))


def _places(
    chosen_BTK: jax.Array, real_BT: jax.Array, experts: int, places: int, seq: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """(whether a choice finds one of an expert's `places` for its row, which of this device's it takes)."""

    def before(count_BKE: jax.Array) -> jax.Array:
        """Of earlier choices."""
        return jnp.cumsum(count_BKE, 1) - count_BKE

    hit_BTKE = jax.nn.one_hot(chosen_BTK, experts, dtype=bool) & real_BT[..., None, None]
    hit_BKTE = hit_BTKE.astype(jnp.int32).swapaxes(1, 2)
    count_BKE = hit_BKTE.sum(2)
    all_BKE, earlier_BKE = count_BKE, jnp.zeros_like(count_BKE)
    if seq:  # a row's positions are split over devices
        count_SBKE = jax.lax.all_gather(count_BKE, seq)
        here = jnp.arange(count_SBKE.shape[0]) < jax.lax.axis_index(seq)
        all_BKE, earlier_BKE = count_SBKE.sum(0), jnp.where(here[:, None, None, None], count_SBKE, 0).sum(0)
    within_BKTE = jnp.cumsum(hit_BKTE, 2) - hit_BKTE

    def place(base_BKE: jax.Array) -> jax.Array:
        return ((within_BKTE + base_BKE[:, :, None]) * hit_BKTE).sum(-1).swapaxes(1, 2)

    kept_BTK = (place(before(all_BKE) + earlier_BKE) < places) & real_BT[..., None]
    return kept_BTK, place(before(count_BKE))


def _ffn(
    w: dict,
    x: jax.Array,
    act: Gated,
    dot: Callable[[jax.Array, jax.Array], jax.Array] = jnp.dot,
    row: Callable[[jax.Array], jax.Array] = lambda b: b[None],
) -> jax.Array:
    def times(x: jax.Array, name: str) -> jax.Array:
        y = dot(x, w[name])
        return y + row(w[f"{name}_bias"]) if f"{name}_bias" in w else y

    return times(act(times(x, "gate"), times(x, "up")), "down")


def _spread(x_ND: jax.Array, slot_NK: jax.Array, rows: int) -> jax.Array:
    """Tokens in the rows that their choices were given, zeros elsewhere; slots past the end are no rows."""
    N, K = slot_NK.shape
    source_P = (
        jnp.full(rows, N, jnp.int32).at[slot_NK.reshape(-1)].set(jnp.arange(N * K, dtype=jnp.int32) // K, mode="drop")
    )
    return x_ND.at[source_P].get(mode="fill", fill_value=0)


def _collect(y_PD: jax.Array, slot_NK: jax.Array) -> jax.Array:
    return y_PD.at[slot_NK].get(mode="fill", fill_value=0)


def _fixed(
    w: dict, x_ND: jax.Array, slot_NK: jax.Array, size: int, act: Gated, axes: tuple[str, ...] = ()
) -> jax.Array:
    """Every expert on `size` rows, or where experts are split over `axes` on as many of each of their devices."""
    X, (E, D) = _ways(axes), w["gate"].shape[:2]
    x_EPD = _spread(x_ND, slot_NK, X * E * size).reshape(X * E, size, D)
    if axes:
        x_EPD = jax.lax.all_to_all(x_EPD, axes, 0, 1, tiled=True)
    y_EPD = _ffn(w, x_EPD, act, lambda x, w: jnp.einsum("epi,eio->epo", x, w), lambda b: b[:, None])
    if axes:
        y_EPD = jax.lax.all_to_all(y_EPD, axes, 1, 0, tiled=True)
    return _collect(y_EPD.reshape(X * E * size, D), slot_NK)


def _dropless(w: dict, x_ND: jax.Array, expert_NK: jax.Array, act: Gated) -> jax.Array:
    """Every expert on as many rows as it has; pairs of expert E are not ours and give zero."""
    M, E = expert_NK.size, w["gate"].shape[0]
    expert_M = expert_NK.reshape(-1)
    order_M = jnp.argsort(expert_M, stable=True)
    slot_M = jnp.zeros(M, jnp.int32).at[order_M].set(jnp.arange(M, dtype=jnp.int32))
    size_E = (expert_M[:, None] == jnp.arange(E)[None]).sum(0, dtype=jnp.int32)
    block, blocks = grouped_matmul.block(M, E), grouped_matmul.way()[0] == "blocks"
    size, rows = (block, (M // block + min(E, M)) * block) if blocks else (1, -(-M // block) * block)
    room_E = -(-size_E // size) * size
    end_E = jnp.cumsum(room_E)
    shift_E = end_E - room_E - (jnp.cumsum(size_E) - size_E)
    slot_M = jnp.where(expert_M < E, slot_M + shift_E.at[expert_M].get(mode="fill", fill_value=0), rows)
    slot_NK = slot_M.reshape(expert_NK.shape)
    x_PD = _spread(x_ND, slot_NK, rows)
    begin_P = jnp.arange(0, rows, size)
    expert_P = jnp.searchsorted(end_E, begin_P, side="right", method="compare_all")  # E past the last one's rows
    if blocks:
        y_PD = grouped_matmul.in_blocks(partial(_ffn, act=act), w, x_PD, expert_P, end_E[-1] // size)
    else:
        dot = lambda x, w: grouped_matmul.dot(x, w, size_E, block)  # noqa: E731
        # A kernel may leave anything in the rows past the last group: no bias may take a gradient from there.
        y_PD = _ffn(w, x_PD, act, dot, lambda b: b.at[expert_P].get(mode="fill", fill_value=0))
    return _collect(y_PD, slot_NK)
