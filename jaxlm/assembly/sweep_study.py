"""Trials of a sweep are proposed and judged by optuna, and kept in its journal.

A proposal is a function of the settings, the trial's number and what earlier trials came to, and so is the judgement
whether a trial stops early: both are asked of a new study in memory that holds just those trials, by a sampler that is
seeded for this trial. So nothing that a killed process knew is missed, and running trials disturb nothing. Whatever a
sampler remembers besides the trials (cma-es, qmc, grid) comes from asking it for all of them again.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.core import sweep as sweeps
from jaxlm.core.config import Run

NAME = "sweep"  # of each study: Hyperband draws a trial's bracket from it and the trial's number
JOURNAL = "journal.log"
SAMPLERS = {"tpe": "TPESampler", "cma-es": "CmaEsSampler", "gp": "GPSampler", "random": "RandomSampler",
            "brute-force": "BruteForceSampler"}  # fmt: skip
"""optuna's names of those that take nothing but a seed."""
REMEMBERING = ("cma-es", "qmc", "grid")
"""Samplers that know more than the trials."""
NEEDS = {"cma-es": "cmaes", "gp": "torch", "qmc": "scipy"}
RUNG = "completed_rung_"
"""What optuna calls the values that halving compares."""
FEW = 4
"""Complete trials without which nothing is said of importances."""


def optuna() -> Any:
    """Imports optuna. ValueError: it isn't installed."""
    try:
        import optuna as library
    except ImportError:
        raise ValueError("a sweep needs optuna: pip install 'jaxlm[sweep]'") from None
    library.logging.set_verbosity(library.logging.ERROR)
    return library


@dataclass(frozen=True)
class Trial:
    """A Trial holds a point of the space and what it came to."""

    number: int
    params: Mapping[str, Any]
    """The point, with labels for choices."""
    known: int
    """It was proposed, and is judged, from what the trials below this number came to."""
    state: Literal["running", "complete", "pruned", "failed"] = "running"
    value: float | None = None
    """The mean over seeds of the metric at the step that a run uses; of a pruned trial the last validation's."""
    steps: Mapping[int, float] = field(default_factory=dict)
    """The metric's validations before the end, of the first seed."""
    rungs: Mapping[str, float] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    """The value of each seed, the reason of a failure, seconds."""


@dataclass(frozen=True)
class Search:
    """A Search holds what proposals and judgements depend on."""

    settings: sweeps.Settings
    space: sweeps.Space
    run: Run
    typed: Run
    """The run with a method of fine-tuning that the space has fields of, where it chooses methods."""
    lower: bool
    """Less of the metric is better."""

    @property
    def direction(self) -> str:
        """The direction of the metric, as optuna calls it."""
        return "minimize" if self.lower else "maximize"

    @property
    def distributions(self) -> dict[str, Any]:
        """The space, as optuna describes it."""
        kinds = optuna().distributions
        out: dict[str, Any] = {}
        for path, d in self.space.items():
            if isinstance(d, sweeps.Choice):
                out[path] = kinds.CategoricalDistribution(sweeps.labels(d))
            elif sweeps.is_whole(self.typed, path):
                out[path] = kinds.IntDistribution(int(d.low), int(d.high), d.log, int(d.step or 1))
            else:
                out[path] = kinds.FloatDistribution(d.low, d.high, d.log, d.step)
        return out

    def sampler(self, number: int) -> Any:
        """Returns the sampler that proposes a trial. ValueError: a package that it needs is missing."""
        kinds, name = optuna().samplers, self.settings.sampler
        seed = int(np.random.SeedSequence([self.settings.sampler_seed, number]).generate_state(1)[0])
        whole = self.settings.sampler_seed  # for those whose trials are parts of one sequence
        with _quiet():
            try:
                if name == "qmc":
                    return kinds.QMCSampler(seed=whole, scramble=True)
                if name != "grid":
                    return getattr(kinds, SAMPLERS[name])(seed=seed)
            except ImportError:
                raise ValueError(f"sampler: {name} needs {NEEDS[name]}: pip install {NEEDS[name]}") from None
        every = sweeps.points(self.space, self.typed)
        assert every is not None
        return kinds.GridSampler({path: list(dict.fromkeys(p[path] for p in every)) for path in self.space}, whole)

    def pruner(self) -> Any:
        """Returns what judges trials."""
        kinds, s = optuna().pruners, self.settings
        if s.pruner == "median":
            return kinds.MedianPruner(s.startup, s.prune_after)
        if s.pruner == "percentile":
            return kinds.PercentilePruner(s.percentile, s.startup, s.prune_after)
        first = max(s.prune_after, self.run.train.eval_every, 1)
        if s.pruner == "halving":
            return kinds.SuccessiveHalvingPruner(min_resource=first)
        if s.pruner == "hyperband":
            return kinds.HyperbandPruner(first, max(first, _longest(self)))
        return kinds.NopPruner()

    def study(self, trials: Sequence[Trial], known: int, sampler: Any) -> Any:
        """Returns a study in memory that holds these trials; those from the number `known` on are still running."""
        study = optuna().create_study(
            direction=self.direction, sampler=sampler, pruner=self.pruner(), study_name=NAME
        )  # fmt: skip
        distributions = self.distributions
        for trial in trials:
            study.add_trial(_frozen(trial if trial.number < known else _unknown(trial), distributions))
        return study


