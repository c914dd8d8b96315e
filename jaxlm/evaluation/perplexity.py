"""Loss, perplexity, bits per byte and accuracy over held-out data are sums with weights, divided once at the end. Each
document or example keeps its own sums, so that figures can be resampled over them.

The sums of an objective are linear in the weights of its targets and rows, and each of these belongs to one unit: what
it adds to a sum is the sum's derivative by its weight, times the weight. U units, C columns (metrics and totals).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.batch import COUNTED

Column = tuple[str, str]
"""(name of the loss, its metric), or (name of the total, empty)."""
TOLERANCE = 1e-3
"""By how much of a sum, in float32, its shares may differ from it."""


def make_eval_step(loss: Any, totals_of: Any, bytes_per_token: np.ndarray, whole: Any = None) -> Callable[..., Any]:
    """Returns a jitted `(params, batch) → (values, shares)`, as `eval_step` computes them. Batch leaves are `[1, batch,
    …]`. `whole`: the sharding of what every device holds whole."""
    step = eval_step(loss, totals_of, bytes_per_token)
    return jax.jit(lambda params, batch: step(params, jax.tree.map(lambda x: x[0], batch)), out_shardings=whole)


def eval_step(loss: Any, totals_of: Any, bytes_per_token: np.ndarray) -> Callable[..., Any]:
    """Returns `(params, batch) → (values, shares)`: the value of each column, and by key of `COUNTED` what each target
    or row adds to it, with its unit and that unit's checksum.

    Batch leaves are `[batch, …]`; padding rows weigh nothing. The total `bytes` counts the raw text bytes of the target
    tokens, special tokens none.
    """
    table_V = np.asarray(bytes_per_token, np.float32)

    def step(params: Any, batch: dict) -> tuple[dict, dict]:
        counted = {name: batch[name] for name in COUNTED if name in batch}

        def values(counted: dict) -> dict[Column, jax.Array]:
            these = batch | counted
            out = {(name, ""): value for name, value in totals_of(these).items()}
            if "targets" in batch:
                w = batch["weights"]
                share = jnp.where(w > 0, counted["weights"] / jnp.where(w > 0, w, 1), 0)  # 1 each, and linear
                out["bytes", ""] = (jnp.asarray(table_V)[batch["targets"]] * share).sum()
            sums = loss(params, these, None)
            return out | {(name, metric): v for name, part in sums.items() for metric, v in part.items()}

        if "unit" not in batch or not counted:
            return values(counted), {}
        found, pull = jax.vjp(values, counted)
        shares: dict[str, Any] = {name: {"values": {}} | _owners(batch, x) for name, x in counted.items()}
        for column in found:
            (slope,) = pull({c: jnp.full_like(v, c == column) for c, v in found.items()})
            for name, x in counted.items():
                shares[name]["values"][column] = slope[name] * x
        return found, shares

    return step


def _owners(batch: Mapping[str, jax.Array], counted: jax.Array) -> dict[str, jax.Array]:
    """Returns the unit of each weight, numbered from 1, and its checksum."""
    out = {}
    at = batch.get("at")
    for name in ("unit", "checksum"):
        x = batch[name]
        if at is not None and counted.ndim > 1 and at.shape[:2] == counted.shape:
            x = jnp.take_along_axis(x, at.reshape(*counted.shape, -1)[..., 0], axis=1)
            if counted is batch.get("rows"):  # places of a row that no text has
                x = jnp.where(counted != 0, x, 0)
        elif x.shape != counted.shape:  # all of a row belongs together
            row_B = x.reshape(len(x), -1).max(-1)
            x = jnp.broadcast_to(row_B.reshape(-1, *(1,) * (counted.ndim - 1)), counted.shape)
        out[name] = x
    return out


class Tally:
    """A Tally adds up what a model did on held-out data: by unit, where batches tell units, and as a whole.

    Sums are float64 and each unit's come in the order of its tokens, so that they don't depend on how many rows a batch
    has but for the rounding of float32 within a row. Memory: 8 (C + 1) bytes a unit.
    """

    def __init__(self, units: int, unit: str) -> None:
        """`units`: how many there are at most; `unit` names them: documents, examples."""
        self.unit = unit
        self.columns: list[Column] = []
        self._batches: list[list[float]] = []
        self._size = units
        self._table_UC = np.zeros((0, 0))
        self._keys_U = np.zeros(units, np.uint64)
        self._by_unit = True

    def add(self, values: Mapping[Column, Any], shares: Mapping[str, Any]) -> None:
        """Adds a batch, as the step returned it."""
        if not self._batches:
            self.columns = list(values)
            self._table_UC = np.zeros((self._size, len(self.columns)))
        sums = [float(values[column]) for column in self.columns]
        self._batches.append(sums)
        added_C, size_C = np.zeros(len(sums)), np.zeros(len(sums))
        for part in shares.values():
            units = np.asarray(part["unit"]).ravel()
            real = units > 0
            units = units[real] - 1
            np.add.at(self._keys_U, units, np.asarray(part["checksum"]).ravel()[real].astype(np.uint64))
            if not len(units):
                continue
            mine, place = np.unique(units, return_inverse=True)
            for i, column in enumerate(self.columns):
                each = np.asarray(part["values"][column], np.float64).ravel()
                added_C[i], size_C[i] = added_C[i] + each.sum(), size_C[i] + np.abs(each).sum()
                self._table_UC[mine, i] += np.bincount(place, each[real])
        self._by_unit &= bool(np.all(np.abs(added_C - sums) <= TOLERANCE * (np.abs(sums) + size_C) + 1e-6))

    @property
    def is_by_unit(self) -> bool:
        """Returns whether each unit's sums are known. Not so for an objective whose sums aren't linear in weights or
        rows, such as one that compares the rows of a batch with each other: its units are batches."""
        return self._by_unit

    def table(self) -> tuple[np.ndarray, list[int], str]:
        """Returns the sums of each unit that has targets `[N, C]`, a key of each that is equal where two models read
        the same, and what the units are."""
        if not self._by_unit:
            return np.array(self._batches), [], "batches"
        totals = [i for i, (_, metric) in enumerate(self.columns) if not metric]
        has = (self._table_UC[:, totals] > 0).any(1)
        return self._table_UC[has], self._keys_U[has].tolist(), self.unit

    def losses(self) -> np.ndarray | None:
        """Returns the loss of each unit `[U]`, NaN for one without targets; None where units' sums aren't known."""
        if not self._by_unit or not self._batches:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            return means(*nested(self.columns, self._table_UC.T))["loss"]

    def figures(self) -> dict[str, float]:
        """Returns the means over all. ValueError: there is no batch, or not a single target."""
        if not self._batches:
            raise ValueError("data.valid: no validation batches; raise data.holdout or name validation sources")
        whole_C = self._table_UC.sum(0) if self._by_unit else np.array(self._batches).sum(0)
        sums, totals = nested(self.columns, whole_C)
        for name in sums:
            if totals[name] == 0:
                raise ValueError(f"data.valid: not a single target ({name}) in the validation set")
        return {name: float(value) for name, value in means(sums, totals).items()}


def tally(
    step: Callable[..., Any], params: Any, batches: Iterable[Any], units: int = 0, unit: str = "examples"
) -> Tally:
    """Returns what a model does on batches, added up on the host. A batch's sums are read when the next one has been
    sent, so that devices don't wait for the host: what two batches give is held."""
    out = Tally(units, unit)
    pending: Any = None
    for batch in batches:
        sent = step(params, batch)
        if pending is not None:
            out.add(*jax.device_get(pending))
        pending = sent
    if pending is not None:
        out.add(*jax.device_get(pending))
    return out


def nested(columns: Sequence[Column], values: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Returns (sums, totals) of the values of columns, numbers or arrays `[R]` of each."""
    sums: dict[str, dict[str, Any]] = {}
    totals: dict[str, Any] = {}
    for (name, metric), value in zip(columns, values, strict=True):
        if metric:
            sums.setdefault(name, {})[metric] = value
        else:
            totals[name] = value
    return sums, totals


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
