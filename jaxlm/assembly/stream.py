"""A stream of stages is trained here, one run directory a stage, and every model is scored on every stage.

Whatever kills it, the same call goes on where it was: a stage's run continues from its checkpoint, and what is finished
is not done again.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.assembly import (
    continual_methods,
    earlier,
    infer_task,
    merge_back,
    moments,
    open_model,
    owned,
    run_directory,
    run_source,
    stream_cost,
    training_run,
)
from jaxlm.assembly.evaluate_model import evaluate
from jaxlm.assembly.model_source import StartModel
from jaxlm.assembly.stream_memory import write_joint
from jaxlm.core import config, registry, tree
from jaxlm.core import stream as streams
from jaxlm.core.continual import Continual
from jaxlm.core.figures import is_lower_better
from jaxlm.core.stream import Stage, Stream
from jaxlm.evaluation import forgetting, stream_warnings, task_scores
from jaxlm.objectives import OBJECTIVES
from jaxlm.runtime import processes
from jaxlm.training.log import read_lines

DESCRIPTION = "stream.json"
SCORES = "scores.json"
RESULTS = "results.json"


def train(stream: Stream, say: Callable[[str], None] = print) -> int:
    """Trains a stream in its directory, or goes on with it; returns the exit status, 0 where all of it is finished.

    ValueError: a stage can't be trained, or the directory belongs to another stream.
    """
    streams.check(stream)
    folder = stream.run.folder
    run_directory.check_place(stream.run)
    runs = {seed: _runs(stream, seed) for seed in stream.seeds}
    _claim(stream, folder)
    for seed in stream.seeds:
        if status := _train_seed(stream, runs[seed], folder / f"seed-{seed}", say):
            return status
    results = collect(stream, folder)
    if jax.process_index() == 0:
        (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    return 0


def _runs(stream: Stream, seed: int) -> list[config.Run]:
    """Returns the runs of all stages, checked and completed before anything is trained."""
    folder = stream.run.folder / f"seed-{seed}"
    out: list[config.Run] = []
    for i, stage in enumerate(stream.stages):
        run = stream.run_of(i, seed, str(folder), "")
        start = StartModel(run.start)
        try:
            run = run_source.completed(open_model.starting(run, start) if start.place else run, start)
            for before in out[-1:]:
                moments.check_pair(before, run)
            continual_methods.check(run.continual, run)
            _check_metric(stage.metric, run)
        except ValueError as error:
            raise ValueError(f"stage {stage.name}: {error}") from error
        if i == 0:
            optim = run.optim if start.place else dataclasses.replace(run.optim, moments="fresh")
            out.append(dataclasses.replace(run_source.growing(run, start), optim=optim))
            continue
        run = run_source.growing_from(run, out[-1].adapter)
        merges = stream.merge_back is not None and i > 1
        out.append(dataclasses.replace(run, start=str(merge_back.place(out[-1]) if merges else out[-1].folder)))
    owned.check_stream(out)
    if stream.merge_back is not None:
        merge_back.check(stream.merge_back, out, stream.run.start)
    return out


def _check_metric(metric: str, run: config.Run) -> None:
    """Raises ValueError for a figure that the evaluation of a run doesn't have, or of which more isn't known to be
    better or worse."""
    prediction = OBJECTIVES.of(run.objective).prediction
    if prediction is not None:
        known = ("loss", *task_scores.FIGURES[prediction.scores](run.objective))
        if metric and metric not in known:
            raise ValueError(f"metric: {metric!r} is no figure of its objective; it has {', '.join(known)}")
    elif metric and is_lower_better(metric) is None:
        raise ValueError(f"metric: {metric!r} is no figure of a text; take loss, perplexity, bits_per_byte or accuracy")


def _claim(stream: Stream, folder: Path) -> None:
    """Writes what the stream is, or compares it with what stands there."""
    file, mine = folder / DESCRIPTION, json.loads(json.dumps(streams.to_dict(stream)))
    if file.is_file():
        theirs = json.loads(file.read_text("utf-8"))
        if (where := tree.difference(theirs, mine)) is not None:
            raise ValueError(f"{folder} holds another stream: {where}; choose another `name`, or delete it")
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no {DESCRIPTION}; choose another `name` or `out`")
    elif jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(mine, indent=1) + "\n", "utf-8")
    processes.barrier("the stream's directory", 3600.0)


def _train_seed(stream: Stream, runs: list[config.Run], folder: Path, say: Callable[[str], None]) -> int:
    """Trains and scores the stages and the references with one seed; returns the exit status."""
    scores, pairs = Scores(folder / SCORES), list(zip(stream.stages, runs, strict=True))

    def all_of(place: Path) -> dict[str, Any]:
        each = {stage.name: _score(place, run, stage) for stage, run in pairs}
        return {name: score for name, score in each.items() if score is not None}

    if "before" not in scores.rows:
        each = {stage.name: _score_start(run, runs[0], stage) for stage, run in pairs}
        scores.add("before", {name: score for name, score in each.items() if score is not None}, 0.0)
    for i, (stage, run) in enumerate(pairs):
        say(f"── stage {i + 1} of {len(runs)}: {stage.name} ──")

        def score(place: Path, run: config.Run = run, merges: bool = i > 0) -> dict[str, Any]:
            if stream.merge_back is not None and merges:
                place = merge_back.merge(stream.merge_back, run, stream.run.start)
            return all_of(place)

        if status := _train_stage(run, scores, f"after {stage.name}", score):
            return status
    for i, (stage, run) in enumerate(pairs if "single" in stream.references else ()):
        if i == 0 and not run.continual.methods:  # the stream's first stage is trained by itself already
            scores.add(f"single {stage.name}", scores.rows[f"after {stage.name}"], 0.0)
            continue
        say(f"── {stage.name} by itself ──")
        plain = dataclasses.replace(run.continual, methods=())
        optim = dataclasses.replace(run.optim, moments=runs[0].optim.moments)
        alone = dataclasses.replace(run, start=runs[0].start, out=str(folder / "single"), continual=plain, optim=optim)
        alone = run_source.growing(alone, StartModel(alone.start))
        if status := _train_stage(alone, scores, f"single {stage.name}", all_of):
            return status
    if "joint" in stream.references:
        say("── all stages at once ──")
        return _train_stage(write_joint(runs, folder), scores, "joint", all_of)
    return 0


class Scores:
    """The scores of a stream with one seed: a row of each model, written when it is known."""

    def __init__(self, file: Path) -> None:
        self.file = file
        stored = json.loads(file.read_text("utf-8")) if file.is_file() else {"rows": {}, "seconds": {}}
        self.rows: dict[str, dict[str, Any]] = stored["rows"]
        self.seconds: dict[str, float] = stored["seconds"]

    def add(self, name: str, row: dict[str, Any], seconds: float) -> None:
        """Adds a row and writes the file anew, whole or not at all."""
        self.rows[name], self.seconds[name] = row, seconds
        if jax.process_index() == 0:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps({"rows": self.rows, "seconds": self.seconds}, indent=1) + "\n", "utf-8")
            part.rename(self.file)


def _train_stage(run: config.Run, scores: Scores, name: str, score: Callable[[Path], dict[str, Any]]) -> int:
    """Trains a run and scores it, as far as that isn't done."""
    if name in scores.rows:
        return 0
    started = time.perf_counter()
    ended = (run.folder / "config.json").exists() and run_directory.has_ended(run.folder)
    if not ended and (status := training_run.train(run, StartModel(run.start))):
        return status
    seconds = run_seconds(run.folder) or time.perf_counter() - started
    scores.add(name, score(run.folder), seconds)
    return 0


