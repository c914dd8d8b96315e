"""Opens the text that models are judged on before something is taken from them, and that of the loss before and
after."""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import rich.console
import rich.progress

from jaxlm.assembly import corpus as corpora
from jaxlm.assembly import scoring
from jaxlm.assembly.open_model import Pretrained, program
from jaxlm.assembly.program import Program
from jaxlm.objectives import OBJECTIVES
from jaxlm.objectives.objective import DeviceBatch

HELD_OUT = 0.1  # share of the calibration's documents, where no held-out text is named

T = TypeVar("T")


@dataclass(frozen=True)
class CalibratedProgram:
    """A CalibratedProgram is a model's program with the batches that it is judged on."""

    p: Program
    batches: Callable[[], Iterator[DeviceBatch]]
    sources: tuple[str, ...]

    def each(self, what: str) -> Iterator[dict[str, Any]]:
        """Yields the batches, `[B, T]`, with a progress bar. ValueError: there are none."""
        found = 0
        for batch in shown(list(self.batches()), what):
            found += 1
            yield jax.tree.map(lambda x: x[0], dict(batch))
        if not found:
            raise ValueError(f"calibration: {', '.join(self.sources)} holds no text that fills a row; give more")


def shown(several: Iterable[T], what: str) -> Iterator[T]:
    """Yields what it is given, with a progress bar on terminals."""
    console = rich.console.Console(stderr=True)
    disable = not sys.stderr.isatty() or jax.process_index() != 0
    yield from rich.progress.track(list(several), what, console=console, disable=disable)


def own_sources(p: Pretrained) -> tuple[str, ...]:
    """Returns the sources that a run was trained on; of a published model none are known."""
    return () if p.source.run is None else p.source.run.data.train


def of(p: Pretrained, sources: Sequence[str], batches: int) -> CalibratedProgram:
    """Returns a model with so many batches of text. ValueError: the sources can't be read."""
    used = _program(p, sources)
    part: corpora.Part = "valid"
    corpus = corpora.corpus(used.run.data, used.objective, (part,))
    return CalibratedProgram(used, partial(_limited, used, corpus.valid, batches), tuple(sources))


def with_held_out(
    p: Pretrained, sources: Sequence[str], held_out: Sequence[str], batches: int
) -> tuple[CalibratedProgram, scoring.HeldOut]:
    """Returns a model with so many batches of text, and other text for losses.

    Without `sources` both are those of the run; without `held_out` a tenth of the documents of `sources` is kept for
    it. ValueError: there are no sources, or they can't be read, or leave nothing for the losses.
    """
    run = p.source.run
    named = tuple(sources) or own_sources(p)
    if not named:
        raise ValueError(f"calibration: {p.source.path} names no text that it was trained on; give some `calibration`")
    used = _program(p, named)
    data = dataclasses.replace(used.run.data, train=named, weights=(), valid=tuple(held_out))
    if sources and not held_out:
        data = dataclasses.replace(data, holdout=HELD_OUT)
    elif not held_out and run is not None:
        data = dataclasses.replace(data, valid=run.data.valid)
    corpus = corpora.corpus(data, used.objective, ("train", "valid"))
    held = scoring.HeldOut(used, corpus.valid)
    if not sum(map(len, held.records)):
        raise ValueError(f"held_out: {', '.join(held_out or named)} leaves no text for the loss; give more `held_out`")
    return CalibratedProgram(used, partial(_limited, used, corpus.train, batches), named), held


def _program(p: Pretrained, sources: Sequence[str]) -> Program:
    settings = None if p.source.is_trained_here else p.source.objective
    if settings is not None:  # what a published head leaves open
        settings = OBJECTIVES.of(settings).infer_from_data(settings, sources)
    return program(p, sources, settings=settings)


def _limited(p: Program, sources: Sequence[Any], limit: int) -> Iterator[DeviceBatch]:
    """Yields so many batches, from all sources alike."""
    each = max(1, -(-limit // max(len(sources), 1)))
    for number, batch in enumerate(corpora.batches_of(p, sources, each)):
        if number < limit:
            yield batch
