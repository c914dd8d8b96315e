"""A sweep tries settings of one run, and finds those with the best validation. A space says which fields vary, and how.

Nothing here imports jax.
"""

import itertools
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxlm.core import config_io
from jaxlm.core.config import Run
from jaxlm.core.ranges import Count, Natural, Range

SamplerName = Literal["tpe", "cma-es", "gp", "qmc", "random", "grid", "brute-force"]
PrunerName = Literal["median", "percentile", "halving", "hyperband", "none"]
WHOLE = ("grid", "brute-force")
"""Samplers that try every point of a space that has finitely many."""
TRIALS = 20
OWN = {
    "name": "is the sweep's own",
    "out": "is the sweep's own",
    "seed": "is no setting to search: `seeds` repeat each trial",
    "start": "is the same for all trials; start a sweep for each model",
    "start_layers": "is the same for all trials; start a sweep for each choice",
    "train.metric": "is what all trials are compared by",
}
"""Fields that can't vary, with the reason."""
EXAMPLE = '"optim.lr=log(1e-5,1e-3)" or "train.batch_size=16|32"'


@dataclass(frozen=True)
class Between:
    """The numbers from `low` to `high`, ends included; the whole numbers where the field is an int."""

    low: float
    high: float
    log: bool = False
    """Each factor is as likely, so that 1e-4 to 1e-3 gets as many trials as 1e-3 to 1e-2."""
    step: float | None = None
    """Only low, low + step, low + 2 step, …"""


@dataclass(frozen=True)
class Choice:
    """A few values, of which none is nearer to another."""

    values: tuple[Any, ...]


Dimension = Between | Choice
Space = Mapping[str, Dimension]
"""What varies, by the dotted names of fields; `adapter` chooses methods of fine-tuning by name."""


@dataclass(frozen=True)
class Settings:
    """Settings say how a space is searched."""

    trials: Count | None = None
    """Trials in all; None: 20, or all points of a space that `grid` and `brute-force` go through. More than before go
    on with a finished sweep."""
    sampler: SamplerName = "tpe"
    """What proposes trials. tpe, cma-es and gp learn from those before (numbers alone: cma-es); qmc covers the space
    evenly, random by chance; grid and brute-force try every point."""
    sampler_seed: Natural = 0
    """The seed of the proposals."""
    pruner: PrunerName = "median"
    """What stops trials early by their validations. median and percentile: those whose best is worse than that share
    of complete trials' values at the same step; halving and hyperband: all but the best 1/4 and 1/3 at steps that grow
    by that factor."""
    percentile: typing.Annotated[float, Range(0, 100, above=True, below=False)] = 25.0
    """percentile: trials below so many per cent of the best go on."""
    startup: Natural = 5
    """median and percentile: complete trials before any is stopped."""
    prune_after: Natural = 0
    """Steps before a trial may be stopped."""
    seeds: tuple[Natural, ...] = ()
    """Each trial is trained once with each, and its value is their mean; empty: the run's own seed. The first decides
    whether it is stopped early."""
    parallel: Count = 1
    """Trials that run at once. Trial n is then proposed from what trials 0 … n - parallel came to."""
    devices: tuple[str, ...] = ()
    """What each of the trials that run at once sees: 0,1 (CUDA_VISIBLE_DEVICES), or NAME=VALUE, a variable of the
    environment; empty: an equal share of the machine's GPUs."""
    launcher: str = ""
    """A command that starts each trial's process, such as "srun -N1 -n1 --gpus=1 --exact"."""
    keep: Literal["best", "all"] = "best"
    """Whose checkpoints are kept. best: those of the best trial so far and of those that run."""


def read(expressions: Sequence[str], run: Run) -> dict[str, Dimension]:
    """Returns the space that expressions describe: `optim.lr=log(1e-5,1e-3)`, `optim.beta2=uniform(0.9,0.999)`,
    `train.seq_len=uniform(64,256,64)`, `train.batch_size=16|32`.

    ValueError: one can't be read, names no field of the run, or has values of another type.
    """
    space: dict[str, Dimension] = {}
    for text in expressions:
        path, equals, values = text.partition("=")
        path = path.strip()
        if not equals or not path or not values.strip():
            raise ValueError(f"space: {text!r} says no values; write {EXAMPLE}")
        if path in space:
            raise ValueError(f"space: {path} stands twice; give its values once")
        space[path] = _dimension(path, values.strip(), run)
    return space


def _dimension(path: str, text: str, run: Run) -> Dimension:
    found = re.fullmatch(r"(log|uniform)\s*\((.*)\)", text)
    if found is None:
        if re.match(r"\w+\s*\(", text):
            raise ValueError(f"space: {path}: {text!r} is neither log(low,high) nor uniform(low,high,step)")
        kind = str if path == "adapter" else config_io.field_type(run, path, "space: ")
        return Choice(tuple(_typed(part.strip(), kind, path) for part in text.split("|")))
    kind, words = found[1], found[2].split(",")
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"space: {path}: {text!r} has something else than numbers in it") from None
    if len(numbers) not in ((2,) if kind == "log" else (2, 3)):
        raise ValueError(f"space: {path}: {text!r} is not {'log(low,high)' if kind == 'log' else 'uniform(low,high)'}")
    return Between(numbers[0], numbers[1], kind == "log", *numbers[2:])