def run_seconds(folder: Path) -> float | None:
    """Returns the time between the first and the last line of a run's log; None: they don't say."""
    times = [line["time"]["unix"] for line in read_lines(folder / "metrics.jsonl")]
    return times[-1] - times[0] if len(times) > 1 else None


def _score(place: Path, run: config.Run, stage: Stage) -> dict[str, Any] | None:
    """Returns the score of the model in a run directory on a stage, whose own run is `run`; None: it has no head for
    it."""
    opened = open_model.open_model(place)
    if (task := owned.task_of(place, opened.source.run, run.name)) is not None:
        opened = dataclasses.replace(opened, params=owned.for_task(place, opened.params, task))
    if (weights := head_of(opened.params, place, run)) is None:
        return None
    here = _as_stage(dataclasses.replace(opened, params=weights), run)
    share = infer_task.share_right(here, run.name)
    return scored(here, run, stage) | ({} if share is None else {"inferred": share})


def head_of(params: Any, place: Path, run: config.Run) -> Any | None:
    """Returns the weights of a model with the head and the adapter of a stage at the top; None: it has no head for
    it."""
    here = run_directory.read_config(place)
    of_model = earlier.of_directory(place, here)
    task = next((task for task in of_model.tasks if task.name == run.name), None)
    head = OBJECTIVES.of(run.objective).specs(run.objective, run.model.width)
    if task is None and head and here.objective != run.objective:
        return None
    weights = params if task is None else of_model.weights_for(params, task)
    own = OBJECTIVES.of(here.objective).specs(here.objective, here.model.width)
    surplus = own.keys() - head.keys() if task is not None and task.own_head else ()
    return {name: value for name, value in weights.items() if name not in surplus and name != earlier.HEADS}


