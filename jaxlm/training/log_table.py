"""Keeps the numbers of a log as columns, and makes few points of many: the least, greatest and mean of each bucket.

B buckets, N rows.
"""

import bisect
import math
from array import array
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

AXES = ("step", "tokens", "seconds")
"""Columns that curves are drawn over. None of them falls from row to row."""
BUCKETS = 2048
"""At most so many buckets are made of a table: about two for each pixel that a curve is drawn on."""
MISSING, NOT_FINITE = math.nan, math.inf
"""What a column holds where a line has no such number, and where it has NaN or an infinity."""
NOT_NUMBERS = {"NaN", "Infinity", "-Infinity"}


class Curve(NamedTuple):
    """A Curve holds the values of a figure by step."""

    x: list[int]
    y: list[float]


class Table:
    """A Table has a row for each line of one kind, and a column for each number of them.

    Memory: 8 bytes a number. What stands under `time` in a line is the column `time/NAME`.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.axes = {name: array("d") for name in AXES}
        self.columns: dict[str, array] = {}
        self.not_finite: dict[str, list[int]] = {}
        """Rows of each column whose number isn't finite."""

    def add(self, line: Mapping[str, Any], axes: Mapping[str, float]) -> None:
        """Adds the numbers of a line; `axes` has its place on each axis."""
        row = self.rows
        for name, places in self.axes.items():
            places.append(axes[name])
        self._put(line, row, "")
        self._put(line.get("time", {}), row, "time/")
        self.rows = row + 1
        for column in self.columns.values():
            if len(column) == row:
                column.append(MISSING)

    def _put(self, values: Mapping[str, Any], row: int, prefix: str) -> None:
        columns = self.columns
        for key, value in values.items():
            name = prefix + key
            if value.__class__ is not float:  # a float is what most values are, and a million lines have many
                if isinstance(value, str) and value in NOT_NUMBERS:
                    value = NOT_FINITE
                    self.not_finite.setdefault(name, []).append(row)
                elif not isinstance(value, int) or name == "step":
                    continue
            if name not in columns:
                columns[name] = array("d", [MISSING]) * row
            columns[name].append(value)

    def curve(self, name: str) -> Curve | None:
        """Returns the values of a column by step, or None if there are none; what isn't finite is NaN, a gap."""
        if name not in self.columns:
            return None
        known = [(int(step), value) for step, value in zip(self.axes["step"], self.columns[name], strict=True)
                 if not math.isnan(value)]  # fmt: skip
        return Curve([x for x, _ in known], [math.nan if math.isinf(y) else y for _, y in known])

    def last(self, name: str) -> float | None:
        """Returns the newest number of a column, or None."""
        return next((x for x in reversed(self.columns.get(name, array("d"))) if not math.isnan(x)), None)

    def tail(self, name: str, rows: int) -> np.ndarray:
        """Returns the finite numbers of a column in its last rows."""
        last = np.array(self.columns.get(name, array("d"))[-rows:], float)
        return last[np.isfinite(last)]

    def find(self, axis: str, low: float, high: float) -> tuple[int, int]:
        """Returns the first row of a range of an axis, and the row after its last; both with a row beyond the range, so
        that lines reach its edges."""
        first, last = (bisect.bisect_left(self.axes[axis], x) for x in (low, high))
        return max(0, first - 1), min(self.rows, last + 2)

    def buckets(self, first: int, last: int, size: int) -> dict[str, Any]:
        """Returns the rows `first` … `last` - 1 in buckets of `size` rows, as values that JSON has.

        `n`: rows of each bucket `[B]`; `step`, `tokens`, `seconds`: where each begins `[B]`; `columns`: by name `mean`,
        `low` and `high` `[B]`, of which the latter two are left out where buckets are single rows. A value is None
        where a bucket has no finite number, and `gaps` lists those buckets in which some number was not finite.
        """
        starts = np.arange(0, last - first, size)
        out: dict[str, Any] = {"n": np.diff([*starts, last - first]).tolist(), "columns": {}}
        for name, places in self.axes.items():
            at = _view(places, first, last)[starts]
            out[name] = np.round(at, 3).tolist() if name == "seconds" else at.astype(np.int64).tolist()
        for name, column in self.columns.items():
            if len(starts):
                out["columns"][name] = _reduced(_view(column, first, last), starts, size)
        return out


def bucket_size(rows: int, buckets: int = BUCKETS) -> int:
    """Returns how many rows a bucket has: a power of two, so that buckets that are whole stay as they are until it
    doubles."""
    return 1 << max(0, math.ceil(math.log2(max(1, rows) / buckets)))


def _view(values: array, first: int, last: int) -> np.ndarray:
    """Returns a part of a column without a copy. The column can't grow while anything refers to it."""
    return np.frombuffer(values, np.float64)[first:last] if values else np.zeros(0)


def _reduced(values_N: np.ndarray, starts_B: np.ndarray, size: int) -> dict[str, Any]:
    finite_N = np.isfinite(values_N)
    if size > 1 and finite_N.all():
        count_B = np.diff([*starts_B, len(values_N)])
        return {"mean": _plain(np.add.reduceat(values_N, starts_B) / count_B),
                "low": _plain(np.minimum.reduceat(values_N, starts_B)),
                "high": _plain(np.maximum.reduceat(values_N, starts_B)), "gaps": []}  # fmt: skip
    gap_N = np.isinf(values_N)
    gaps = np.flatnonzero(np.logical_or.reduceat(gap_N, starts_B)).tolist() if gap_N.any() else []
    if size == 1:
        return {"mean": _plain(np.where(finite_N, values_N, np.nan)), "gaps": gaps}
    count_B = np.add.reduceat(finite_N.astype(np.int64), starts_B)
    has_B = count_B > 0
    mean_B = np.add.reduceat(np.where(finite_N, values_N, 0.0), starts_B) / np.maximum(count_B, 1)
    low_B = np.minimum.reduceat(np.where(finite_N, values_N, np.inf), starts_B)
    high_B = np.maximum.reduceat(np.where(finite_N, values_N, -np.inf), starts_B)
    parts = {"mean": mean_B, "low": low_B, "high": high_B}
    return {name: _plain(np.where(has_B, part_B, np.nan)) for name, part_B in parts.items()} | {"gaps": gaps}


def _plain(values_B: np.ndarray) -> list[float | None]:
    """Returns numbers of seven digits, which halves what is sent, and None for NaN."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scale_B = 10.0 ** (6 - np.floor(np.log10(np.abs(values_B))))
        short_B = np.where(np.isfinite(scale_B) & (scale_B > 0), np.rint(values_B * scale_B) / scale_B, values_B)
    short_B = np.where(np.isfinite(short_B), short_B, values_B)  # of numbers beyond what a scale reaches
    return [None if math.isnan(x) else x for x in short_B.tolist()]
