"""Writes what a sweep has come to: its results, the best trial's configuration, and a page."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.assembly import run_source, sweep_study
from jaxlm.assembly.sweep_study import Search, Trial
from jaxlm.core import config_io
from jaxlm.core import sweep as sweeps
from jaxlm.evaluation import forgetting
from jaxlm.training import sweep_report
from jaxlm.training.log import replace_file

RESULTS = "results.json"
BEST = "best.json"


def best(trials: Sequence[Trial], lower: bool) -> Trial | None:
    """Returns the complete trial with the best value, the first of several; None: none is complete."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    return min(complete, key=lambda t: (t.value if lower else -t.value, t.number), default=None)  # type: ignore[operator]


def line(trial: Trial, search: Search, top: Trial | None) -> str:
    """Returns what is said of a trial that has ended."""
    settings = ", ".join(f"{path} {sweep_report.shown(value)}" for path, value in trial.params.items())
    metric = search.run.train.metric.rpartition(":")[2]
    what = f"{metric} {sweep_report.shown(trial.value)}"
    if trial.state == "pruned":
        what = f"stopped early at step {max(trial.steps)}, {what}"
    elif trial.state == "failed":
        what = f"failed: {trial.about['reason']}"
    record = "" if top is None else f" (best: trial {top.number}, {sweep_report.shown(top.value)})"
    return f"trial {trial.number}: {what} [{settings}]{record}"


def collect(search: Search, trials: Sequence[Trial], total: int) -> dict[str, Any]:
    """Returns what is known of a sweep, as `results.json` holds it."""
    top = best(trials, search.lower)
    states = [trial.state for trial in trials]
    rows = []
    for trial in trials:
        values = trial.about.get("values", [])
        interval = forgetting.over_seeds([{"value": v} for v in values])["value"][1:] if len(values) > 1 else None
        rows.append({
            "number": trial.number, "params": dict(trial.params), "state": trial.state, "value": _number(trial.value),
            "values": values, "interval": interval,
            "steps": [[step, _number(value)] for step, value in sorted(trial.steps.items())],
            "reason": trial.about.get("reason"), "seconds": trial.about.get("seconds"),
        })  # fmt: skip
    settings = search.settings
    return {
        "name": search.run.name, "metric": search.run.train.metric.rpartition(":")[2], "lower": search.lower,
        "steps": search.run.train.steps, "sampler": settings.sampler, "pruner": settings.pruner,
        "sampler_seed": settings.sampler_seed, "seeds": list(settings.seeds or (search.run.seed,)),
        "parallel": settings.parallel, "space": sweeps.to_dict(search.space), "total": total,
        "counts": {state: states.count(state) for state in ("complete", "pruned", "failed", "running")},
        "best": None if top is None else top.number,
        "own": {path: _label(config_io.flatten(search.run).get(path)) for path in search.space},
        "importances": sweep_study.importances(search, trials), "trials": rows,
    }  # fmt: skip


def _label(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def _number(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def write(search: Search, trials: Sequence[Trial], total: int, folder: Path) -> None:
    """Writes the results, the best configuration and the page."""
    results = collect(search, trials, total)
    replace_file(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    if (top := best(trials, search.lower)) is not None:
        run = run_source.overridden(search.run, sweeps.values(search.space, top.params))
        run = dataclasses.replace(run, name=f"{search.run.name}-best")
        replace_file(folder / BEST, json.dumps(config_io.to_dict(run), indent=1) + "\n")
    replace_file(folder / sweep_report.PAGE_NAME, sweep_report.page(results))


def read(folder: Path) -> dict[str, Any]:
    """Returns the results that a sweep's directory holds."""
    return json.loads((folder / RESULTS).read_text("utf-8"))
