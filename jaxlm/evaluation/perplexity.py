"""Loss, perplexity, bits per byte and accuracy over a validation set are sums with weights, divided once at the end."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Sums = dict[str, dict[str, float]]
Part = tuple[Sums, dict[str, float]]


def make_eval_step(loss: Any, totals_of: Any, bytes_per_token: np.ndarray) -> Callable[[Any, Any], Any]:
    """Returns a jitted `(params, batch) → (sums, totals)`.

    Batch leaves are `[1, batch, …]`; padding rows weigh nothing. `bytes` among the totals counts the raw text bytes of
    the target tokens, special tokens none.
    """
    table_V = np.asarray(bytes_per_token, np.float32)

    def step(params: Any, batch: dict) -> tuple[dict, dict]:
        batch = jax.tree.map(lambda x: x[0], batch)
        totals = totals_of(batch)
        if "targets" in batch:
            size_BT = jnp.asarray(table_V)[batch["targets"]]
            totals = totals | {"bytes": (size_BT * (batch["weights"] > 0)).sum()}
        return loss(params, batch, None), totals

    return jax.jit(step)


def parts(step: Callable[[Any, Any], Any], params: Any, batches: Iterable[Mapping[str, Any]]) -> list[Part]:
    """Returns (sums, totals) of each batch, on the host."""
    return [jax.device_get(step(params, batch)) for batch in batches]


def total(parts: Sequence[Part]) -> dict[str, float]:
    """Returns the means over all parts, added up in float64.

    Raises a ValueError where there is no batch, or not a single target.
    """
    sums: Sums = {}
    totals: dict[str, float] = {}
    for part, weight in parts:
        for name, values in part.items():
            for metric, value in values.items():
                added = sums.setdefault(name, {})
                added[metric] = added.get(metric, 0.0) + float(value)
        for name, value in weight.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    if not sums:
        raise ValueError("data.valid: no validation batches; raise data.holdout or name validation sources")
    for name in sums:
        if totals[name] == 0:
            raise ValueError(f"data.valid: not a single target ({name}) in the validation set")
    return {name: float(value) for name, value in means(sums, totals).items()}


def means(sums: dict[str, dict[str, Any]], totals: dict[str, Any]) -> dict[str, Any]:
    """Divides sums by total weights, numbers or arrays of them. With one loss the metrics carry no prefix.

    `perplexity` is exp(nll per target); `bits_per_byte` counts every target's nats, end-of-document tokens included,
    over the text's bytes, so it compares with a compressor's size of the same text.
    """
    out: dict[str, Any] = {}
    for name, values in sums.items():
        prefix = "" if len(sums) == 1 else f"{name}/"
        out |= {f"{prefix}{metric}": value / totals[name] for metric, value in values.items()}
        if "nll" in values:
            out[f"{prefix}perplexity"] = np.exp(np.minimum(700.0, values["nll"] / totals[name]))
            if name == "tokens" and np.all(totals.get("bytes", 0)):
                out["bits_per_byte"] = values["nll"] / math.log(2) / totals["bytes"]
        out[f"{prefix}targets"] = totals[name]
    if len(sums) > 1:
        out["loss"] = sum(v["loss"] / totals[n] for n, v in sums.items())
    return out
