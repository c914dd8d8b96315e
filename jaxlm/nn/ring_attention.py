"""Computes attention over rows whose positions are split among devices: keys and values travel in a ring, so that no
device ever holds all of them (Liu et al. 2023).

B batch, T query position, S key position, H heads, K key/value heads, G = H / K, C width of keys, W of values; P parts
that a device holds of a row, and A positions of queries, Z of keys in one of them.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn import context_parallel, pipeline
from jaxlm.nn.layout import Layout
from jaxlm.nn.mask import Mask

MAX_SCORES = 1 << 20  # the most scores of one head and row that exist at one time: 4 MiB in float32
NOTHING = -1e30  # stands for the log of a sum of no exponentials: finite, so that the difference of two is a number

Arrays = dict[str, jax.Array]


class Plan(NamedTuple):
    """A Plan says how a ring goes: what is known before any number is, the same on every device."""

    axes: tuple[str, ...]
    """Mesh axes of the ring."""
    n: int
    """Devices of the ring."""
    parts: int
    """With 2 a device holds an early and a late part of the row, so that under a causal mask all have the same work."""
    first: int
    """How many devices before this one the keys of the ring's first stop come from."""
    stops: int
    """How often a device meets keys, its own included."""
    mask: Mask
    """The mask's causality and window alone."""
    scale: float
    softcap: float | None


