"""Runs experts' feed-forward networks on the tokens that chose them, with a capacity or without.

B batch, T position, N = B·T tokens, K choices a token, M = N·K (token, choice) pairs, E experts, D model width, F an
expert's width, P rows that experts compute on: the pairs, laid out expert by expert.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from jaxlm.nn.kernels import grouped_matmul
from jaxlm.nn.layers import add_bias
from jaxlm.nn.leaf import Wrapped

UNKNOWN_BLOCK = 8  # rows of a block where nobody knows how many there are
Gated = Callable[[jax.Array, jax.Array], jax.Array]


def assign_places(
    chosen_BTK: jax.Array, real_BT: jax.Array, experts: int, places_B: jax.Array, seq: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """Returns whether a choice finds one of the places that an expert has for its row, and which of this device's
    places it takes.

    First choices come before second ones, then earlier tokens before later ones. Over the mesh axes `seq` a row's
    positions are split. Both results are `[B, T, K]`.
    """

    def before(count_BKE: jax.Array) -> jax.Array:
        """Counts the tokens of earlier choices."""
        return jnp.cumsum(count_BKE, 1) - count_BKE

    hit_BTKE = jax.nn.one_hot(chosen_BTK, experts, dtype=bool) & real_BT[..., None, None]
    hit_BKTE = hit_BTKE.astype(jnp.int32).swapaxes(1, 2)
    count_BKE = hit_BKTE.sum(2)
    all_BKE, earlier_BKE = count_BKE, jnp.zeros_like(count_BKE)
    if seq:  # devices share a row's positions
        count_SBKE = jax.lax.all_gather(count_BKE, seq)
        is_earlier = jnp.arange(count_SBKE.shape[0]) < jax.lax.axis_index(seq)
        all_BKE, earlier_BKE = count_SBKE.sum(0), jnp.where(is_earlier[:, None, None, None], count_SBKE, 0).sum(0)
    within_BKTE = jnp.cumsum(hit_BKTE, 2) - hit_BKTE

    def place(offset_BKE: jax.Array) -> jax.Array:
        return ((within_BKTE + offset_BKE[:, :, None]) * hit_BKTE).sum(-1).swapaxes(1, 2)

    placed_BTK = (place(before(all_BKE) + earlier_BKE) < places_B[:, None, None]) & real_BT[..., None]
    return placed_BTK, place(before(count_BKE))


def _gated_ffn(
    w: dict,
    x: jax.Array,
    act: Gated,
    multiply: Callable[[jax.Array, jax.Array], jax.Array] = jnp.dot,
    per_row: Callable[[jax.Array], jax.Array] = lambda b: b[None],
) -> jax.Array:
    def linear(x: jax.Array, name: str) -> jax.Array:
        y = multiply(x, w[name])
        return add_bias(y, per_row(w[f"{name}_bias"])) if f"{name}_bias" in w else y

    return linear(act(linear(x, "gate"), linear(x, "up")), "down")


def noted(w: dict, x_BTD: jax.Array, sent_EN: jax.Array, act: Gated) -> tuple[jax.Array, dict]:
    """Returns the tokens, and the experts' weights without the leaves that record; these note what each expert's
    matrices read. `sent_EN` says how much each token counts for each expert: 0 where its router sends it elsewhere."""
    leaves = {name: leaf for name, leaf in w.items() if isinstance(leaf, Wrapped)}
    plain = w | {name: leaf.base for name, leaf in leaves.items()}
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])

    def of_tokens(record: Any) -> Any:
        return jax.lax.map(lambda sent_N: record(x_ND, sent_N), sent_EN)

    def of_hidden(record: Any) -> Any:
        def one(expert: Any) -> Any:
            own, sent_N = expert
            identity = jnp.eye(own["down"].shape[0], dtype=x_ND.dtype)
            hidden = {n: x for n, x in own.items() if n != "down_bias"} | {"down": identity}
            return record(_gated_ffn(hidden, x_ND, act), sent_N)

        return jax.lax.map(one, (plain, sent_EN))

    for name, leaf in leaves.items():
        x_BTD = leaf.noted(x_BTD, of_hidden if name == "down" else of_tokens)
    return x_BTD, plain


def _spread(x_ND: jax.Array, slot_NK: jax.Array, rows: int) -> jax.Array:
    """Puts tokens into the rows that their choices were given, and zeros into the others; slots past the end are no
    rows."""
    N, K = slot_NK.shape
    source_P = (
        jnp.full(rows, N, jnp.int32).at[slot_NK.reshape(-1)].set(jnp.arange(N * K, dtype=jnp.int32) // K, mode="drop")
    )
    return x_ND.at[source_P].get(mode="fill", fill_value=0)


def _collect(y_PD: jax.Array, slot_NK: jax.Array) -> jax.Array:
    return y_PD.at[slot_NK].get(mode="fill", fill_value=0)


def with_capacity(
    w: dict, x_ND: jax.Array, slot_NK: jax.Array, size: int, act: Gated, axes: tuple[str, ...] = ()
) -> jax.Array:
    """Runs every expert on `size` rows; returns `y_NKD`, zeros where `slot_NK` is past the end.

    Where experts are split over the mesh axes `axes`, each device sends so many rows to each expert of the others.
    """
    X, (E, D) = jax.lax.axis_size(axes) if axes else 1, w["gate"].shape[:2]
    x_EPD = _spread(x_ND, slot_NK, X * E * size).reshape(X * E, size, D)
    if axes:
        x_EPD = jax.lax.all_to_all(x_EPD, axes, 0, 1, tiled=True)
    y_EPD = _gated_ffn(w, x_EPD, act, lambda x, w: jnp.einsum("epi,eio->epo", x, w), lambda b: b[:, None])
    if axes:
        y_EPD = jax.lax.all_to_all(y_EPD, axes, 1, 0, tiled=True)
    return _collect(y_EPD.reshape(X * E * size, D), slot_NK)


def without_capacity(w: dict, x_ND: jax.Array, expert_NK: jax.Array, act: Gated) -> jax.Array:
    """Runs every expert on as many rows as chose it; returns `y_NKD`. Pairs of expert E are not this device's, and give
    zero."""
    M, E = expert_NK.size, w["gate"].shape[0]
    expert_M = expert_NK.reshape(-1)
    order_M = jnp.argsort(expert_M, stable=True)
    slot_M = jnp.zeros(M, jnp.int32).at[order_M].set(jnp.arange(M, dtype=jnp.int32))
    size_E = (expert_M[:, None] == jnp.arange(E)[None]).sum(0, dtype=jnp.int32)
    # The rows of an exported program are not known yet: they can't be compared, and any platform must run it.
    unknown = jax.export.is_symbolic_dim(M)
    blocks = unknown or grouped_matmul.choose().method == "blocks"
    block = UNKNOWN_BLOCK if unknown else grouped_matmul.block_size(M, E)
    most = M // block + (E if unknown else min(E, M))  # blocks, of which each group's last may not be full
    size, rows = (block, most * block) if blocks else (1, -(-M // block) * block)
    padded_E = -(-size_E // size) * size
    end_E = jnp.cumsum(padded_E)
    shift_E = end_E - padded_E - (jnp.cumsum(size_E) - size_E)
    slot_M = jnp.where(expert_M < E, slot_M + shift_E.at[expert_M].get(mode="fill", fill_value=0), rows)
    slot_NK = slot_M.reshape(expert_NK.shape)
    x_PD = _spread(x_ND, slot_NK, rows)
    row_P = jnp.arange(rows // size, dtype=jnp.int32) * size
    expert_P = jnp.searchsorted(end_E, row_P, side="right", method="compare_all")  # E past the last expert's rows
    if blocks:
        y_PD = grouped_matmul.in_blocks(partial(_gated_ffn, act=act), size, w, x_PD, expert_P, end_E[-1] // size)
    else:
        dot = lambda x, w: grouped_matmul.dot(x, w, size_E, block)  # noqa: E731
        # A kernel may leave anything in the rows past the last group: no bias may take a gradient from there.
        y_PD = _gated_ffn(w, x_PD, act, dot, lambda b: b.at[expert_P].get(mode="fill", fill_value=0))
    return _collect(y_PD, slot_NK)
