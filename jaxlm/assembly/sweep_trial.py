"""Trains the runs of a trial, one after another, and says what it came to, all from files, so that it can be killed."""

import json
import math
import os
import signal
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxlm.assembly import run_directory, sweep_study
from jaxlm.assembly.sweep_process import LOCK, STOPPED, Process, held
from jaxlm.assembly.sweep_study import Search, Trial
from jaxlm.core import config, config_io, errors
from jaxlm.training.log import read_lines, replace_file

TRIES = 3
"""Times that a run is started again which somebody else stopped."""
NO_MEMORY = ("resource_exhausted", "out of memory")


@dataclass
class Attempt:
    """An Attempt is a trial at work: `work` goes on with it from wherever its files say it is."""

    search: Search
    metric: str
    trials: Sequence[Trial]
    """Those before it at least."""
    trial: Trial
    runs: Sequence[config.Run]
    """One for each seed."""
    launcher: str
    variables: dict[str, str]
    process: Process | None = None
    """What runs now."""
    _read: tuple[Any, dict[int, float]] = (None, {})
    _verdict: tuple[dict[int, float], tuple[int | None, dict[str, float]]] = field(default=({}, (None, {})))

    def work(self) -> Generator[None, None, Trial]:
        """Trains, and yields from time to time; returns the trial with what it came to. Closed early, it stops the
        process that runs and waits until that has saved."""
        folder = self.runs[0].folder.parent
        while (lock := held(folder / LOCK)) is None:  # a process of a sweep that was killed is about to end
            yield
        with lock:
            return (yield from self._work(lock))

    def _work(self, lock: Any) -> Generator[None, None, Trial]:
        values: list[float] = []
        for i, run in enumerate(self.runs):
            tries = 0
            while not _ended(run.folder):
                if i == 0 and (cut := self._cut()) is not None:
                    return cut
                _write(run)
                with Process(run.folder, lock, self.launcher, self.variables) as process:
                    self.process = process
                    while (status := process.poll()) is None:
                        yield
                        if i == 0 and self._cut() is not None:
                            process.stop()
                self.process = None
                if (i == 0 and self._cut() is not None) or _ended(run.folder):
                    continue
                reason, by_settings = _failure(run.folder, process, status)
                tries += 1
                if not reason and tries <= TRIES:
                    continue
                return self._failed(reason or f"was stopped {tries} times by somebody else", by_settings)
            if i == 0 and (cut := self._cut()) is not None:  # all that it validated is there by now
                return cut
            value = used_value(run.folder, self.metric)
            if not math.isfinite(value):
                return self._failed(f"{self.metric} is not finite at the step that the run uses", True)
            values.append(value)
        _, rungs = self._judged()
        done = replace(self.trial, state="complete", value=sum(values) / len(values), steps=self._steps(), rungs=rungs)
        return self._with(done, values=values)

    def _cut(self) -> Trial | None:
        """Returns the trial as it is stopped early by what it validated so far; None: it goes on."""
        step, rungs = self._judged()
        if step is None:
            return None
        steps = {s: value for s, value in self._steps().items() if s <= step}
        return self._with(replace(self.trial, state="pruned", value=steps[step], steps=steps, rungs=rungs))

    def _judged(self) -> tuple[int | None, dict[str, float]]:
        if (steps := self._steps()) != self._verdict[0]:
            self._verdict = steps, sweep_study.judge(self.search, self.trials, self.trial, steps)
        return self._verdict[1]

    def _steps(self) -> dict[int, float]:
        """Returns the validations before the end."""
        run = self.runs[0]
        file = run.folder / "metrics.jsonl"
        now = (os.stat(file).st_mtime_ns, os.stat(file).st_size) if file.exists() else None
        if now != self._read[0]:
            found = validations(run.folder, self.metric)
            self._read = now, {step: value for step, value in found.items() if 0 < step < run.train.steps}
        return self._read[1]

    def _failed(self, reason: str, by_settings: bool) -> Trial:
        failed = replace(self.trial, state="failed", steps=self._steps())
        return self._with(failed, reason=reason, by_settings=by_settings)

    def _with(self, trial: Trial, **about: Any) -> Trial:
        return replace(trial, about={**about, "seconds": round(sum(_seconds(run.folder) for run in self.runs), 1)})


def _write(run: config.Run) -> None:
    """Makes a run directory that holds its configuration, as far as it isn't there."""
    run.folder.mkdir(parents=True, exist_ok=True)
    if not (run.folder / "config.json").exists():
        replace_file(run.folder / "config.json", json.dumps(config_io.to_dict(run), indent=2) + "\n")


def _ended(folder: Path) -> bool:
    return (folder / "config.json").exists() and run_directory.has_ended(folder)


def _lines(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return read_lines(file) if file.exists() else []


def validations(folder: Path, metric: str) -> dict[int, float]:
    """Returns a metric by steps, as a run directory has it."""
    return {line["step"]: float(line[metric]) for line in _lines(folder) if line["kind"] == "valid" and metric in line}


def used_value(folder: Path, metric: str) -> float:
    """Returns a metric at the step that a finished run uses."""
    used = next(line["used"] for line in reversed(_lines(folder)) if line.get("name") == "end")
    return validations(folder, metric)[used]


def _seconds(folder: Path) -> float:
    """Returns the seconds between the first and the last line of a run's log."""
    times = [line["time"]["unix"] for line in _lines(folder)]
    return times[-1] - times[0] if times else 0.0


def _failure(folder: Path, process: Process, status: int) -> tuple[str, bool]:
    """Returns why a run ended before its end, and whether its settings are to blame; no reason: it was stopped, and can
    go on."""
    stopped = [line for line in _lines(folder) if line.get("name") == "stopped"]
    if stopped:  # a loss that isn't finite
        return errors.one_line(stopped[-1]["reason"], 300), True
    said = errors.one_line(process.last_line(), 300)
    if (status == 1 and said.startswith(STOPPED)) or status in (-signal.SIGTERM, -signal.SIGINT):
        return "", False
    if status < 0:
        return f"its process was killed by signal {-status}, perhaps for want of memory", False
    return said or f"its process ended with status {status}", status == 2 or any(w in said.lower() for w in NO_MEMORY)