def plan(mask: Mask, shard: Layout, T: int, S: int, scale: float, softcap: float | None) -> Plan:
    """Returns the ring for a request: the shortest way round, in the order that balances its work.

    T and S are the positions of a whole row. Raises ValueError where devices don't divide them, or the mask has keys
    that all rows share.
    """
    axes, n = shard.compute["seq"], context_parallel.num_devices(shard)
    if mask.common:
        raise ValueError("mesh.context_by: ring has no keys that all rows share (`adapter` prefix); choose gather")
    for name, length in (("queries", T), ("keys", S)):
        if length % n:
            raise ValueError(
                f"mesh.context: {length} positions of {name} do not divide over {n} devices; change their number"
            )
    static_mask = type(mask)(mask.causal, mask.window)
    # A prefix shows keys to earlier queries too, so that these may come from any device.
    if mask.window is not None and mask.prefix_BS is None:
        reach = -(-(mask.window - 1) // (S // n))  # in devices
        first, stops = (0, reach + 1) if mask.causal else (-reach, 2 * reach + 1)
        if stops < (n / 2 if mask.causal else n):
            return Plan(axes, n, 1, first, stops, static_mask, scale, softcap)
    balanced = mask.causal and mask.prefix_BS is None
    if balanced and T % (2 * n):
        raise ValueError(
            f"mesh.context_by: ring cuts rows into {2 * n} parts, which {T} positions do not divide into; make "
            f"train.seq_len a multiple of {2 * n}, or choose gather"
        )
    return Plan(axes, n, 2 if balanced else 1, 0, n, static_mask, scale, softcap)


def attend(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKW: jax.Array,
    mask: Mask,
    *,
    shard: Layout,
    scale: float,
    softcap: float | None,
    bias_BHTS: jax.Array | None,
    sinks_H: jax.Array | None,
) -> jax.Array:
    """Computes `attention.attend` with positions split: each device keeps its queries, and meets all keys that they may
    see.

    Keys and values go from device to device, (n - 1) / n of a row's each way, and their gradients with them on the way
    back. For a causal mask queries, keys, values and the result also move once each (`_swap`): a device that held the
    row's end alone would do twice the mean work. Scores are computed again in the backward pass: memory grows with T/n.
    """
    p = plan(mask, shard, q_BTHC.shape[1], k_BSKC.shape[1], scale, softcap)
    bias_axis = None if bias_BHTS is None or bias_BHTS.shape[0] == 1 else "batch"
    inputs = dict(
        q=(q_BTHC, ("batch", "seq", "heads", None)),
        k=(k_BSKC, ("batch", "seq", "kv", None)),
        v=(v_BSKW, ("batch", "seq", "kv", None)),
        bias=(bias_BHTS, (bias_axis, "heads", "seq", None)),
        sinks=(sinks_H, ("heads",)),
        own_segments=(mask.segments_BT, ("batch", "seq")),
        segments=(mask.segments_BS, ("batch", "seq")),
        prefix=(mask.prefix_BS, ("batch", "seq")),
    )
    present = {name: (x, axes) for name, (x, axes) in inputs.items() if x is not None}
    all_axes = tuple(a for name in ("batch", "seq", "heads") for a in shard.compute.get(name, ()))
    run = jax.shard_map(
        partial(_local, p, all_axes),
        check_vma=pipeline.types_checked(),
        in_specs=({name: shard.spec(axes) for name, (_, axes) in present.items()},),
        out_specs=shard.spec(("batch", "seq", "heads", None)),
    )
    return run({name: shard(x, *axes) for name, (x, axes) in present.items()})


def _local(p: Plan, all_axes: tuple[str, ...], x: Arrays) -> jax.Array:
    """Attends from one device's positions."""
    x = pipeline.vary(x, all_axes)
    if p.parts == 2:
        x = {name: a if name == "sinks" else _swap(p, a, 2 if name == "bias" else 1) for name, a in x.items()}
    B, T, H, C = x["q"].shape
    K, S = x["k"].shape[2], x["k"].shape[1]
    A, Z = T // p.parts, S // p.parts
    # Each reshape changes one dimension: under pipeline stages and explicit axes none may cut or join two.
    floats = dict(
        q=x["q"].reshape(B, T, K, H // K, C).reshape(B, p.parts, A, K, H // K, C).transpose(1, 0, 3, 4, 2, 5),
        k=x["k"].reshape(B, p.parts, Z, K, C).transpose(1, 0, 3, 2, 4),
        v=x["v"].reshape(B, p.parts, Z, K, -1).transpose(1, 0, 3, 2, 4),
    )
    if "bias" in x:
        b, all_keys = x["bias"].shape[0], x["bias"].shape[3]
        bias_BKGTS = x["bias"].reshape(b, K, H // K, T, all_keys)
        floats["bias"] = bias_BKGTS.reshape(b, K, H // K, p.parts, A, all_keys).transpose(3, 0, 1, 2, 4, 5)
    if "sinks" in x:
        floats["sinks"] = x["sinks"].reshape(K, H // K)
    labels = {
        name: x[name].reshape(B, p.parts, -1).swapaxes(0, 1)
        for name in ("own_segments", "segments", "prefix")
        if name in x
    }
    o_PBKGAW = _attend(p, all_axes, floats, labels)
    o_BTHW = o_PBKGAW.transpose(1, 0, 4, 2, 3, 5).reshape(B, T, K, H // K, -1).reshape(B, T, H, -1)
    return _swap(p, o_BTHW, 1, back=True) if p.parts == 2 else o_BTHW


def _swap(p: Plan, x: jax.Array, axis: int, back: bool = False) -> jax.Array:
    """Exchanges a device's own two neighbouring parts of 2n for parts i and 2n - 1 - i, or goes `back`; each part moves
    once.

    Even parts and odd ones go to different devices, so that both moves are permutations.
    """
    n = p.n
    moves = [[(i, j if j < n else 2 * n - 1 - j) for i in range(n) for j in [2 * i + odd]] for odd in (0, 1)]
    early_is_odd = jax.lax.axis_index(p.axes) % 2 == 1  # of the two parts this device then has

    def exchanged_if_odd(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.where(early_is_odd, y, x), jnp.where(early_is_odd, x, y)

    first, second = jnp.split(x, 2, axis)
    if back:
        first, second = exchanged_if_odd(first, second)
        moves = [[(b, a) for a, b in pairs] for pairs in moves]
    first, second = (jax.lax.ppermute(a, p.axes, pairs) for a, pairs in zip((first, second), moves, strict=True))
    return jnp.concatenate((first, second) if back else exchanged_if_odd(first, second), axis)


def _shift(p: Plan, tree: Any, by: int) -> Any:
    """Sends everything to the device `by` farther along the ring."""
    pairs = [(i, (i + by) % p.n) for i in range(p.n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, p.axes, pairs), tree) if by % p.n else tree


Step = Callable[[Any, Any, Any, Any], tuple[Any, Any]]  # (stop, kv, traveling, resident) → (traveling, resident)


def _circulate(p: Plan, kv: Any, traveling: Any, resident: Any, step: Step) -> tuple[Any, Any]:
    """Calls `step(number of the stop, kv, traveling, resident) → (traveling, resident)` at each stop of the ring.

    `kv` travels as it is, and sets out for the next stop before the work of this one. `traveling` goes with it and
    comes home at the end; `resident` stays.
    """

    def stop(i: Any, state: Any, last: bool = False) -> Any:
        kv, traveling, resident = state
        following = kv if last else _shift(p, kv, 1)
        traveling, resident = step(i, kv, traveling, resident)
        return following, traveling if last else _shift(p, traveling, 1), resident

    state = stop(0, (_shift(p, kv, p.first), traveling, resident), p.stops == 1)
    if p.stops > 2:
        state = jax.lax.fori_loop(1, p.stops - 1, stop, state)
    if p.stops > 1:
        state = stop(p.stops - 1, state, True)
    return _shift(p, state[1], 1 - p.stops - p.first), state[2]


def _pairings(p: Plan, i: Any) -> tuple[jax.Array, jax.Array, list[tuple[Any, Any]]]:
    """Returns this device, the one that keys come from, and which parts of queries meet which parts of keys at a
    stop."""
    own = jax.lax.axis_index(p.axes)
    source = (own - p.first - i) % p.n
    if p.parts == 1:
        return own, source, [(0, 0)]
    if isinstance(i, int) and i == 0:
        return own, source, [(0, 0), (1, 0), (1, 1)]
    # Late queries see the early keys of every device. Besides, early queries see the early keys of devices before this
    # one, and late queries the late keys of devices after it: two pairs of parts in either case.
    side = jnp.where(source < own, 0, 1)
    return own, source, [(1, 0), (side, side)]


def _first_position(p: Plan, device: jax.Array, part: Any, size: int) -> jax.Array:
    """Returns the position in the row of the first query or key of a device's part."""
    return size * (device if p.parts == 1 else jnp.where(part == 0, device, 2 * p.n - 1 - device))


def _get(x: jax.Array, i: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _put(x: jax.Array, i: Any, y: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, y, i, 0)


class Meeting(NamedTuple):
    """A Meeting holds queries that can be cut into blocks, and the keys that they meet.

    `by_position` has each array with the axis of its positions.
    """

    by_position: dict[str, tuple[jax.Array, int]]
    keys: Arrays


def _meetings(p: Plan, x: Arrays, labels: Arrays, kv: Arrays, i: Any, extra: Arrays) -> Any:
    """Yields (part of queries, part of keys, position of the first key, `Meeting`) for each pair of parts at a stop.

    `extra` holds more arrays by position of the queries.
    """
    own, source, pairs = _pairings(p, i)
    A, Z = x["q"].shape[4], kv["k"].shape[3]
    for a, z in pairs:
        first = _first_position(p, source, z, Z)
        queries = dict(q=(_get(x["q"], a), 3), at=(_first_position(p, own, a, A) + jnp.arange(A), 0))
        queries |= {name: (_get(y, a), 3) for name, y in extra.items()}
        if "own_segments" in labels:
            queries["own_segments"] = (_get(labels["own_segments"], a), 1)
        if "bias" in x:
            queries["bias"] = (jax.lax.dynamic_slice_in_dim(_get(x["bias"], a), first, Z, 4), 3)
        keys = {name: _get(y, z) for name, y in kv.items()} | dict(at=first + jnp.arange(Z))
        yield a, z, first, Meeting(queries, keys)


def _in_blocks(f: Callable[[Arrays, Any], tuple[Arrays, Any]], m: Meeting, carry: Any) -> tuple[Arrays, Any]:
    """Applies `f(block of the queries, carry) → (results by position, carry)` to all queries, few enough at a time."""
    A, Z = m.by_position["at"][0].shape[0], m.keys["at"].shape[0]
    size = max(n for n in range(1, A + 1) if A % n == 0 and (n == 1 or n * Z <= MAX_SCORES))
    if size == A:
        return f({name: x for name, (x, _) in m.by_position.items()}, carry)

    def cut(x: jax.Array, axis: int) -> jax.Array:
        return jnp.moveaxis(x.reshape(*x.shape[:axis], A // size, size, *x.shape[axis + 1 :]), axis, 0)

    blocks = {name: cut(x, axis) for name, (x, axis) in m.by_position.items()}

    def one(carry: Any, block: Arrays) -> tuple[Any, Arrays]:
        result, carry = f(block, carry)
        return carry, result

    carry, results = jax.lax.scan(one, carry, blocks)
    return {name: _joined(y) for name, y in results.items()}, carry


def _joined(y: jax.Array) -> jax.Array:
    """Lays blocks `[n, B, K, G, size, …]` side by side."""
    y = jnp.moveaxis(y, 0, 3)
    return y.reshape(*y.shape[:3], -1, *y.shape[5:])


def _scores(p: Plan, q: Arrays, keys: Arrays) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns float32 scores, the derivative of their soft cap (1 without one), and which of them count (None: all)."""
    s = jnp.einsum("bkgac,bkzc->bkgaz", q["q"], keys["k"], preferred_element_type=jnp.float32) * p.scale
    slope = jnp.ones((), jnp.float32)
    if p.softcap is not None:
        t = jnp.tanh(s / p.softcap)
        s, slope = p.softcap * t, 1 - jnp.square(t)
    if "bias" in q:
        s += q["bias"].astype(jnp.float32)
    mask = dataclasses.replace(
        p.mask, at_T=q["at"], at_S=keys["at"], segments_BT=q.get("own_segments"), segments_BS=keys.get("segments"),
        prefix_BS=keys.get("prefix"),
    )  # fmt: skip
    visible = mask.dense(0, q["at"].shape[0], 0, keys["at"].shape[0])
    return s, slope, None if visible is None else visible[:, None, None]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(p: Plan, all_axes: tuple[str, ...], x: Arrays, labels: Arrays) -> jax.Array:
    return _forward(p, all_axes, x, labels)[0]


def _forward(p: Plan, all_axes: tuple[str, ...], x: Arrays, labels: Arrays) -> tuple[jax.Array, Any]:
    """Attends at each stop, and weighs the stops' results by their sums of exponentials, whose logs are carried
    along."""
    kv = dict(k=x["k"], v=x["v"]) | {name: labels[name] for name in ("segments", "prefix") if name in labels}

    def step(i: Any, kv: Arrays, traveling: Any, resident: Any) -> tuple[Any, Any]:
        o_PBKGAW, log_PBKGA = resident
        for a, _, _, m in _meetings(p, x, labels, kv, i, {}):
            update, _ = _in_blocks(partial(_attend_to_block, p, m.keys), m, None)
            o, log = _get(o_PBKGAW, a), _get(log_PBKGA, a)
            total = jnp.logaddexp(log, update["log"])
            o = o * jnp.exp(log - total)[..., None] + update["o"] * jnp.exp(update["log"] - total)[..., None]
            o_PBKGAW, log_PBKGA = _put(o_PBKGAW, a, o), _put(log_PBKGA, a, total)
        return traveling, (o_PBKGAW, log_PBKGA)

    shape = x["q"].shape[:-1]
    zero = jnp.zeros((*shape, x["v"].shape[-1]), jnp.float32), jnp.full(shape, NOTHING, jnp.float32)
    _, (o_PBKGAW, log_PBKGA) = _circulate(p, kv, (), pipeline.vary(zero, all_axes), step)
    if "sinks" in x:  # one more score without a value
        total = jnp.logaddexp(log_PBKGA, x["sinks"].astype(jnp.float32)[None, None, :, :, None])
        o_PBKGAW, log_PBKGA = o_PBKGAW * jnp.exp(log_PBKGA - total)[..., None], total
    o_PBKGAW = o_PBKGAW.astype(x["q"].dtype)
    return o_PBKGAW, (x, labels, o_PBKGAW, log_PBKGA)


def _attend_to_block(p: Plan, keys: Arrays, q: Arrays, carry: None) -> tuple[Arrays, None]:
    """Returns softmax attention over these keys alone, and the log of its sum of exponentials."""
    s, _, visible = _scores(p, q, keys)
    s = s if visible is None else jnp.where(visible, s, NOTHING)
    top = s.max(-1, keepdims=True)
    e = jnp.exp(s - top) if visible is None else jnp.where(visible, jnp.exp(s - top), 0)
    n = e.sum(-1, keepdims=True)
    e = (e / jnp.where(n > 0, n, 1)).astype(keys["v"].dtype)
    o = jnp.einsum("bkgaz,bkzw->bkgaw", e, keys["v"], preferred_element_type=jnp.float32)
    return dict(o=o, log=jnp.where(n > 0, top + jnp.log(jnp.where(n > 0, n, 1)), NOTHING)[..., 0]), carry


def _backward(p: Plan, all_axes: tuple[str, ...], saved: Any, do_PBKGAW: jax.Array) -> tuple[Arrays, None]:
    """Goes round the ring again, gradients of keys and values travelling with them (Dao et al. 2022, algorithm 4)."""
    x, labels, o_PBKGAW, log_PBKGA = saved
    delta_PBKGA = (do_PBKGAW.astype(jnp.float32) * o_PBKGAW.astype(jnp.float32)).sum(-1)
    extra = dict(do=do_PBKGAW, log=log_PBKGA, delta=delta_PBKGA)
    kv = dict(k=x["k"], v=x["v"]) | {name: labels[name] for name in ("segments", "prefix") if name in labels}

    def step(i: Any, kv: Arrays, traveling: Arrays, resident: Arrays) -> tuple[Any, Any]:
        for a, z, first, m in _meetings(p, x, labels, kv, i, extra):
            update, kv_update = _in_blocks(
                partial(_block_gradients, p, m.keys), m, {n: _get(g, z) for n, g in traveling.items()}
            )
            traveling = {name: _put(g, z, kv_update[name]) for name, g in traveling.items()}
            resident = resident | dict(q=_put(resident["q"], a, _get(resident["q"], a) + update["q"]))
            if "bias" in resident:
                bias = _get(resident["bias"], a)
                piece = jax.lax.dynamic_slice_in_dim(bias, first, update["bias"].shape[4], 4) + update["bias"]
                summed = jax.lax.dynamic_update_slice_in_dim(bias, piece, first, 4)
                resident = resident | dict(bias=_put(resident["bias"], a, summed))
        return traveling, resident

    zeros = {n: pipeline.vary(jnp.zeros(x[n].shape, jnp.float32), all_axes) for n in ("q", "k", "v", "bias") if n in x}
    traveling, resident = _circulate(
        p, kv, {n: zeros[n] for n in "kv"}, {n: g for n, g in zeros.items() if n not in "kv"}, step
    )
    out = traveling | resident
    if "sinks" in x:
        share_PBKGA = jnp.exp(x["sinks"].astype(jnp.float32)[None, None, :, :, None] - log_PBKGA)
        out["sinks"] = -(share_PBKGA * delta_PBKGA).sum((0, 1, 4))
    return {name: g.astype(x[name].dtype) for name, g in out.items()}, None


def _block_gradients(p: Plan, keys: Arrays, q: Arrays, carry: Arrays) -> tuple[Arrays, Arrays]:
    """Returns the gradients of a block's queries and bias, and those of all keys and values so far."""
    s, slope, visible = _scores(p, q, keys)
    prob = jnp.exp(s - q["log"][..., None])
    prob = prob if visible is None else jnp.where(visible, prob, 0)
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
    low_precision = keys["v"].dtype
    do = q["do"].astype(low_precision)
    ds = prob * (dot("bkgaw,bkzw->bkgaz", do, keys["v"]) - q["delta"][..., None])
    dr = (ds * slope * p.scale).astype(low_precision)
    carry = dict(
        k=carry["k"] + dot("bkgaz,bkgac->bkzc", dr, q["q"]),
        v=carry["v"] + dot("bkgaz,bkgaw->bkzw", prob.astype(low_precision), do),
    )
    gradients = dict(q=dot("bkgaz,bkzc->bkgac", dr, keys["k"]))
    if "bias" in q:
        gradients["bias"] = ds if q["bias"].shape[0] > 1 or ds.shape[0] == 1 else ds.sum(0, keepdims=True)
    return gradients, carry


_attend.defvjp(_forward, _backward)
