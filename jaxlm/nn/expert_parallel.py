"""Expert parallelism: tokens travel to the devices that hold their experts, and what came of them travels back.

N tokens of this device, K choices a token, M = N·K pairs, X devices that share the experts, E experts a device, S pairs
that one device may send to another, R = X·S rows that a device may receive. Nothing is dropped: S is the worst case.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlm.runtime.mesh import platform

Axes = tuple[str, ...]
Run = Callable[[jax.Array, jax.Array], jax.Array]


def way() -> tuple[str, str]:
    """How pairs travel on this backend, and why."""
    backend = platform()
    if backend in ("tpu", "gpu"):
        return "ragged", "each pair is sent once"
    return "padded", f"room for the worst case is sent, as {backend} has no ragged all-to-all"


def dispatched(x_ND: jax.Array, expert_NK: jax.Array, experts: int, axes: Axes, run: Run) -> jax.Array:
    """`y_NKD` of every pair. This device holds `experts` of them; `run(x_RD, expert_R1)` gives their `y_R1D`, where
    expert number `experts` marks a row that holds no pair."""
    return (_ragged if way()[0] == "ragged" else _padded)(x_ND, expert_NK, experts, axes, run)


def _most(expert_NK: jax.Array, experts: int) -> int:
    """S: a token's choices are different experts."""
    N, K = expert_NK.shape
    return N * min(K, experts)


def _sorted(expert_NK: jax.Array, experts: int, ways: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(pairs in order of their experts, each pair's place in that order, how many each expert has `[X, E]`)."""
    expert_M = expert_NK.reshape(-1)
    order_M = jnp.argsort(expert_M, stable=True)
    place_M = jnp.zeros_like(expert_M).at[order_M].set(jnp.arange(expert_M.size, dtype=expert_M.dtype))
    count = (expert_M[:, None] == jnp.arange(ways * experts, dtype=expert_M.dtype)[None]).sum(0, dtype=jnp.int32)
    return order_M, place_M, count.reshape(ways, experts)


def _before(count: jax.Array, axis: int = 0) -> jax.Array:
    return jnp.cumsum(count, axis) - count


def _padded(x_ND: jax.Array, expert_NK: jax.Array, experts: int, axes: Axes, run: Run) -> jax.Array:
    X, S, D = jax.lax.axis_size(axes), _most(expert_NK, experts), x_ND.shape[-1]
    M, K = expert_NK.size, expert_NK.shape[1]
    _, place_M, count_XE = _sorted(expert_NK, experts, X)
    to_M, inner_M = expert_NK.reshape(-1) // experts, expert_NK.reshape(-1) % experts
    slot_M = to_M * S + place_M - _before(count_XE.sum(1))[to_M]
    source_R = jnp.full(X * S, M, jnp.int32).at[slot_M].set(jnp.arange(M, dtype=jnp.int32))
    exchange = lambda a: jax.lax.all_to_all(a, axes, 0, 0, tiled=True)  # noqa: E731
    x_RD = exchange(x_ND.at[source_R // K].get(mode="fill", fill_value=0))
    expert_R = exchange(inner_M.at[source_R].get(mode="fill", fill_value=experts))
    y_RD = exchange(run(x_RD, expert_R[:, None])[:, 0])
    return y_RD[slot_M].reshape(*expert_NK.shape, D)


def _ragged(x_ND: jax.Array, expert_NK: jax.Array, experts: int, axes: Axes, run: Run) -> jax.Array:
    X, S, D = jax.lax.axis_size(axes), _most(expert_NK, experts), x_ND.shape[-1]
    K = expert_NK.shape[1]
    order_M, place_M, count_XE = _sorted(expert_NK, experts, X)
    all_XXE = jax.lax.all_gather(count_XE, axes)  # of each sender, for each receiver
    me = jax.lax.axis_index(axes)
    sent_X, size_XX, received_XE = count_XE.sum(1), all_XXE.sum(-1), all_XXE[:, me]
    received_X = received_XE.sum(1)
    # Where each of ours begins here and there: senders' pairs stand in the order of senders, each sender's by expert.
    begins_X, lands_X = _before(sent_X), _before(size_XX)[me]
    x_MD = x_ND[order_M // K]
    empty_RD = jnp.zeros_like(x_MD, shape=(X * S, D)) + 0 * x_MD[:1]  # differs between devices as x does
    x_RD = jax.lax.ragged_all_to_all(x_MD, empty_RD, begins_X, sent_X, lands_X, received_X, axis_name=axes)
    end_G = jnp.cumsum(received_XE.reshape(-1))
    row_R = jnp.arange(X * S, dtype=jnp.int32)
    expert_R = jnp.searchsorted(end_G, row_R, side="right").astype(jnp.int32) % experts
    y_RD = run(x_RD, jnp.where(row_R < end_G[-1], expert_R, experts)[:, None])[:, 0]
    returns_X = _before(size_XX, 1)[:, me]
    y_MD = jax.lax.ragged_all_to_all(
        y_RD, jnp.zeros_like(x_MD) + 0 * x_MD, _before(received_X), received_X, returns_X, sent_X, axis_name=axes
    )
    return y_MD[place_M].reshape(*expert_NK.shape, D)