def _typed(text: str, kind: Any, path: str) -> Any:
    """Returns the value that a text stands for in a field."""
    for one in _alternatives(kind):
        origin, inner = typing.get_origin(one), typing.get_args(one)
        if origin is Literal and text in map(str, inner):
            return next(value for value in inner if str(value) == text)
        if one is type(None) and text.lower() == "none":
            return None
        if one is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if one is str:
            return text
        if origin is tuple:
            return tuple(_typed(part.strip(), inner[0], path) for part in text.split(",") if part.strip())
        if one in (int, float):
            try:
                return one(text)
            except ValueError:
                continue
    raise ValueError(f"space: {path}: {text!r} is not {config_io.type_words(kind)}")


def _alternatives(kind: Any) -> list[Any]:
    """Returns the types that a field's values may have, without what else is said of them."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _alternatives(inner[0])
    if origin in (Literal, tuple) or not inner:
        return [kind]
    return [one for part in inner for one in _alternatives(part)]


def is_whole(run: Run, path: str) -> bool:
    """Returns whether a range of a field has whole numbers. ValueError: the field has no numbers."""
    kinds = _alternatives(config_io.field_type(run, path, "space: "))
    if int in kinds and float not in kinds:
        return True
    if float not in kinds:
        raise ValueError(f"space: {path} is no number, so it has no range; give choices: {path}=A|B")
    return False


def check(space: Space, run: Run) -> None:
    """Raises ValueError where a space has nothing to vary, a field that can't, or a range that is none. Whether values
    are in a field's own range is for the caller to see, who knows all parts of a run."""
    if not space:
        raise ValueError(f"space: give the fields that vary, such as {EXAMPLE}")
    for path, dimension in space.items():
        if path in OWN:
            raise ValueError(f"space: {path} {OWN[path]}")
        if isinstance(dimension, Choice):
            values = [repr(value) for value in dimension.values]
            if len(values) < 2:
                raise ValueError(f"space: {path}: one value is no choice; give several, or set the field itself")
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise ValueError(f"space: {path}: {twice} stands twice")
            continue
        _check_range(path, dimension, is_whole(run, path))


def _check_range(path: str, d: Between, whole: bool) -> None:
    numbers = [d.low, d.high, *([] if d.step is None else [d.step])]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"space: {path}: the ends of a range must be finite")
    if whole and any(number != int(number) for number in numbers):
        raise ValueError(f"space: {path} takes whole numbers; its range has others")
    if d.low >= d.high:
        raise ValueError(f"space: {path}: {d.low:g} is not below {d.high:g}; write the lower end first")
    if d.log and d.low <= 0:
        raise ValueError(f"space: {path}: a range by factors begins above 0, not at {d.low:g}; use uniform")
    if d.step is not None and (d.log or not 0 < d.step <= d.high - d.low):
        raise ValueError(f"space: {path}: a step of {d.step:g} doesn't fit its range")


def points(space: Space, run: Run) -> list[dict[str, Any]] | None:
    """Returns every point of a space, or None where a range has no steps."""
    each: list[list[Any]] = []
    for path, d in space.items():
        if isinstance(d, Choice):
            each.append(list(labels(d)))
        elif (d.step is None and not is_whole(run, path)) or d.log:
            return None
        else:
            step = d.step or 1
            count = int((d.high - d.low) / step + 1e-9) + 1
            values = [d.low + step * i for i in range(count)]
            each.append([int(v) for v in values] if is_whole(run, path) else values)
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*each)]


def labels(choice: Choice) -> list[Any]:
    """Returns what the values of a choice are called in a sweep's files: themselves, and lists as texts."""
    return [",".join(map(str, value)) if isinstance(value, tuple) else value for value in choice.values]


def values(space: Space, point: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of fields at a point, which has labels for choices."""
    return {
        path: d.values[labels(d).index(point[path])] if isinstance(d, Choice) else point[path]
        for path, d in space.items()
    }


def to_dict(space: Space) -> dict[str, Any]:
    """Returns plain JSON values that say all of a space."""
    return {path: {"choices": labels(d)} if isinstance(d, Choice)
            else {"low": d.low, "high": d.high, "log": d.log, "step": d.step} for path, d in space.items()}  # fmt: skip


def check_settings(settings: Settings, space: Space, run: Run) -> int:
    """Returns how many trials there are. ValueError: the sampler can't search the space, or nothing can be pruned."""
    every = points(space, run)
    if settings.sampler in WHOLE and every is None:
        raise ValueError(f"sampler: {settings.sampler} tries every point, and a range has no steps: give choices or "
                         "uniform(low,high,step), or take another sampler")  # fmt: skip
    if settings.sampler == "cma-es" and (len(space) < 2 or any(isinstance(d, Choice) for d in space.values())):
        raise ValueError("sampler: cma-es takes two ranges or more, and no choices; take tpe")
    if settings.pruner != "none" and not 0 < run.train.eval_every < run.train.steps and "train.eval_every" not in space:
        raise ValueError(f"pruner: {settings.pruner} looks at validations before the end, and train.eval_every "
                         f"{run.train.eval_every} of {run.train.steps} steps makes none; lower it, or set `pruner` to "
                         "none")  # fmt: skip
    if len(set(settings.seeds)) < len(settings.seeds):
        raise ValueError("seeds: give each once")
    count = len(every) if settings.sampler in WHOLE and every is not None else TRIALS
    if settings.trials is None:
        return count
    return min(settings.trials, count) if settings.sampler in WHOLE else settings.trials