def _longest(search: Search) -> int:
    """Returns the most steps that a trial may have."""
    d = search.space.get("train.steps")
    if d is None:
        return search.run.train.steps
    return int(max(d.values) if isinstance(d, sweeps.Choice) else d.high)


def _unknown(trial: Trial) -> Trial:
    """Returns a trial as it was before anything was known of it."""
    return Trial(trial.number, trial.params, trial.known)


def _frozen(trial: Trial, distributions: Mapping[str, Any]) -> Any:
    """Returns a trial as optuna holds it. One that failed by its settings has no values and counts as the worst, so
    that samplers avoid its like; of other failures they know nothing."""
    library = optuna()
    states = library.trial.TrialState
    failed = states.PRUNED if trial.about.get("by_settings") else states.FAIL
    state = {"running": states.RUNNING, "complete": states.COMPLETE, "pruned": states.PRUNED, "failed": failed}
    return library.trial.create_trial(
        state=state[trial.state], value=trial.value if trial.state == "complete" else None,
        params=dict(trial.params), distributions=dict(distributions), system_attrs=dict(trial.rungs),
        intermediate_values={} if trial.state == "failed" else dict(trial.steps),
    )  # fmt: skip


def propose(search: Search, trials: Sequence[Trial], known: int) -> dict[str, Any]:
    """Returns the point of the trial that follows these, of which those below the number `known` have ended.

    ValueError: the sampler now says something else of an earlier trial than it did, for its version is another.
    """
    number = len(trials)
    with _quiet():
        if search.settings.sampler not in REMEMBERING:
            return dict(search.study(trials, known, search.sampler(number)).ask(search.distributions).params)
        study = search.study([], 0, search.sampler(0))
        asked: list[Any] = []
        told = 0
        for k in range(number + 1):
            for earlier in trials[told : trials[k].known if k < number else known]:
                _tell(study, asked[earlier.number], earlier)
                told += 1
            study.sampler = search.sampler(k)
            asked.append(study.ask(search.distributions))
            if k < number and asked[k].params != trials[k].params:
                raise ValueError(
                    f"{JOURNAL}: trial {k} was {dict(trials[k].params)}, and the sampler now proposes "
                    f"{asked[k].params}: go on with the versions of optuna and cmaes that began the sweep"
                )
    return dict(asked[-1].params)


def _tell(study: Any, handle: Any, trial: Trial) -> None:
    """Tells a study what a trial came to."""
    frozen = _frozen(trial, {path: handle.distributions[path] for path in trial.params})
    for step, value in frozen.intermediate_values.items():
        handle.report(value, step)
    study.tell(handle, frozen.value if trial.state == "complete" else None, state=frozen.state)


