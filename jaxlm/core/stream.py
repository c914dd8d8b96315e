"""A stream is a sequence of tasks or texts that one model learns one after another; a config file's function `config()`
may return one. Nothing here imports jax."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxlm.core import config_io, ranges
from jaxlm.core.config import Run
from jaxlm.core.merging import Changes
from jaxlm.core.ranges import Share


@dataclass(frozen=True)
class Stage:
    """A stage is one task or text of a stream."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the stream's run that differ in this stage, by names with dots: `data.train`, `train.steps`,
    `objective`, … It is scored on its `data.valid`, or on what is held out of its training data."""
    metric: str = ""
    """The figure that it is scored by; empty: the first score of its objective, or bits per byte of a text."""


@dataclass(frozen=True)
class MergeBack(Changes):
    """Merges the model after each stage but the first with the one before it, as `jaxlm merge` does; a stream goes on
    from the merge, and that is scored.

    Methods that add changes take the model before as their base; model_stock takes the model that the stream starts
    from.
    """

    weight: Share | None = field(default=None, kw_only=True)
    """How much the new model counts, from 0 (the model before) to 1; None: 0.5. Changes are multiplied by it."""


@dataclass(frozen=True)
class Stream:
    """A stream holds what its stages share, and the stages."""

    run: Run
    """What all stages share: the model that the first starts from, and the methods that keep earlier tasks."""
    stages: tuple[Stage, ...]
    seeds: tuple[int, ...] = (0,)
    """The whole stream is run once with each."""
    references: tuple[Literal["single", "joint"], ...] = ()
    """Trained beside the stream: single: each stage by itself; joint: all stages at once."""
    merge_back: MergeBack | None = None
    """None: each stage goes on from the one before it."""

    def run_of(self, number: int, seed: int, folder: str, start: str) -> Run:
        """Returns the run of stage `number` (0, 1, …) in a folder, which starts from `start` (empty: the stream's own
        start)."""
        stage = self.stages[number]
        run = config_io.changed(self.run, dict(stage.changes))
        continual = dataclasses.replace(run.continual, heads=True)
        return dataclasses.replace(
            run, name=f"{number + 1}-{stage.name}", out=folder, start=start or run.start, seed=seed, continual=continual
        )


def check(stream: Stream) -> None:
    """Raises ValueError where the stream names a stage twice, or has too few, or a name that is no folder's."""
    names = [stage.name for stage in stream.stages]
    if len(names) < 2:
        raise ValueError(f"stages: {len(names)} stages are no stream; give at least two")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"stages: {name!r} is the name of two stages; rename one")
        if not name or "/" in name or name.startswith("."):
            raise ValueError(
                f"stages: {name!r} is no name of a folder; give one without / that doesn't begin with a dot"
            )
    if not stream.seeds or len(set(stream.seeds)) < len(stream.seeds):
        raise ValueError("seeds: give at least one, and each once")
    for seed in stream.seeds:
        if out := ranges.outside(seed, ranges.Natural):
            raise ValueError(f"seeds: {out}")
    for key in ("name", "out", "seed"):
        if any(key in stage.changes for stage in stream.stages):
            raise ValueError(f"stages: {key} is the stream's own; a stage can't change it")


def to_dict(stream: Stream) -> dict[str, Any]:
    """Returns plain JSON values that say all that determines the stream's results."""
    runs = [config_io.to_dict(stream.run_of(i, 0, "", "")) for i in range(len(stream.stages))]
    pairs = zip(stream.stages, runs, strict=True)
    stages = [{"name": stage.name, "metric": stage.metric, "run": run} for stage, run in pairs]
    merged = {} if stream.merge_back is None else {"merge_back": dataclasses.asdict(stream.merge_back)}
    return {"stages": stages, "seeds": list(stream.seeds), "references": list(stream.references)} | merged
