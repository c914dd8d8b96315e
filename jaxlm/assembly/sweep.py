"""A sweep is searched here: trials are proposed, trained and told in their order, each run in a directory of its own.

Whatever kills it, the same call goes on where it was, and makes the same trials: what is proposed depends on nothing
but the settings and what earlier trials came to.
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.assembly import run_directory, run_source, sweep_results, sweep_study
from jaxlm.assembly.model_source import StartModel
from jaxlm.assembly.sweep_process import LOCK, environments, held, stop_signals
from jaxlm.assembly.sweep_study import Journal, Search, Trial
from jaxlm.assembly.sweep_trial import Attempt
from jaxlm.core import config, config_io, tree
from jaxlm.core import sweep as sweeps
from jaxlm.core.figures import is_lower_better
from jaxlm.runtime import launchers
from jaxlm.training.log import replace_file

DESCRIPTION = "sweep.json"
MAY_CHANGE = ("trials", "parallel", "devices", "launcher", "keep")
"""Settings that another sitting of a sweep may have others of."""


def search(
    run: config.Run, space: sweeps.Space | Sequence[str], settings: sweeps.Settings, say: Callable[[str], None] = print
) -> int:
    """Searches a space in the directory `run.folder`, or goes on there; returns the exit status, 0 where all trials
    have ended and one is complete. `space` may be given as expressions.

    ValueError: something can't be searched so, or the directory belongs to another sweep.
    """
    space = space if isinstance(space, Mapping) else _read(space, run)
    total = _check(run, space, settings)
    found = Search(settings, space, run, _with_adapters(run, space)[0], _lower(run))
    found.sampler(0)
    places = environments(settings, _environment())
    folder = run.folder
    _claim(found, folder)
    with _only_one(folder):
        return _Sitting(found, total, folder, places, say).work()


def _read(expressions: Sequence[str], run: config.Run) -> dict[str, sweeps.Dimension]:
    """Returns the space of expressions; fields of adapters are those of the methods that it chooses."""
    chosen = [text for text in expressions if text.partition("=")[0].strip() == "adapter"]
    first = sweeps.read(chosen[:1], run)
    return sweeps.read(expressions, _with_adapters(run, first)[0])


def _with_adapters(run: config.Run, space: sweeps.Space) -> list[config.Run]:
    """Returns the run with each method of fine-tuning of a space, or as it is."""
    methods = space.get("adapter")
    if methods is None:
        return [run]
    if not isinstance(methods, sweeps.Choice):
        raise ValueError("space: adapter has names, no range; give choices: adapter=lora|dora")
    try:
        return [run_source.overridden(run, {"adapter": name}) for name in methods.values]
    except ValueError as error:
        raise ValueError(f"space: {error}") from None


def _check(run: config.Run, space: sweeps.Space, settings: sweeps.Settings) -> int:
    """Returns the number of trials. ValueError: the sweep can't be, said before anything is trained."""
    config_io.check(run)
    run_directory.check_place(run)
    for one in _with_adapters(run, space):
        sweeps.check(space, one)
        for path, d in space.items():
            if path == "adapter":
                continue
            ends = d.values if isinstance(d, sweeps.Choice) else _ends(d, sweeps.is_whole(one, path))
            for value in ends:
                try:
                    config_io.check(config_io.changed(one, {path: value}))
                except ValueError as error:
                    raise ValueError(f"space: {error}") from None
    config_io.check(settings)
    return sweeps.check_settings(settings, space, _with_adapters(run, space)[0])


def _ends(d: sweeps.Between, whole: bool) -> tuple[float, ...]:
    return (int(d.low), int(d.high)) if whole else (d.low, d.high)


def _lower(run: config.Run) -> bool:
    """Returns whether less of the metric that trials are compared by is better."""
    way, _, name = run.train.metric.rpartition(":")
    if way in ("min", "max"):
        return way == "min"
    if (lower := is_lower_better(name)) is None:
        raise ValueError(f"train.metric: say whether less or more of {name!r} is better: min:{name} or max:{name}")
    return lower


def _environment() -> Mapping[str, str]:
    """Returns this process's environment. ValueError: a launcher started several."""
    place = launchers.find(os.environ)
    if place.count > 1:
        raise ValueError(f"sweep: {place.launcher} started {place.count} processes of it; start one, which starts a "
                         "process a trial, by `launcher` where you name one")  # fmt: skip
    return os.environ


