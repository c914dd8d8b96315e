"""Compares fused attention with plain attention on a run's own devices, so that none trains with a kernel that does
something else: documents that see each other change no shape and raise no error.

B batch, T position, H query heads, K key/value heads, C head width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly.program import Program
from jaxlm.nn import attention
from jaxlm.nn.attention import Request
from jaxlm.nn.mask import Mask
from jaxlm.objectives.objective import DeviceBatch

FAR = 0.03  # relative distance: rounding to bfloat16 stays below it


def verify(p: Program, requests: Sequence[Request], batch: DeviceBatch) -> str:
    """Compares what each of a step's requests to a fused kernel gives, and its gradients, with plain attention in
    float32, for drawn queries, keys and values and documents of the batch `[micro, rows, T]`. Returns what was found,
    in words; empty where there is nothing to compare.

    Requests with a bias, sinks or another sequence's keys are left out. Raises ValueError where a kernel differs.
    """
    fused = [r for r in requests if r.choice.implementation != "xla"]
    if not p.run.execution.verify or not fused:
        return ""
    if jax.process_count() > 1:
        return "not compared with plain attention, as several processes share the devices"
    found = {r: _distances(p, r, _documents(p, batch, r.shape[0])) for r in fused if not r.special}
    worst = 0.0
    for r, distances in found.items():
        for what, distance in distances.items():
            if not distance <= FAR:  # nor is what is no number
                kind = jax.devices()[0].device_kind
                raise ValueError(
                    f"execution.attention: on {kind} {r.choice.describe()} gives {what} that are {distance:.1%} from "
                    "those of plain attention on the first batch's documents; set execution.attention=xla"
                )
            worst = max(worst, distance)
    if not found:
        return f"not compared with plain attention, as it has {fused[0].special}"
    return f"within {worst:.1%} of plain attention on the first batch's documents"


def _documents(p: Program, batch: DeviceBatch, T: int) -> np.ndarray:
    """Returns segments `[B, T]` of as many rows as devices need: of the first batch, or three documents a row where
    its rows have another length."""
    rows = p.layout.ways("batch", p.mesh)
    for name in ("segments", "source_segments"):
        if name in batch and batch[name].shape[-1] == T:
            return np.resize(jax.device_get(batch[name][0, :rows]), (rows, T))
    return np.broadcast_to(np.arange(T, dtype=np.int32) * 3 // T + 1, (rows, T))


def _distances(p: Program, r: Request, segments_BT: np.ndarray) -> dict[str, float]:
    """Returns how far values and gradients of a request are from plain attention's, each relative to its norm."""
    T, H, K, C = r.shape
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((len(segments_BT), T, n, C)).astype(jnp.bfloat16) for n in (H, K, K, H)]

    def both(segments: jax.Array, *x: jax.Array, **execution: Any) -> list[jax.Array]:
        shard = replace(p.layout, execution=replace(p.run.execution, **execution))
        mask = Mask(r.causal, r.window, segments, segments, packed=True)
        q, k, v, pull = (
            shard(a, "batch", "seq", "heads", None) if a.shape[2] == H else a
            for a in (b.astype(execution["dtype"]) for b in x)
        )

        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention.attend(q, k, v, mask, shard=shard, scale=r.scale, softcap=r.softcap)

        out, back = jax.vjp(run, q, k, v)
        return [out, *back(pull.astype(out.dtype))]

    @jax.jit
    def distances(segments: jax.Array, *x: jax.Array) -> list[jax.Array]:
        with jax.default_matmul_precision("highest"):
            plain = both(segments, *x, attention="xla", dtype="float32")
        fused = both(segments, *x, attention=r.choice.implementation, dtype=p.run.execution.dtype)
        real = segments > 0
        pairs = zip(fused, plain, strict=True)
        return [_distance(a.astype(jnp.float32), b, real[..., None, None]) for a, b in pairs]

    names = "values", "gradients of queries", "gradients of keys", "gradients of values"
    return dict(zip(names, map(float, jax.device_get(distances(segments_BT, *x))), strict=True))


def _distance(a: jax.Array, b: jax.Array, real: Any) -> jax.Array:
    a, b = jnp.where(real, a, 0), jnp.where(real, b, 0)
    return jnp.sqrt(jnp.sum((a - b) ** 2) / jnp.sum(b**2))
