"""A model is scored on held-out data: its losses by document or example, and the scores of its task. Training and
`jaxlm eval` do it in the same way."""

import dataclasses
import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.assembly import corpus, read_rows
from jaxlm.assembly.program import Program, once_a_shape
from jaxlm.assembly.run_objective import BoundObjective
from jaxlm.data import packing
from jaxlm.evaluation import mistakes, perplexity, task_scores
from jaxlm.evaluation.bootstrap import Sample
from jaxlm.evaluation.samples import is_loss, of_losses
from jaxlm.objectives.objective import DeviceBatch, ExampleReader


@dataclass(frozen=True)
class Units:
    """Units say which documents or examples the records of a source hold, numbered from 0."""

    name: str
    firsts: np.ndarray
    """int64 [records]: the number of the first unit of each record."""
    count: int
    several: bool
    """Whether each segment of a record is a unit of its own, or all of it is one."""


def units_of(objective: BoundObjective, source: Any, records: packing.Records) -> Units:
    """Returns the units of a source's records: documents of packed windows, pairs of texts, labelled examples. Windows
    of one question, which come from the same place of a file, are one unit; a window is one where nothing keeps its
    documents apart."""
    reader = objective.records
    if isinstance(records, packing.Packed):
        if not records.document_mask:
            return Units("windows", np.arange(len(records)), len(records), False)
        starts = np.arange(len(records)) * records.seq_len
        firsts = np.searchsorted(records.cache.offsets, starts, side="right") - 1
        return Units("documents", firsts, len(records.cache), True)
    if isinstance(records, packing.Texts):
        return Units("examples", records.firsts[:-1], int(records.firsts[-1]), True)
    if isinstance(reader, ExampleReader) and reader.shares_rows:
        counts = [len(reader.texts(record)) for record in source]
        return Units("examples", np.cumsum([0, *counts[:-1]]), sum(counts), True)
    if isinstance(reader, ExampleReader):
        numbers: dict[Any, int] = {}
        each = [numbers.setdefault(record["where"] or i, len(numbers)) for i, record in enumerate(source)]
        return Units("examples", np.array(each), len(numbers), False)
    return Units("examples", np.arange(len(records)), len(records), False)


class HeldOut:
    """A HeldOut is a part of a corpus that models are scored on: the records of its sources, with their units."""

    def __init__(self, p: Program, sources: Sequence[Any]) -> None:
        self.sources = sources
        data = p.run.data
        self.records = [corpus.as_records(p.objective, s, document_mask=data.document_mask, seed=p.run.seed)
                        for s in sources]  # fmt: skip
        self.units = [units_of(p.objective, s, records) for s, records in zip(sources, self.records, strict=True)]
        self.count = sum(units.count for units in self.units)
        self.unit = self.units[0].name if self.units else "examples"

    def batches(self, p: Program, limit: int = 0) -> Iterator[DeviceBatch]:
        """Yields every record once, on the devices, each position with its unit; of as many as `limit` batches of each
        source if not 0."""
        for batch, _ in self.placed(p, limit):
            yield batch

    def placed(self, p: Program, limit: int = 0) -> Iterator[read_rows.Placed]:
        """Yields the batches with the records of their rows, numbered over all sources."""
        first, offset = 0, 0
        for records, units in zip(self.records, self.units, strict=True):
            added = partial(owners, units=units, offset=offset)
            seen = 0
            for batch, members in read_rows.placed(p, records, limit, added):
                seen += sum(map(len, members))
                yield read_rows.Placed(batch, [[m._replace(record=first + m.record) for m in row] for row in members])
            first, offset = first + seen, offset + units.count


def owners(batch: dict[str, np.ndarray], at: np.ndarray, units: Units, offset: int) -> dict[str, np.ndarray]:
    """Returns the unit and the checksum of each position of a batch whose rows are the records `at`, some of them
    beyond the last record. Units are numbered from 1 + `offset`."""
    real = at < len(units.firsts)
    segments = batch["origin"] if "origin" in batch else batch.get("segments")
    if segments is None:  # of another package's objective
        segments = real.astype(np.int32)[None, :, None]
    within = segments if units.several else np.minimum(segments, 1)
    first = offset + units.firsts[np.where(real, at, 0)].reshape(1, -1, *(1,) * (segments.ndim - 2))
    sums = [zlib.crc32(b"".join(batch[name][0, row].tobytes() for name in sorted(batch))) for row in range(len(at))]
    checksum = np.array(sums, np.uint32).view(np.int32).reshape(first.shape)
    return dict(
        unit=np.where(within > 0, first + within, 0).astype(np.int32),
        checksum=np.broadcast_to(checksum, segments.shape).copy(),
    )


