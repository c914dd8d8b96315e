"""Attention over rows whose positions are split among devices (context parallelism): keys and values that travel in a
ring, so that no device ever holds all of them (Liu et al. 2023), or positions exchanged for heads (Jacobs et al. 2023).

B batch, T query position, S key position, H heads, K key/value heads, G = H / K, C width of keys, W of values; P parts
that a device holds of a row, and A places of queries, Z of keys in one of them.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn import pipeline
from jaxlm.nn.layout import Layout

if TYPE_CHECKING:
    from jaxlm.nn.mask import Mask

MOST_SCORES = 1 << 20  # of one head and row that exist at one time: 4 MiB in float32
NOTHING = -1e30  # log of the sum of no scores: finite, so that differences of two are numbers

Arrays = dict[str, jax.Array]


def ways(shard: Layout) -> int:
    """How many devices share a row's positions here."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[a] for a in shard.compute.get("seq", ()))


def told(shard: Layout, n: int) -> str:
    by = {
        "gather": "each gathers all keys and values",
        "ring": "keys and values travel in a ring",
        "heads": "positions are exchanged for heads",
    }
    return f"{n} devices share a row's positions; {by[shard.mesh.context_by]}"


# ------------------------------------------------------------------------------------------------- positions for heads


def by_heads(shard: Layout, H: int, K: int) -> tuple[Layout, int]:
    """(layout in which rows are whole and heads are split over the context axes too, copies of each key/value head).

    Where there are fewer key/value heads than devices, or they don't divide, each is sent in copies.
    """
    table = {**shard.compute, "seq": ()}
    for axis in ("heads", "kv"):
        table[axis] = shard.compute.get(axis, ()) + shard.compute.get("seq", ())
    inner = dataclasses.replace(shard, compute=table)
    n = math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in table["heads"])
    copies = math.lcm(K, n) // K
    if H % n or H % (K * copies):
        axes = "·".join(table["heads"])
        raise ValueError(
            f"mesh.context_by: heads: {H} heads of queries and {K} of keys do not divide over {n} devices of {axes}; "
            "make mesh.context smaller, or choose ring"
        )
    return inner, copies


def exchanged(shard: Layout, k_BSKC: jax.Array, copies: int, before: Layout) -> jax.Array:
    """Keys or values of whole rows, heads split by `shard`: an all-to-all."""
    if copies > 1:
        B, S, K, C = k_BSKC.shape
        k_BSKnC = jnp.broadcast_to(k_BSKC[:, :, :, None], (B, S, K, copies, C))
        k_BSKC = before(k_BSKnC.reshape(B, S, K * copies, C), "batch", "seq", "kv", None)
    return shard(k_BSKC, "batch", None, "kv", None)


# ------------------------------------------------------------------------------------------------------------ the ring


class Plan(NamedTuple):
    """What is known before any number is: the same on every device."""

    axes: tuple[str, ...]
    """Mesh axes of the ring."""
    n: int
    parts: int
    """2: a device holds an early and a late part of the row, so that under a causal mask all have the same work."""
    first: int
    """From how many devices before the own one keys come at the first stop of the ring."""
    stops: int
    mask: "Mask"
    """Causality and window alone."""
    scale: float
    softcap: float | None


