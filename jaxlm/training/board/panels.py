"""Says which curves a page draws, under which heading and title, and which of their points is best."""

import math
from typing import Any

from jaxlm.core.figures import is_lower_better
from jaxlm.training.log_table import Table
from jaxlm.training.run_logs import Logs

LEARNING, VALIDATION, OPTIMIZER, SPEED, LOAD, OTHER = (
    "Learning", "Validation", "Optimizer", "Speed", "System load", "Other figures of training",
)  # fmt: skip
GROUPS = (LEARNING, VALIDATION, OPTIMIZER, SPEED, LOAD, OTHER)
TITLES = {
    "train/loss": ("Training loss", LEARNING),
    "valid/loss": ("Validation loss", LEARNING),
    "valid/bits_per_byte": ("Validation bits per byte", LEARNING),
    "valid/kl_before": ("KL from the model before", LEARNING),
    "train/lr": ("Learning rate", OPTIMIZER),
    "train/grad_norm": ("Gradient norm", OPTIMIZER),
    "train/workers": ("Workers of a version", SPEED),
    "train/staleness": ("Staleness of pushes, versions", SPEED),
    "train/time/tokens_per_s": ("Tokens per second", SPEED),
    "train/time/step_s": ("Seconds of a step", SPEED),
    "train/time/mfu_causal": ("MFU, causal attention", SPEED),
    "train/time/mfu_full": ("MFU, full attention", SPEED),
    "train/time/data_wait": ("Share of time waiting for data", LOAD),
    "train/time/overhead": ("Share of time in the loop itself", LOAD),
    "train/time/cpu": ("CPU cores in use", LOAD),
    "train/time/memory_bytes": ("Memory of the process, bytes", LOAD),
    "train/time/device_bytes": ("Memory of a device, bytes", LOAD),
    "valid/time/seconds": ("Seconds of a validation", SPEED),
}
EXACT = {"lr", "workers", "staleness"}
"""Columns that a mean would blur, and whose beginning is no noise."""
HIDDEN = {"finite", "tokens", "step", "score", "targets", "time/unix", "time/elapsed_s", "time/eta_s"}


def panels(logs: Logs) -> list[dict[str, Any]]:
    """Returns a run's charts in their order, as values that JSON has: `key` (train or valid, and the column), `title`,
    `group`, whether a curve is `smooth` enough to be drawn with a mean, and for validations the `best` point."""
    own = str(logs.config.get("train", {}).get("metric", "loss"))
    way, _, metric = own.rpartition(":")
    tables = {"train": logs.train, "valid": logs.valid_table}
    found = [_panel(kind, name, metric, way, table) for kind, table in tables.items() for name in table.columns
             if name not in HIDDEN and not _is_weight(name)]  # fmt: skip
    order = {name: i for i, name in enumerate(TITLES)}

    def place(panel: dict[str, Any]) -> tuple[int, bool, int]:
        return GROUPS.index(panel["group"]), not panel["chooses"], order.get(panel["key"], len(order))

    return sorted(found, key=place)


def _is_weight(name: str) -> bool:
    return name.startswith("weight/") or name.rpartition("/")[2] == "targets"


def _panel(kind: str, name: str, metric: str, way: str, table: Table) -> dict[str, Any]:
    key = f"{kind}/{name}"
    title, group = TITLES.get(key, (f"{'Validation' if kind == 'valid' else 'Training'} {name}",
                                    VALIDATION if kind == "valid" else OTHER))  # fmt: skip
    chooses = kind == "valid" and name == metric
    lower = way == "min" if chooses and way else is_lower_better(name)
    best = None if kind == "train" or lower is None else _best(table, name, lower)
    return {"key": key, "title": title, "group": LEARNING if chooses else group,
            "smooth": kind == "train" and name not in EXACT, "chooses": chooses, "best": best}  # fmt: skip


def _best(table: Table, name: str, lower: bool) -> dict[str, Any] | None:
    """Returns the best point of a column, the newest of equals, as of checkpoints: its place on each axis, its value,
    and how it is called."""
    column = enumerate(table.columns[name])
    finite = [(value if lower else -value, -row) for row, value in column if math.isfinite(value)]
    if not finite:
        return None
    value, back = min(finite)
    row = -back
    places = {axis: column[row] for axis, column in table.axes.items()}
    return {**places, "value": value if lower else -value, "word": "lowest" if lower else "highest"}