def _score_start(run: config.Run, first: config.Run, stage: Stage) -> dict[str, Any] | None:
    """Returns the score on a stage of the model that the stream starts from; None: it starts from fresh weights, or has
    no head for it."""
    if not first.start or OBJECTIVES.of(run.objective).specs(run.objective, run.model.width):
        return None
    return scored(open_model.open_model(first.start), run, stage)


def _as_stage(opened: open_model.Pretrained, run: config.Run) -> open_model.Pretrained:
    """Returns a model with the objective and the data of a stage."""
    as_stage = dataclasses.replace(
        opened.source.run or run, objective=run.objective, data=run.data, train=run.train, continual=Continual()
    )
    return dataclasses.replace(opened, source=dataclasses.replace(opened.source, run=as_stage))


def scored(opened: open_model.Pretrained, run: config.Run, stage: Stage) -> dict[str, Any]:
    """Returns the `metric` of a stage and its `value` for a model, on the stage's test data or else its validation
    data."""
    figures = evaluate(_as_stage(opened, run)).figures
    name = stage.metric or next(iter(figures)) if OBJECTIVES.of(run.objective).prediction else stage.metric
    name = name or ("bits_per_byte" if "bits_per_byte" in figures else "loss")
    if name not in figures:
        raise ValueError(f"stage {stage.name}: no figure {name!r}; there are {', '.join(figures)}")
    return {"metric": name, "value": figures[name]}


def matrix(stream: Stream, scores: Scores) -> tuple[np.ndarray, list[str]]:
    """Returns the scores `[T + 1, T]` as they are, NaN where there is none, and the name of each stage's metric."""
    names = [stage.name for stage in stream.stages]
    rows = [scores.rows["before"], *(scores.rows[f"after {name}"] for name in names)]
    values = np.array([[row.get(name, {}).get("value", math.nan) for name in names] for row in rows])
    return values, [scores.rows[f"after {name}"][name]["metric"] for name in names]


def collect(stream: Stream, folder: Path) -> dict[str, Any]:
    """Returns what a finished stream's scores say, over all seeds."""
    each, matrices, inferred = [], [], []
    names = [stage.name for stage in stream.stages]
    metrics: list[str] = []
    seconds: dict[str, float] = {}
    for seed in stream.seeds:
        scores = Scores(folder / f"seed-{seed}" / SCORES)
        values, metrics = matrix(stream, scores)
        signs = np.array([-1.0 if is_lower_better(metric) else 1.0 for metric in metrics])
        single = [scores.rows[f"single {n}"][n]["value"] for n in names] if "single" in stream.references else None
        joint = [scores.rows["joint"][n]["value"] for n in names] if "joint" in stream.references else None
        each.append(forgetting.figures(
            values * signs, None if single is None else signs * single, None if joint is None else signs * joint
        ))  # fmt: skip
        matrices.append([[None if math.isnan(x) else x for x in row] for row in values.tolist()])
        after = [scores.rows[f"after {name}"] for name in names]
        inferred.append([[row.get(name, {}).get("inferred") for name in names] for row in after])
        for name, spent in scores.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + spent / len(stream.seeds)
    figures = forgetting.over_seeds(each)
    told = any(x is not None for rows in inferred for row in rows for x in row)
    results: dict[str, Any] = ({"inferred": inferred} if told else {}) | {
        "stages": names, "metrics": metrics, "methods": list(stream.run.continual.methods), "seeds": list(stream.seeds),
        "lower_is_better": [bool(is_lower_better(metric)) for metric in metrics],
        "matrices": matrices, "seconds": seconds, "adapter": registry.name_of(stream.run.adapter),
        "costs": stream_cost.costs([folder / f"seed-{seed}" for seed in stream.seeds], names),
        "figures": {name: [None if math.isnan(x) else x for x in ends] for name, ends in figures.items()},
    }  # fmt: skip
    return results | {"warnings": stream_warnings.warnings(results)}