def plan(mask: "Mask", shard: Layout, T: int, S: int, scale: float, softcap: float | None) -> Plan:
    """The ring for a request: the shortest way round, in the order that balances its work."""
    axes, n = shard.compute["seq"], ways(shard)
    if mask.common:
        raise ValueError("mesh.context_by: ring has no keys that all rows share (adapter.method=prefix); choose gather")
    for name, length in (("queries", T), ("keys", S)):
        if length % n:
            raise ValueError(
                f"mesh.context: {length} positions of {name} do not divide over {n} devices; change their number"
            )
    only = type(mask)(mask.causal, mask.window)
    # Keys that a prefix shows to earlier queries may come from anywhere.
    if mask.window is not None and mask.prefix_BS is None:
        reach = -(-(mask.window - 1) // (S // n))  # devices away
        first, stops = (0, reach + 1) if mask.causal else (-reach, 2 * reach + 1)
        if stops < (n / 2 if mask.causal else n):
            return Plan(axes, n, 1, first, stops, only, scale, softcap)
    balanced = mask.causal and mask.prefix_BS is None
    if balanced and T % (2 * n):
        raise ValueError(
            f"mesh.context_by: ring cuts rows into {2 * n} parts, which {T} positions do not divide into; make "
            f"train.seq_len a multiple of {2 * n}, or choose gather"
        )
    return Plan(axes, n, 2 if balanced else 1, 0, n, only, scale, softcap)


def ring(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKW: jax.Array,
    mask: "Mask",
    *,
    shard: Layout,
    scale: float,
    softcap: float | None,
    bias_BHTS: jax.Array | None,
    sinks_H: jax.Array | None,
) -> jax.Array:
    """`attention.attend` with positions split: each device keeps its queries, and meets all keys that they may see.

    Keys and values go from device to device, (n - 1) / n of a row's each way, and their gradients with them on the way
    back. For a causal mask queries, keys, values and the result also move once each (`_swap`): a device that held the
    row's end alone would do twice the mean work. Scores are computed again in the backward pass: memory grows with T/n.
    """
    p = plan(mask, shard, q_BTHC.shape[1], k_BSKC.shape[1], scale, softcap)
    rows = None if bias_BHTS is None or bias_BHTS.shape[0] == 1 else "batch"
    given = dict(
        q=(q_BTHC, ("batch", "seq", "heads", None)),
        k=(k_BSKC, ("batch", "seq", "kv", None)),
        v=(v_BSKW, ("batch", "seq", "kv", None)),
        bias=(bias_BHTS, (rows, "heads", "seq", None)),
        sinks=(sinks_H, ("heads",)),
        own=(mask.segments_BT, ("batch", "seq")),
        segments=(mask.segments_BS, ("batch", "seq")),
        prefix=(mask.prefix_BS, ("batch", "seq")),
    )
    here = {name: (x, axes) for name, (x, axes) in given.items() if x is not None}
    every = tuple(a for name in ("batch", "seq", "heads") for a in shard.compute.get(name, ()))
    run = jax.shard_map(
        partial(_local, p, every),
        check_vma=pipeline.types_checked(),
        in_specs=({name: shard.spec(axes) for name, (_, axes) in here.items()},),
        out_specs=shard.spec(("batch", "seq", "heads", None)),
    )
    return run({name: shard(x, *axes) for name, (x, axes) in here.items()})


def _local(p: Plan, every: tuple[str, ...], x: Arrays) -> jax.Array:
    """One device's positions."""
    x = pipeline.vary(x, every)
    if p.parts == 2:
        x = {name: a if name == "sinks" else _swap(p, a, 2 if name == "bias" else 1) for name, a in x.items()}
    B, T, H, C = x["q"].shape
    K, S = x["k"].shape[2], x["k"].shape[1]
    A, Z = T // p.parts, S // p.parts
    # One dimension at a time: under stages and explicit axes no reshape may cut or join two.
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
    whole = {
        name: x[name].reshape(B, p.parts, -1).swapaxes(0, 1) for name in ("own", "segments", "prefix") if name in x
    }
    o_PBKGAW = _attend(p, every, floats, whole)
    o_BTHW = o_PBKGAW.transpose(1, 0, 4, 2, 3, 5).reshape(B, T, K, H // K, -1).reshape(B, T, H, -1)
    return _swap(p, o_BTHW, 1, back=True) if p.parts == 2 else o_BTHW


def _swap(p: Plan, x: jax.Array, axis: int, back: bool = False) -> jax.Array:
    """From a device's own two neighbouring parts of 2n to parts i and 2n - 1 - i, or back: each part moves once.

    Even parts and odd ones go to different devices, so that both moves are permutations.
    """
    n = p.n
    home = [[(i, j if j < n else 2 * n - 1 - j) for i in range(n) for j in [2 * i + odd]] for odd in (0, 1)]
    is_odd = jax.lax.axis_index(p.axes) % 2 == 1  # then the odd part is the early one

    def chosen(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.where(is_odd, y, x), jnp.where(is_odd, x, y)

    first, second = jnp.split(x, 2, axis)
    if back:
        first, second = chosen(first, second)
        home = [[(b, a) for a, b in pairs] for pairs in home]
    first, second = (jax.lax.ppermute(a, p.axes, pairs) for a, pairs in zip((first, second), home, strict=True))
    return jnp.concatenate((first, second) if back else chosen(first, second), axis)


def _jump(p: Plan, tree: Any, by: int) -> Any:
    """Everything to the device `by` farther along the ring."""
    pairs = [(i, (i + by) % p.n) for i in range(p.n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, p.axes, pairs), tree) if by % p.n else tree


Step = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def _around(p: Plan, kv: Any, along: Any, stay: Any, step: Step) -> tuple[Any, Any]:
    """`step(number of the stop, kv, along, stay) → along, stay` at each stop. `kv` travels as it is, and sets out for
    the next stop before the work of this one; `along` travels with it and comes home at the end."""

    def stop(i: Any, state: Any, last: bool = False) -> Any:
        kv, along, stay = state
        following = kv if last else _jump(p, kv, 1)
        along, stay = step(i, kv, along, stay)
        return following, along if last else _jump(p, along, 1), stay

    state = stop(0, (_jump(p, kv, p.first), along, stay), p.stops == 1)
    if p.stops > 2:
        state = jax.lax.fori_loop(1, p.stops - 1, stop, state)
    if p.stops > 1:
        state = stop(p.stops - 1, state, True)
    return _jump(p, state[1], 1 - p.stops - p.first), state[2]


def _meetings(p: Plan, i: Any) -> tuple[jax.Array, jax.Array, list[tuple[Any, Any]]]:
    """(this device, the one that keys come from, which parts of queries meet which parts of keys) at a stop."""
    own = jax.lax.axis_index(p.axes)
    source = (own - p.first - i) % p.n
    if p.parts == 1:
        return own, source, [(0, 0)]
    if isinstance(i, int) and i == 0:
        return own, source, [(0, 0), (1, 0), (1, 1)]
    # Late queries see the early keys of all. Of what else may be seen, the early keys of devices before are seen by
    # early queries too, and the late keys of those after by late queries: two meetings in either case.
    side = jnp.where(source < own, 0, 1)
    return own, source, [(1, 0), (side, side)]


def _start(p: Plan, device: jax.Array, part: Any, size: int) -> jax.Array:
    """Place in the row of the first position of a device's part."""
    return size * (device if p.parts == 1 else jnp.where(part == 0, device, 2 * p.n - 1 - device))


def _at(x: jax.Array, i: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _put(x: jax.Array, i: Any, y: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, y, i, 0)


class Meeting(NamedTuple):
    """Queries that can be cut into blocks (`by_place`, with the axis of their places), and keys."""

    by_place: dict[str, tuple[jax.Array, int]]
    keys: Arrays


def _meeting(p: Plan, x: Arrays, whole: Arrays, kv: Arrays, i: Any, more: Arrays) -> Any:
    """Each (part of queries, part of keys, place of the first key, `Meeting`) of a stop."""
    own, source, pairs = _meetings(p, i)
    A, Z = x["q"].shape[4], kv["k"].shape[3]
    for a, z in pairs:
        first = _start(p, source, z, Z)
        queries = dict(q=(_at(x["q"], a), 3), at=(_start(p, own, a, A) + jnp.arange(A), 0))
        queries |= {name: (_at(y, a), 3) for name, y in more.items()}
        if "own" in whole:
            queries["own"] = (_at(whole["own"], a), 1)
        if "bias" in x:
            queries["bias"] = (jax.lax.dynamic_slice_in_dim(_at(x["bias"], a), first, Z, 4), 3)
        keys = {name: _at(y, z) for name, y in kv.items()} | dict(at=first + jnp.arange(Z))
        yield a, z, first, Meeting(queries, keys)


def _in_blocks(f: Callable[[Arrays, Any], tuple[Arrays, Any]], m: Meeting, carry: Any) -> tuple[Arrays, Any]:
    """`f(block of the queries, carry) → (results by place, carry)` over all queries, few enough at a time."""
    A, Z = m.by_place["at"][0].shape[0], m.keys["at"].shape[0]
    size = max(n for n in range(1, A + 1) if A % n == 0 and (n == 1 or n * Z <= MOST_SCORES))
    if size == A:
        return f({name: x for name, (x, _) in m.by_place.items()}, carry)

    def cut(x: jax.Array, axis: int) -> jax.Array:
        return jnp.moveaxis(x.reshape(*x.shape[:axis], A // size, size, *x.shape[axis + 1 :]), axis, 0)

    blocks = {name: cut(x, axis) for name, (x, axis) in m.by_place.items()}

    def one(carry: Any, block: Arrays) -> tuple[Any, Arrays]:
        done, carry = f(block, carry)
        return carry, done

    carry, out = jax.lax.scan(one, carry, blocks)
    return {name: _joined(y) for name, y in out.items()}, carry


def _joined(y: jax.Array) -> jax.Array:
    """Blocks `[n, B, K, G, size, …]` side by side."""
    y = jnp.moveaxis(y, 0, 3)
    return y.reshape(*y.shape[:3], -1, *y.shape[5:])


def _scores(p: Plan, q: Arrays, keys: Arrays) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(scores, float32; how fast a soft cap lets them grow, 1 without; which may be seen)."""
    s = jnp.einsum("bkgac,bkzc->bkgaz", q["q"], keys["k"], preferred_element_type=jnp.float32) * p.scale
    slope = jnp.ones((), jnp.float32)
    if p.softcap is not None:
        t = jnp.tanh(s / p.softcap)
        s, slope = p.softcap * t, 1 - jnp.square(t)
    if "bias" in q:
        s += q["bias"].astype(jnp.float32)
    mask = dataclasses.replace(
        p.mask, at_T=q["at"], at_S=keys["at"], segments_BT=q.get("own"), segments_BS=keys.get("segments"),
        prefix_BS=keys.get("prefix"),
    )  # fmt: skip
    seen = mask.dense(0, q["at"].shape[0], 0, keys["at"].shape[0])
    return s, slope, None if seen is None else seen[:, None, None]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(p: Plan, every: tuple[str, ...], x: Arrays, whole: Arrays) -> jax.Array:
    return _forward(p, every, x, whole)[0]


def _forward(p: Plan, every: tuple[str, ...], x: Arrays, whole: Arrays) -> tuple[jax.Array, Any]:
    """Each stop's share of the softmax is weighed by the sum of its exponentials, whose log is carried along."""
    kv = dict(k=x["k"], v=x["v"]) | {name: whole[name] for name in ("segments", "prefix") if name in whole}

    def step(i: Any, kv: Arrays, along: Any, stay: Any) -> tuple[Any, Any]:
        o_PBKGAW, log_PBKGA = stay
        for a, _, _, m in _meeting(p, x, whole, kv, i, {}):
            now, _ = _in_blocks(partial(_share, p, m.keys), m, None)
            o, log = _at(o_PBKGAW, a), _at(log_PBKGA, a)
            total = jnp.logaddexp(log, now["log"])
            o = o * jnp.exp(log - total)[..., None] + now["o"] * jnp.exp(now["log"] - total)[..., None]
            o_PBKGAW, log_PBKGA = _put(o_PBKGAW, a, o), _put(log_PBKGA, a, total)
        return along, (o_PBKGAW, log_PBKGA)

    shape = x["q"].shape[:-1]
    zero = jnp.zeros((*shape, x["v"].shape[-1]), jnp.float32), jnp.full(shape, NOTHING, jnp.float32)
    _, (o_PBKGAW, log_PBKGA) = _around(p, kv, (), pipeline.vary(zero, every), step)
    if "sinks" in x:  # one more score without a value
        total = jnp.logaddexp(log_PBKGA, x["sinks"].astype(jnp.float32)[None, None, :, :, None])
        o_PBKGAW, log_PBKGA = o_PBKGAW * jnp.exp(log_PBKGA - total)[..., None], total
    o_PBKGAW = o_PBKGAW.astype(x["q"].dtype)
    return o_PBKGAW, (x, whole, o_PBKGAW, log_PBKGA)


def _share(p: Plan, keys: Arrays, q: Arrays, carry: None) -> tuple[Arrays, None]:
    """Softmax attention over these keys alone, and the log of its sum of exponentials."""
    s, _, seen = _scores(p, q, keys)
    s = s if seen is None else jnp.where(seen, s, NOTHING)
    top = s.max(-1, keepdims=True)
    e = jnp.exp(s - top) if seen is None else jnp.where(seen, jnp.exp(s - top), 0)
    n = e.sum(-1, keepdims=True)
    e = (e / jnp.where(n > 0, n, 1)).astype(keys["v"].dtype)
    o = jnp.einsum("bkgaz,bkzw->bkgaw", e, keys["v"], preferred_element_type=jnp.float32)
    return dict(o=o, log=jnp.where(n > 0, top + jnp.log(jnp.where(n > 0, n, 1)), NOTHING)[..., 0]), carry


def _backward(p: Plan, every: tuple[str, ...], kept: Any, do_PBKGAW: jax.Array) -> tuple[Arrays, None]:
    """Round the ring again, gradients of keys and values travelling with them (Dao et al. 2022, algorithm 4)."""
    x, whole, o_PBKGAW, log_PBKGA = kept
    delta_PBKGA = (do_PBKGAW.astype(jnp.float32) * o_PBKGAW.astype(jnp.float32)).sum(-1)
    more = dict(do=do_PBKGAW, log=log_PBKGA, delta=delta_PBKGA)
    kv = dict(k=x["k"], v=x["v"]) | {name: whole[name] for name in ("segments", "prefix") if name in whole}

    def step(i: Any, kv: Arrays, along: Arrays, stay: Arrays) -> tuple[Any, Any]:
        for a, z, first, m in _meeting(p, x, whole, kv, i, more):
            now, kv_now = _in_blocks(partial(_pulled, p, m.keys), m, {n: _at(g, z) for n, g in along.items()})
            along = {name: _put(g, z, kv_now[name]) for name, g in along.items()}
            stay = stay | dict(q=_put(stay["q"], a, _at(stay["q"], a) + now["q"]))
            if "bias" in stay:
                whole_row = _at(stay["bias"], a)
                there = jax.lax.dynamic_slice_in_dim(whole_row, first, now["bias"].shape[4], 4) + now["bias"]
                moved = jax.lax.dynamic_update_slice_in_dim(whole_row, there, first, 4)
                stay = stay | dict(bias=_put(stay["bias"], a, moved))
        return along, stay

    zeros = {n: pipeline.vary(jnp.zeros(x[n].shape, jnp.float32), every) for n in ("q", "k", "v", "bias") if n in x}
    along, stay = _around(p, kv, {n: zeros[n] for n in "kv"}, {n: g for n, g in zeros.items() if n not in "kv"}, step)
    out = along | stay
    if "sinks" in x:
        share_PBKGA = jnp.exp(x["sinks"].astype(jnp.float32)[None, None, :, :, None] - log_PBKGA)
        out["sinks"] = -(share_PBKGA * delta_PBKGA).sum((0, 1, 4))
    return {name: g.astype(x[name].dtype) for name, g in out.items()}, None


def _pulled(p: Plan, keys: Arrays, q: Arrays, carry: Arrays) -> tuple[Arrays, Arrays]:
    """(gradients of a block's queries and bias, of all keys and values so far)."""
    s, slope, seen = _scores(p, q, keys)
    prob = jnp.exp(s - q["log"][..., None])
    prob = prob if seen is None else jnp.where(seen, prob, 0)
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
    low = keys["v"].dtype
    do = q["do"].astype(low)
    ds = prob * (dot("bkgaw,bkzw->bkgaz", do, keys["v"]) - q["delta"][..., None])
    dr = (ds * slope * p.scale).astype(low)
    carry = dict(
        k=carry["k"] + dot("bkgaz,bkgac->bkzc", dr, q["q"]),
        v=carry["v"] + dot("bkgaz,bkgaw->bkzw", prob.astype(low), do),
    )
    out = dict(q=dot("bkgaz,bkzc->bkgac", dr, keys["k"]))
    if "bias" in q:
        out["bias"] = ds if q["bias"].shape[0] > 1 or ds.shape[0] == 1 else ds.sum(0, keepdims=True)
    return out, carry


_attend.defvjp(_forward, _backward)
