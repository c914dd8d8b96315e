"""Text that a model is calibrated on becomes batches of its inputs, as its own training or task would read it."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxlm.assembly import corpus
from jaxlm.assembly.model_source import Source
from jaxlm.assembly.open_model import published_run
from jaxlm.assembly.run_objective import bind_run
from jaxlm.core.compress_request import Calibration
from jaxlm.data import loader
from jaxlm.data.loader import Arrays
from jaxlm.nn.layout import Layout
from jaxlm.objectives import OBJECTIVES

LENGTH = 512
READ = ("tokens", "segments", "positions", "types", "prefix", "source", "source_segments", "source_positions")
"""Keys of a batch that models read."""


def read(source: Source, c: Calibration) -> list[Arrays]:
    """Returns batches `[B, T]` of what the model reads of the calibration's sources, as many rows of each.

    ValueError: there is too little text, the model has no tokenizer or fewer positions, or its objective doesn't read
    such sources.
    """
    if source.tokens is None:
        raise ValueError(f"{source.path}: has no tokenizer; put its tokenizer.json beside the weights")
    run, positions = source.run or published_run(source), source.config.positions
    length = c.length or min(LENGTH, positions or LENGTH)
    if positions is not None and length > positions:
        raise ValueError(f"length: {length} is longer than the model's {positions} positions; give at most that")
    settings = run.objective
    if source.objective is not None and not source.is_trained_here:  # what a published head leaves open
        settings = OBJECTIVES.of(settings).infer_from_data(settings, c.calibration)
    run = dataclasses.replace(
        run, objective=settings, train=dataclasses.replace(run.train, seq_len=length),
        data=dataclasses.replace(run.data, valid=c.calibration),
    )  # fmt: skip
    objective = bind_run(run, source.tokens, source.templates.get("default"))
    read_as: corpus.Part = "valid"
    parts = [corpus.as_records(objective, part, document_mask=run.data.document_mask, seed=run.seed)
             for part in corpus.corpus(run.data, objective, (read_as,)).valid]  # fmt: skip
    wanted = [c.rows // len(parts) + (i < c.rows % len(parts)) for i in range(len(parts))]
    for place, part, n in zip(c.calibration, parts, wanted, strict=True):
        if len(part) < n:
            raise ValueError(
                f"calibration: {place} holds {len(part)} rows of {length} tokens, and {n} are wanted; give more text, "
                "fewer rows or a smaller length"
            )
    out = []
    for part, n in zip(parts, wanted, strict=True):
        made = loader.evaluation_batches(part, objective.example, batch_size=c.batch_size, limit=n) if n else ()
        out += [_inputs(batch) for batch in made]
    return out


def _inputs(batch: Arrays) -> Arrays:
    """Returns what models read of a batch, one row for each text of a question or a pair."""
    return {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items() if name in READ}


def tokens(batches: list[Arrays]) -> int:
    """Counts the tokens of batches that are no padding."""
    return sum(int((batch[name] > 0).sum()) for batch in batches for name in ("segments", "source_segments")
               if name in batch)  # fmt: skip


def placed(batches: list[Arrays], layout: Layout, mesh: jax.sharding.Mesh | None) -> list[dict[str, Any]]:
    """Returns the batches on the devices, filled up with rows of padding to a number that divides over them."""
    ways = layout.ways("batch", mesh)
    home = None if mesh is None else NamedSharding(mesh, layout.spec(("batch", "seq")))

    def put(x: np.ndarray) -> Any:
        return jax.device_put(np.pad(x, ((0, -len(x) % ways), (0, 0))), home)

    return [{name: put(x) for name, x in batch.items()} for batch in batches]
