"""Says how a run is doing, from its logs and the time: whether it trains, and what is wrong."""

import itertools
from typing import Any, NamedTuple

import numpy as np

from jaxlm.training.log_table import NOT_FINITE
from jaxlm.training.run_logs import Logs

PATIENCE = 5.0
"""A run has stalled after so many times the longest pause between its last lines,"""
AT_LEAST = 60.0
"""but not before so many seconds,"""
WHILE_COMPILING = 900.0
"""nor before so many where its pace isn't known yet."""
WAITS = 0.2
"""A run whose loop waits for data for a larger share of the time is bound by its data."""
RECENT = 50
"""Logged steps that are recent."""


class Status(NamedTuple):
    """A Status is what a run does now."""

    state: str
    """One of running, finished, stopped (by itself, before its end) and stalled."""
    says: str
    """The same in a line; empty: there is nothing to add."""


def status(logs: Logs, now: float, stalled: float = 0.0) -> Status:
    """Returns what a run does at the time `now`, in seconds since 1970. `stalled`: seconds without a line after which
    it has stalled; 0: by its own pace."""
    event = logs.last.get("name") if logs.last.get("kind") == "event" else None
    if event == "end":
        return Status("finished", str(logs.last.get("reason", "")))
    if event == "stopped":
        return Status("stopped", str(logs.last.get("reason", "")))
    age, limit = now - updated(logs), stalled or _limit(logs)
    if logs.times and age > limit:
        return Status("stalled", f"no line for {duration(age)}, where one is due within {duration(limit)}: the run was "
                                 "killed, interrupted or hangs; jaxlm train RUN_DIR goes on with it")  # fmt: skip
    return Status("running", "")


def updated(logs: Logs) -> float:
    """Returns when the newest line was written, in seconds since 1970; 0: there is none."""
    return logs.times[-1] if logs.times else 0.0


def _limit(logs: Logs) -> float:
    pauses = [b - a for a, b in itertools.pairwise(logs.times)]
    return WHILE_COMPILING if len(pauses) < 2 else max(AT_LEAST, PATIENCE * max(pauses))


def alerts(logs: Logs, state: Status) -> list[str]:
    """Returns what a person should know of a run, in whole lines; the worst first."""
    out = [f"{state.state}: {state.says}"] if state.state in ("stalled", "stopped") else []
    out += _not_finite(logs)
    waits = logs.train.tail("time/data_wait", RECENT)
    if state.state == "running" and len(waits) >= 5 and (share := float(np.median(waits))) > WAITS:
        workers = logs.config.get("data", {}).get("workers")
        known = f" from {workers}" if isinstance(workers, int) else ""
        out.append(f"bound by data: the loop waits for batches {share:.0%} of the time; raise data.workers{known}")
    return out + _rising(logs)


def _not_finite(logs: Logs) -> list[str]:
    out = []
    for kind, table in (("training", logs.train), ("validation", logs.valid_table)):
        for name in ("loss", "grad_norm"):
            if rows := table.not_finite.get(name):
                steps = [int(table.axes["step"][row]) for row in rows]
                more = f", {len(steps):,} times in all" if len(steps) > 1 else ""
                out.append(f"not finite: {kind} {name} at step {steps[-1]:,}{more}")
    return out


def _rising(logs: Logs) -> list[str]:
    """Says that the validation loss has risen three times in a row, which more training makes worse."""
    losses = [(x["step"], x["loss"]) for x in logs.valid if isinstance(x.get("loss"), float)]
    last = [loss for _, loss in losses[-4:]]
    if len(last) < 4 or last != sorted(last) or len(set(last)) < 4:
        return []
    step, loss = min(losses, key=lambda x: x[1])
    return [f"overfits: the validation loss has risen three times in a row, to {last[-1]:.4g}; its lowest was "
            f"{loss:.4g} at step {step:,}"]  # fmt: skip


def brief(logs: Logs, now: float, stalled: float = 0.0) -> dict[str, Any]:
    """Returns what a list of runs says of one, as values that JSON has."""
    state, config, loss = status(logs, now, stalled), logs.config, logs.train.last("loss")
    return {
        "name": logs.name, "state": state.state, "says": state.says, "step": logs.step,
        "steps": config.get("train", {}).get("steps"), "updated": updated(logs),
        "loss": "not finite" if loss == NOT_FINITE else loss, "alerts": alerts(logs, state),
        "about": " · ".join(str(config[part].get("family")) for part in ("model", "objective") if part in config),
    }  # fmt: skip


def duration(seconds: float) -> str:
    """Returns a time as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
