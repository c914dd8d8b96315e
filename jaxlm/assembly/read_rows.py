"""Puts records into the rows that a model reads them in where it learns nothing: for losses and for predictions.

What an objective says of padding is done here over many batches at once: texts that share rows fill them, and texts
that have a row each are read in the order of their lengths.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxlm.assembly.program import Program
from jaxlm.data import loader, packing
from jaxlm.objectives.objective import DeviceBatch, ExampleReader

AHEAD = 4096
"""Records that are put into rows together; those of four batches, if that is more. A block has one batch that isn't
full, and the host holds its rows before they are shared."""

Added = Callable[[loader.Arrays, np.ndarray], loader.Arrays]
"""(rows of one record each, with leaves [1, rows, …], the numbers of their records) → leaves to add to them."""


class Member(NamedTuple):
    """A Member is a record in a row, where it has the positions `begin` to `end - 1`."""

    record: int
    begin: int
    end: int


class Placed(NamedTuple):
    """A Placed is a batch on the devices, and the records of each of its rows, other processes' rows included."""

    batch: DeviceBatch
    members: list[list[Member]]


def placed(
    p: Program, records: packing.Records, limit: int = 0, added: Added = lambda batch, at: {}
) -> Iterator[Placed]:  # fmt: skip
    """Yields every record once: of the first ones that would fill `limit` batches with a row each, if not 0."""
    size = p.run.train.batch_size // p.run.train.micro_batches
    total = min(limit * size, len(records)) if limit else len(records)
    if isinstance(p.objective.records, ExampleReader) and p.objective.padding != "keep":
        if not total:
            raise ValueError("nothing to evaluate: there are no records")
        block_size = max(AHEAD, 4 * size)
        for begin in range(0, total, block_size):
            numbers = np.arange(begin, min(begin + block_size, total))
            block = loader.evaluation_rows(records, p.objective.example, numbers.tolist())
            yield from _with_little_padding(p, block | added(block, numbers), numbers, size, total <= block_size)
        return
    rows, T = p.rows(size), p.run.train.seq_len
    made = loader.evaluation_batches(records, p.objective.example, batch_size=size, rows=rows, limit=total)
    for number, batch in enumerate(made):
        mine = number * size + np.array(range(size) if rows is None else rows)
        every = range(number * size, min((number + 1) * size, total))
        yield Placed(p.to_device(batch | added(batch, mine), rows), [[Member(i, 0, T)] for i in every])


def _with_little_padding(
    p: Program, block: loader.Arrays, numbers: np.ndarray, size: int, alone: bool
) -> Iterator[Placed]:  # fmt: skip
    """Yields the rows of a block of records, `size` a batch; fewer where all of them are fewer, as those of a few
    inputs are, and there is no other block."""
    segments = block["segments"][0]
    T, lengths = segments.shape[-1], (segments > 0).sum(-1).reshape(len(segments), -1).max(-1)
    shares = p.objective.padding == "pack"
    rows = packing.shared_rows(block, T) if shares else [[i] for i in np.argsort(lengths, kind="stable").tolist()]
    count = size
    if shares and alone and len(rows) < size:
        T, [rows], few = packing.layout(block, halved=p.shortens_rows)
        count = _multiple(1 << (few - 1).bit_length(), p.multiple)  # a server's requests then have few shapes
    mine = p.rows(count)
    for begin in range(0, len(rows), count):
        chosen = rows[begin : begin + count]
        batch = {name: leaf[:, [i for row in chosen for i in row]] for name, leaf in block.items()}
        if shares:
            ends = np.cumsum([0, *map(len, chosen)]).tolist()
            here = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
            batch = packing.share_rows(batch, T, [here], count)
        else:
            batch = packing.trim_padding(batch) if p.shortens_rows else batch
            batch = {name: _filled_up(leaf, count) for name, leaf in batch.items()}
        batch = batch if mine is None else {name: leaf[:, mine] for name, leaf in batch.items()}
        members = [_members(row, lengths, numbers) for row in chosen]
        yield Placed(cast(DeviceBatch, loader.to_device(batch, p.batch_shardings(batch), mine)), members)


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of


def _filled_up(leaf: np.ndarray, count: int) -> np.ndarray:
    """Returns `[1, count, …]`, the rows beyond those of the leaf zeros."""
    return np.pad(leaf, [(0, 0), (0, count - leaf.shape[1]), *[(0, 0)] * (leaf.ndim - 2)])


def _members(row: Sequence[int], lengths: np.ndarray, numbers: np.ndarray) -> list[Member]:
    ends = np.cumsum(lengths[row]).tolist()
    return [Member(int(numbers[i]), a, b) for i, a, b in zip(row, [0, *ends], ends, strict=False)]


def by_record(p: Program, found: Iterable[tuple[list[list[Member]], Any]]) -> list[np.ndarray]:
    """Returns the prediction of each record, in their order, from those of batches and the members of their rows."""
    out: dict[int, np.ndarray] = {}
    of = p.objective.prediction.of
    for members, predicted in found:
        z = np.asarray(predicted)
        for r, row in enumerate(members):
            for k, m in enumerate(row):
                places = {"row": (r,), "text": (r, k), "position": (r, slice(m.begin, m.end))}
                out[m.record] = z[places[of]]
    return [out[i] for i in range(len(out))]


def predictions(p: Program, weights: Any, records: packing.Records) -> list[np.ndarray]:
    """Returns the model's prediction for each record, in their order."""
    found = ((members, p.predict(weights, jax.tree.map(lambda x: x[0], batch)))
             for batch, members in placed(p, records))  # fmt: skip
    return by_record(p, found)
