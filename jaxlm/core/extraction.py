"""Holds the settings of making an adapter of what a training changed (`jaxlm extract`). Nothing here imports jax."""

from dataclasses import dataclass

from jaxlm.core.ranges import Count


@dataclass(frozen=True)
class Extraction:
    """An Extraction says what adapter is made."""

    rank: Count = 16
    targets: tuple[str, ...] = ("all",)
    """Patterns of the paths of matrices that get a part; all: every matrix of the layers."""
    batches: Count = 16
    """How many batches of the calibration's text are read, where some is named."""