class Scored(NamedTuple):
    """A Scored holds what a model does on held-out data."""

    losses: dict[str, float]
    """Losses, and what comes with them."""
    task: dict[str, float]
    """The scores of the task; empty: the objective makes no predictions."""
    samples: dict[str, Sample]
    """What the figures are resampled from; the task's own first."""
    report: str
    """The task's scores as text."""
    classes: Sample | None
    """What figures of each class are resampled from, where the task has classes."""
    examples: list[dict[str, Any]]
    """The place, the true and the predicted answer of each example, where the objective makes predictions."""
    mistakes: dict[str, Any]
    """What the predictions get wrong; empty: there are none."""

    @property
    def figures(self) -> dict[str, float]:
        """Returns the task's own scores and the loss; or the losses, where there is no task. Accuracy and perplexity
        of tokens would only be taken for the task's."""
        return self.task | {n: v for n, v in self.losses.items() if is_loss(n)} if self.task else self.losses


class Scorer:
    """A Scorer scores weights; it compiles its programs once."""

    def __init__(self, p: Program) -> None:
        self.p = p
        self._step, _ = once_a_shape(jax.jit(self._scores, out_shardings=p.whole), "compile the validation")

    def _scores(self, weights: Any, batch: Any) -> tuple[Any, Any]:
        """Returns what a batch adds to the sums, and its predictions or None, of one pass of the model."""
        p = dataclasses.replace(self.p, model=self.p.sharing())
        rows = jax.tree.map(lambda x: x[0], batch)
        told = p.objective.predict(p.model, weights, rows) if p.objective.predicts else None
        return perplexity.eval_step(p.loss, p.objective.totals, p.tokens.bytes_per_token)(weights, rows), told

    def __call__(self, weights: Any, held: HeldOut, limit: int = 0) -> Scored:
        """Scores weights on held-out data, or on `limit` batches of each of its sources if not 0."""
        p = self.p
        told: list[tuple[list[list[read_rows.Member]], Any]] = []

        def step(weights: Any, placed: read_rows.Placed) -> Any:
            sums, predicted = self._step(weights, placed.batch)
            told.append((placed.members, predicted))
            return sums

        found = perplexity.tally(step, weights, held.placed(p, limit), held.count, held.unit)
        losses, samples = found.figures(), {"losses": of_losses(found, whole=not p.objective.predicts)}
        if not p.objective.predicts:
            return Scored(losses, {}, samples, "", None, [], {})
        most = limit * (p.run.train.batch_size // p.run.train.micro_batches) or None
        records = [record for source in held.sources for record in source[:most]]
        true, predicted = p.objective.answers(records, read_rows.by_record(p, told))
        judged = task_scores.judge(p.objective.prediction.scores, p.run.objective, records, true, predicted)
        wrong = self._mistakes(held, found, judged, records, true, predicted)
        samples = {"answers": judged.sample} | samples
        return Scored(losses, judged.figures, samples, judged.report, judged.classes, judged.examples, wrong)

    def _mistakes(
        self, held: HeldOut, found: perplexity.Tally, judged: task_scores.Judged, records: Sequence[Any],
        true: Sequence[Any], predicted: Sequence[Any],
    ) -> dict[str, Any]:  # fmt: skip
        """Returns what the predictions get wrong, with the text of each example and its loss."""
        p, reader = self.p, self.p.objective.records
        assert isinstance(reader, ExampleReader)
        places = [example["where"] for example in judged.examples]
        first = dict(zip(reversed([r["where"] for r in records]), reversed(records), strict=True))
        each = records if len(records) == len(true) else [first[place] for place in places]
        numbered = [dict.fromkeys(r["where"] or i for i, r in enumerate(source)) for source in held.sources]
        losses = None if reader.shares_rows else found.losses()
        known = {} if losses is None else dict(zip(itertools.chain(*numbered), losses, strict=True))

        def told(i: int) -> tuple[str, Sequence[str]]:
            words = each[i].get("words", ())
            texts = [p.tokens.decode(ids) for ids in reader.texts(each[i])]
            return " ".join(words) or "\n".join(texts), words

        scores = p.objective.prediction.scores
        return mistakes.mistakes(scores, p.run.objective, true, predicted, judged.classes, places, known, told)