def _claim(search: Search, folder: Path) -> None:
    """Writes what the sweep is, or compares it with what stands there."""
    mine = _description(search)
    file = folder / DESCRIPTION
    if file.is_file():
        theirs = json.loads(file.read_text("utf-8"))
        if (where := tree.difference(theirs, mine)) is not None:
            raise ValueError(f"{folder} holds another sweep: {where}; choose another `name`, or delete it")
    elif folder.is_dir() and any(path.suffix != ".new" for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no {DESCRIPTION}; choose another `name` or `out`")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(mine, indent=1) + "\n")


def _description(search: Search) -> dict[str, Any]:
    run = config_io.to_dict(search.run)
    settings = dataclasses.asdict(search.settings)
    kept = {name: value for name, value in settings.items() if name not in MAY_CHANGE}
    run = {name: value for name, value in run.items() if name not in ("name", "out")}
    return json.loads(json.dumps({"space": sweeps.to_dict(search.space), "settings": kept, "run": run}))


def _only_one(folder: Path) -> Any:
    lock = held(folder / LOCK)
    if lock is None:
        raise ValueError(f"{folder}: another process is at work on this sweep; wait for it, or stop it first")
    return lock


class _Sitting:
    """One sitting of a sweep: from what its journal holds to its end, or to a signal."""

    def __init__(
        self, search: Search, total: int, folder: Path, places: list[dict[str, str]], say: Callable[[str], None]
    ) -> None:
        self.search, self.total, self.folder, self.say = search, total, folder, say
        self.metric = search.run.train.metric.rpartition(":")[2]
        self.journal = Journal(folder, search)
        self.trials = self.journal.trials()
        self.told = next((t.number for t in self.trials if t.state == "running"), len(self.trials))
        self.free = places[: search.settings.parallel]
        self.at_work: dict[int, tuple[Attempt, Generator[None, None, Trial]]] = {}
        self.done: dict[int, Trial] = {}

    def work(self) -> int:
        """Trains and tells trials until there are enough; returns the exit status."""
        self.total = max(self.total, len(self.trials))
        if self.trials:
            self.say(f"going on with {self.folder}: {self.told} of {self.total} trials have ended")
        with stop_signals() as signals:
            try:
                self._ask()
                while self.told < self.total and not signals:
                    self._step()
                    time.sleep(0.1)
            finally:
                self._stop()
        self._publish()
        if self.told < self.total:
            self.say(f"stopped after {self.told} of {self.total} trials; the same command goes on")
            return 1
        return 0 if any(trial.state == "complete" for trial in self.trials) else 1

    def _ask(self) -> None:
        """Proposes trials as far as may run now. What each is proposed from depends on its number alone."""
        parallel = self.search.settings.parallel
        while len(self.trials) < min(self.total, self.told + parallel):
            number = len(self.trials)
            known = max(0, number - parallel + 1)
            trial = Trial(number, sweep_study.propose(self.search, self.trials, known), known)
            self.journal.add(trial)
            self.trials.append(trial)

    def _step(self) -> None:
        """Starts what may start, looks at what runs, and tells what has ended, in the order of the trials."""
        for trial in self.trials[self.told :]:
            if self.free and trial.number not in self.at_work and trial.number not in self.done:
                self._start(trial)
        for number, (attempt, going) in list(self.at_work.items()):
            try:
                next(going)
            except StopIteration as end:
                self.done[number] = end.value
                del self.at_work[number]
                self.free.append(attempt.variables)
        while self.told in self.done:
            trial = self.done.pop(self.told)
            self.journal.finish(trial)
            self.trials[trial.number] = trial
            self.told += 1
            self._ask()
            self.say(sweep_results.line(trial, self.search, sweep_results.best(self.trials, self.search.lower)))
            self._clean()
            self._publish()

    def _start(self, trial: Trial) -> None:
        place = self.free.pop(0)
        try:
            runs = runs_of(self.search, trial, self.folder)
        except ValueError as error:
            about = {"reason": str(error), "by_settings": True}
            self.done[trial.number] = dataclasses.replace(trial, state="failed", about=about)
            self.free.append(place)
            return
        launcher = self.search.settings.launcher
        attempt = Attempt(self.search, self.metric, self.trials, trial, runs, launcher, place)
        self.at_work[trial.number] = attempt, attempt.work()

    def _stop(self) -> None:
        """Lets all that runs save and end."""
        for attempt, _ in self.at_work.values():
            if attempt.process is not None:
                attempt.process.stop()
        for _, going in self.at_work.values():
            going.close()

    def _clean(self) -> None:
        """Deletes the checkpoints of trials that have ended and aren't the best."""
        if self.search.settings.keep == "all":
            return
        top = sweep_results.best(self.trials, self.search.lower)
        for trial in self.trials[: self.told]:
            if top is None or trial.number != top.number:
                for folder in trial_folder(self.folder, trial.number).glob("seed-*/"):
                    for part in ("checkpoints", run_directory.BASE):
                        shutil.rmtree(folder / part, ignore_errors=True)

    def _publish(self) -> None:
        """Writes what is known by now: results, the best trial's configuration, and the page."""
        sweep_results.write(self.search, self.trials, self.total, self.folder)


def trial_folder(folder: Path, number: int) -> Path:
    """Returns the directory of a trial."""
    return folder / "trials" / f"{number:04d}"


def runs_of(search: Search, trial: Trial, folder: Path) -> list[config.Run]:
    """Returns the runs of a trial, one for each seed, in its directory. ValueError: its settings don't go together."""
    run = run_source.overridden(search.run, sweeps.values(search.space, trial.params))
    start = StartModel(run.start)
    run = run_source.completed(run, start)
    if "adapter" in search.space:
        run = run_source.growing(run, start)
    out = str(trial_folder(folder, trial.number))
    seeds = search.settings.seeds or (run.seed,)
    return [dataclasses.replace(run, name=f"seed-{seed}", out=out, seed=seed) for seed in seeds]
