"""Implements expert parallelism: tokens travel to the devices that hold their experts, and the results travel back.

N tokens of this device, K choices a token, M = N·K pairs, X devices that share the experts, E experts a device, S pairs
that one device may send to another, R = X·S rows that a device may receive. No pair is dropped: S is the worst case.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxlm.runtime.mesh import platform

Axes = tuple[str, ...]
Run = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class ExchangeChoice:
    """An ExchangeChoice says how pairs travel between devices, and why."""

    method: Literal["ragged", "padded"]
    reason: str

    def describe(self) -> str:
        """Returns the choice as people read it: `ragged: why`."""
        return f"{self.method}: {self.reason}"


def choose() -> ExchangeChoice:
    """Returns how pairs travel on this backend."""
    backend = platform()
    if backend in ("tpu", "gpu"):
        return ExchangeChoice("ragged", "each pair is sent once")
    return ExchangeChoice("padded", f"room for the worst case is sent, as {backend} has no ragged all-to-all")


def dispatch(x_ND: jax.Array, expert_NK: jax.Array, experts: int, axes: Axes, run: Run) -> jax.Array:
    """Returns `y_NKD`, what the experts give for every pair, wherever they are.

    This device holds `experts` of them; `run(x_RD, expert_R1)` returns their `y_R1D`, where expert number `experts`
    marks a row that holds no pair.
    """
    return (_ragged if choose().method == "ragged" else _padded)(x_ND, expert_NK, experts, axes, run)


def _max_pairs(expert_NK: jax.Array, experts: int) -> int:
    """Returns S, which counts that a token's choices are different experts."""
    N, K = expert_NK.shape
    return N * min(K, experts)


def _sorted(expert_NK: jax.Array, experts: int, devices: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the pairs in order of their experts, each pair's rank in that order, and the pairs of each expert `[X,
    E]`."""
    expert_M = expert_NK.reshape(-1)
    order_M = jnp.argsort(expert_M, stable=True)
    rank_M = jnp.zeros_like(expert_M).at[order_M].set(jnp.arange(expert_M.size, dtype=expert_M.dtype))
    count = (expert_M[:, None] == jnp.arange(devices * experts, dtype=expert_M.dtype)[None]).sum(0, dtype=jnp.int32)
    return order_M, rank_M, count.reshape(devices, experts)


def _exclusive_cumsum(count: jax.Array, axis: int = 0) -> jax.Array:
    return jnp.cumsum(count, axis) - count


def _padded(x_ND: jax.Array, expert_NK: jax.Array, experts: int, axes: Axes, run: Run) -> jax.Array:
    X, S, D = jax.lax.axis_size(axes), _max_pairs(expert_NK, experts), x_ND.shape[-1]
    M, K = expert_NK.size, expert_NK.shape[1]
    _, rank_M, count_XE = _sorted(expert_NK, experts, X)
    device_M, local_expert_M = expert_NK.reshape(-1) // experts, expert_NK.reshape(-1) % experts
    slot_M = device_M * S + rank_M - _exclusive_cumsum(count_XE.sum(1))[device_M]
    source_R = jnp.full(X * S, M, jnp.int32).at[slot_M].set(jnp.arange(M, dtype=jnp.int32))
    exchange = lambda a: jax.lax.all_to_all(a, axes, 0, 0, tiled=True)  # noqa: E731
    x_RD = exchange(x_ND.at[source_R // K].get(mode="fill", fill_value=0))
    expert_R = exchange(local_expert_M.at[source_R].get(mode="fill", fill_value=experts))
    y_RD = exchange(run(x_RD, expert_R[:, None])[:, 0])
    return y_RD[slot_M].reshape(*expert_NK.shape, D)


def _ragged(x_ND: jax.Array, expert_NK: jax.Array, experts: int, axes: Axes, run: Run) -> jax.Array:
    X, S, D = jax.lax.axis_size(axes), _max_pairs(expert_NK, experts), x_ND.shape[-1]
    K = expert_NK.shape[1]
    order_M, rank_M, count_XE = _sorted(expert_NK, experts, X)
    all_XXE = jax.lax.all_gather(count_XE, axes)  # what each sender has for each receiver
    own = jax.lax.axis_index(axes)
    sent_X, size_XX, received_XE = count_XE.sum(1), all_XXE.sum(-1), all_XXE[:, own]
    received_X = received_XE.sum(1)
    # A receiver's pairs lie in the order of their senders, and each sender's in the order of experts.
    send_offset_X, receive_offset_X = _exclusive_cumsum(sent_X), _exclusive_cumsum(size_XX)[own]
    x_MD = x_ND[order_M // K]
    empty_RD = (
        jnp.zeros_like(x_MD, shape=(X * S, D)) + 0 * x_MD[:1]
    )  # the sum makes it differ between devices as x does
    x_RD = jax.lax.ragged_all_to_all(
        x_MD, empty_RD, send_offset_X, sent_X, receive_offset_X, received_X, axis_name=axes
    )
    end_G = jnp.cumsum(received_XE.reshape(-1))
    row_R = jnp.arange(X * S, dtype=jnp.int32)
    expert_R = jnp.searchsorted(end_G, row_R, side="right").astype(jnp.int32) % experts
    y_RD = run(x_RD, jnp.where(row_R < end_G[-1], expert_R, experts)[:, None])[:, 0]
    return_offset_X = _exclusive_cumsum(size_XX, 1)[:, own]
    y_MD = jax.lax.ragged_all_to_all(
        y_RD,
        jnp.zeros_like(x_MD) + 0 * x_MD,
        _exclusive_cumsum(received_X),
        received_X,
        return_offset_X,
        sent_X,
        axis_name=axes,
    )
    return y_MD[rank_M].reshape(*expert_NK.shape, D)
