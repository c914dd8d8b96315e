"""A run directory as programs use it: its configuration, figures, checkpoints and model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.assembly import run_directory
from jaxlm.assembly.language_model import LanguageModel
from jaxlm.assembly.open_model import open_model
from jaxlm.core import config
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.training import report
from jaxlm.training.log import read_lines


@dataclass(frozen=True)
class RunDirectory:
    """A RunDirectory is the folder of a run; its files are read when they are asked for."""

    path: Path

    @property
    def config(self) -> config.Run:
        """Reads the run's configuration."""
        return run_directory.read_config(self.path)

    @property
    def log(self) -> list[dict[str, Any]]:
        """Reads the lines of `metrics.jsonl`: each has `step` and `kind` (train, valid, sample, event)."""
        return read_lines(self.path / "metrics.jsonl")

    @property
    def losses(self) -> list[float]:
        """Returns the training losses that were logged, in their order."""
        return [line["loss"] for line in self.log if line["kind"] == "train"]

    @property
    def validation(self) -> dict[str, float]:
        """Returns the metrics of the last validation. ValueError: there was none yet."""
        lines = [line for line in self.log if line["kind"] == "valid"]
        if not lines:
            raise ValueError(f"{self.path}: no validation yet")
        return {name: value for name, value in lines[-1].items() if isinstance(value, float)}

    @property
    def finished(self) -> bool:
        """True if the run was trained to its end."""
        return run_directory.has_ended(self.path)

    @property
    def checkpoints(self) -> list[int]:
        """Lists the steps that have a checkpoint."""
        with Checkpoints(self.path / "checkpoints") as checkpoints:
            return checkpoints.steps()

    def open(self, step: int | None = None) -> LanguageModel:
        """Opens the model of a checkpoint: that of `step`, or the one that `train.use` says."""
        return LanguageModel(open_model(self.path, step))

    def report(self) -> Path:
        """Draws the report anew and returns the path of its page."""
        return report.build(self.path)
