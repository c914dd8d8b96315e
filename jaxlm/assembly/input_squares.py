"""Measures the mean squares of the inputs of a model's matrices on a calibration text: how much each column's error
counts where numbers are rounded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.assembly import corpus as corpora
from jaxlm.assembly.open_model import Pretrained, program
from jaxlm.formats import gguf_importance, gguf_write
from jaxlm.runtime import mesh
from jaxlm.weights import matrices
from jaxlm.weights.compress import recording, statistics

VALID: tuple[corpora.Part, ...] = ("valid",)
TOKENS = 1 << 14  # of a calibration text that are read; more make no steady difference


class Measured(NamedTuple):
    """A `Measured` holds what was measured of a text."""

    importance: dict[str, np.ndarray]
    """Mean squares `[columns]` by GGUF's names of tensors."""
    tokens: int
    length: int
    """Tokens of a row."""


def for_gguf(p: Pretrained, calibration: str) -> Measured | dict[str, np.ndarray]:
    """Returns importance by GGUF's names of tensors: what llama.cpp's file of it says, where `calibration` is one, or
    what is measured on the source that it names.

    Raises a ValueError where the source is empty or leaves inputs that aren't finite.
    """
    if is_importance_file(calibration):
        return gguf_importance.read(calibration)
    means, tokens, length = mean_squares(p, calibration)
    c, specs = p.model.config, p.model.specs
    return Measured(gguf_write.importance_of(p.model.family, c, specs, means), tokens, length)


def is_importance_file(calibration: str) -> bool:
    """Says whether a place is llama.cpp's file of importance, and not a text."""
    return Path(calibration).suffix == ".gguf"


def mean_squares(p: Pretrained, source: str) -> tuple[dict[str, np.ndarray], int, int]:
    """Returns the mean squares `[layers, inputs]` of the inputs of every matrix of the layers but experts, by path,
    over about the first `TOKENS` tokens of a source; how many there were; and how many stand in a row."""
    evaluated = program(p, [source], "causal")
    data = corpora.corpus(evaluated.run.data, evaluated.objective, VALID)
    recorded = matrices.select(matrices.matrices(p.model.family, p.model.config), ("all",))

    @jax.jit
    def observed(params: Any, batch: Mapping[str, jax.Array]) -> dict[str, statistics.Statistics]:
        rows = {name: x[0] for name, x in batch.items()}
        forward = lambda params: p.model.forward(params, rows).x_BTD  # noqa: E731
        _, found = recording.observe(forward, params, recorded, rows["segments"] > 0, hessian=False)
        return found

    total: dict[str, statistics.Statistics] = {}
    count, length = 0, evaluated.run.train.seq_len
    with mesh.on_mesh(p.mesh):
        for batch in corpora.validation_batches(evaluated, data):
            found = observed(p.params, batch)
            total = found if not total else {path: s.merge(found[path]) for path, s in total.items()}
            count += int((np.asarray(batch["segments"]) > 0).sum())
            if count >= TOKENS:
                break
    if not count:
        raise ValueError(f"calibration: {source} holds no text; name one with at least a row of {length} tokens")
    for path, s in total.items():
        statistics.check(s, path)
    return {path: np.asarray(s.mean_square) for path, s in total.items()}, count, length