def judge(search: Search, trials: Sequence[Trial], trial: Trial, steps: Mapping[int, float]) -> tuple[int | None, dict]:
    """Returns the first of the steps, with their validations, at which a trial is stopped, or None; and the values that
    halving compares with those of later trials."""
    if search.settings.pruner == "none":
        return None, {}
    with _quiet():
        study = search.study(trials[: trial.number], trial.known, optuna().samplers.RandomSampler(seed=0))
        study.enqueue_trial(dict(trial.params))
        running, cut = study.ask(search.distributions), None
        for step, value in sorted(steps.items()):
            running.report(value, step)
            if running.should_prune():
                cut = step
                break
        attributes = study.get_trials(deepcopy=False)[trial.number].system_attrs
    return cut, {name: value for name, value in attributes.items() if name.startswith(RUNG)}


def importances(search: Search, trials: Sequence[Trial]) -> dict[str, float]:
    """Returns the share of each field in what makes trials good (PED-ANOVA); nothing of too few trials."""
    if sum(trial.state == "complete" for trial in trials) < FEW:
        return {}
    with _quiet():
        study = search.study(trials, len(trials), optuna().samplers.RandomSampler(seed=0))
        found = optuna().importance.get_param_importances(study)
    return {path: float(share) for path, share in found.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out warnings about parts of optuna that may change, which are no news to who runs a sweep."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _OneWriter:
    """A lock that is none: the sweep's directory has one process that writes."""

    def acquire(self) -> bool:
        """Returns True."""
        return True

    def release(self) -> None:
        """Does nothing."""


class Journal:
    """A Journal keeps a sweep's trials in a file of optuna's journal storage, a line for each change."""

    def __init__(self, folder: Path, search: Search) -> None:
        library = optuna()
        path = folder / JOURNAL
        if path.is_file():
            _drop_cut_line(path)
        backend = library.storages.journal.JournalFileBackend(str(path), _OneWriter())
        self._storage = library.storages.JournalStorage(backend)
        self._distributions = search.distributions
        self._states = library.trial.TrialState
        studies = self._storage.get_all_studies()
        directions = [library.study.StudyDirection[search.direction.upper()]]
        self._study = studies[0]._study_id if studies else self._storage.create_new_study(directions, NAME)

    def trials(self) -> list[Trial]:
        """Returns the trials as the file has them."""
        names = {self._states.COMPLETE: "complete", self._states.PRUNED: "pruned", self._states.FAIL: "failed"}
        out = []
        for t in self._storage.get_all_trials(self._study):
            about = dict(t.user_attrs)
            state: Any = "failed" if about.get("reason") and t.state.is_finished() else names.get(t.state, "running")
            known, value = about.pop("known"), about.pop("value", None)
            rungs = {name: v for name, v in t.system_attrs.items() if name.startswith(RUNG)}
            out.append(Trial(t.number, t.params, known, state, value, t.intermediate_values, rungs, about))
        return out

    def add(self, trial: Trial) -> None:
        """Writes a new trial, as one line."""
        frozen = _frozen(trial, self._distributions)
        frozen.user_attrs = {"known": trial.known}
        self._storage.create_new_trial(self._study, frozen)

    def finish(self, trial: Trial) -> None:
        """Writes what a trial came to. Its state is the last line: a process that is killed before begins again."""
        key = self._storage.get_trial_id_from_study_id_trial_number(self._study, trial.number)
        for step, value in trial.steps.items():
            self._storage.set_trial_intermediate_value(key, step, value)
        for name, value in trial.rungs.items():
            self._storage.set_trial_system_attr(key, name, value)
        for name, what in {"reason": None, **trial.about, "value": trial.value}.items():
            self._storage.set_trial_user_attr(key, name, what)
        frozen = _frozen(trial, self._distributions)
        self._storage.set_trial_state_values(key, frozen.state, frozen.values)


def _drop_cut_line(path: Path) -> None:
    """Cuts off the last line of a file if it has no end, for its writer was killed."""
    with path.open("rb+") as file:
        text = file.read()
        if not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)
            file.flush()
            os.fsync(file.fileno())
