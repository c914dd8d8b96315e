"""A corpus holds the tokenised training, validation and test data of a run, of which batches are made."""

import functools
import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxlm.assembly.program import Program
from jaxlm.assembly.run_objective import BoundObjective, text_field
from jaxlm.core import config
from jaxlm.data import loader, packing
from jaxlm.data import token_cache as caches
from jaxlm.data.replay import Replayed
from jaxlm.objectives.objective import DeviceBatch, ExampleReader, TextPairs

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = ("train", "valid", "test")
ROLES = {"train": "", "valid": ", which may choose the checkpoint", "test": ", scored once at the end"}
NAMES = {"train": "training", "valid": "validation", "test": "test"}


@dataclass(frozen=True)
class Corpus:
    """Tokenised training, validation and test data of a run: caches, or lists of records for an objective that reads
    its sources itself."""

    train: list[Any]
    weights: list[float]
    """Shares of the training sources; empty: those of their records, so that all are read equally often."""
    valid: list[Any]
    test: list[Any] = field(default_factory=list)
    """Empty: the run has no test data."""

    def sizes(self, data: config.Data) -> list[dict[str, Any]]:
        """Returns the part and the name of each source, and how much it holds: documents, tokens and bytes, or
        records."""
        out = []
        for part in PARTS:
            names = getattr(data, part) or [f"held out of {source}" for source in data.train]
            for name, c in zip(names, getattr(self, part), strict=False):
                size = dict(records=len(c))
                if isinstance(c, caches.Cache):
                    size = dict(documents=len(c), tokens=len(c.tokens), bytes=int(c.raw_bytes.sum()))
                out.append({"part": part, "source": name, **size})
        return out

    def described(self, data: config.Data) -> list[str]:
        """Returns the same as lines of text, which say what the part's rows are for."""
        lines = []
        for values in self.sizes(data):
            sizes = ", ".join(f"{n:,} {name}" for name, n in values.items() if isinstance(n, int))
            lines.append(f"{values['part']:12} {values['source']}: {sizes}{ROLES[values['part']]}")
        return lines


def corpus(data: config.Data, objective: BoundObjective, parts: Collection[Part] = PARTS) -> Corpus:
    """Tokenises what isn't yet, and opens it by memory map. Only `parts` are read; the others stay empty."""
    share = 0.0 if data.valid else data.holdout
    if "valid" in parts and not data.valid and not share:
        raise ValueError("data.holdout: 0 leaves nothing to validate on; set it above 0 or name data.valid")
    if "train" in parts and data.weights and (len(data.weights) != len(data.train) or not any(data.weights)):
        raise ValueError(
            f"data.weights: {data.weights} is not a weight for each of {len(data.train)} training sources; give as "
            "many numbers, not all of them 0"
        )
    records = objective.records
    if isinstance(records, ExampleReader):
        return _read_examples(data, objective, records, parts)

    @functools.cache  # the files of a source are looked through once for both of its parts
    def prepared(source: str, holdout: float) -> dict[str, Path]:
        return caches.prepare(
            source,
            objective.tokenizer,
            data.cache,
            field=text_field(objective.settings, data.text_field),
            holdout=holdout,
            workers=data.tokenize_workers,
            progress=jax.process_index() == 0,
        )

    def opened(sources: Sequence[str], holdout: float = 0.0, part: str = "train") -> list[tuple[str, caches.Cache]]:
        return [(source, caches.open_cache(prepared(source, holdout)[part])) for source in sources]

    found: dict[Part, list[tuple[str, caches.Cache]]] = {part: [] for part in PARTS}
    if "train" in parts:
        found["train"] = opened(data.train, share)
    if "valid" in parts:
        found["valid"] = opened(data.valid) if data.valid else opened(data.train, share, "valid")
    if "test" in parts:
        found["test"] = opened(data.test)
    made = {part: [cache for _, cache in several] for part, several in found.items()}
    if jax.process_index() == 0:
        for several in found.values():
            for source, cache in several:
                for note in cache.notes:
                    print(note)
                if isinstance(records, TextPairs):
                    _warn_of_cuts(objective, records, source, cache)
        for seen, held in OVERLAPS:
            _warn_of_equal_documents(made[seen], made[held], seen, held)
    return Corpus(made["train"], list(data.weights), made["valid"], made["test"])


def _read_examples(
    data: config.Data, objective: BoundObjective, reader: ExampleReader, parts: Collection[Part]
) -> Corpus:
    """Reads sources by the objective's reader, and holds examples out for validation where no source is for it."""

    def read(source: str) -> list[Any]:
        records, notes = reader.read(objective.settings, source, objective.row, objective.tokenizer)
        for note in notes if jax.process_index() == 0 else ():
            print(note)
        return records

    holds_out = "valid" in parts and not data.valid
    train = [read(source) for source in data.train] if "train" in parts or holds_out else []
    valid = [read(source) for source in data.valid] if "valid" in parts else []
    test = [read(source) for source in data.test] if "test" in parts else []
    if holds_out:
        for i, records in enumerate(train):
            # What comes from one place of a file, such as the windows of a long text, stays together.
            groups = [record["where"] or j for j, record in enumerate(records)]
            names = list(dict.fromkeys(groups))
            n = max(1, round(data.holdout * len(names)))
            if n == len(names):
                raise ValueError(f"data.train: {data.train[i]} has too few examples to hold some out for validation")
            held_out = {names[j] for j in np.random.default_rng(0).permutation(len(names))[:n]}
            valid.append([record for record, group in zip(records, groups, strict=True) if group in held_out])
            train[i] = [record for record, group in zip(records, groups, strict=True) if group not in held_out]
    made: dict[Part, list[Any]] = {"train": train if "train" in parts else [], "valid": valid, "test": test}
    if jax.process_index() == 0:
        keys = {name: [(tuple(ids), record["where"]) for part in several for record in part
                       for ids in reader.texts(record)] for name, several in made.items()}  # fmt: skip
        for seen, held in OVERLAPS:
            _warn_of_leaks(keys[seen], keys[held], seen, held)
    return Corpus(made["train"], list(data.weights), valid, test)


def _warn_of_cuts(objective: BoundObjective, pairs: TextPairs, source: str, part: caches.Cache) -> None:
    """Says how many texts of a source are too long and lose their end."""
    lengths, fitting, _, _ = objective.fit(pairs, part)
    cut = (fitting < lengths).sum(0)
    if cut.any():
        print(f"{source}: of {len(lengths):,} pairs {cut[0]:,} sources and {cut[1]:,} targets lose their end; "
              f"raise train.seq_len to keep it")  # fmt: skip


OVERLAPS: tuple[tuple[Part, Part], ...] = (("train", "valid"), ("train", "test"), ("valid", "test"))
"""What must not share an example: the part that was seen first, and the part whose scores would tell nothing."""


def _warn_of_equal_documents(
    train: Sequence[caches.Cache], valid: Sequence[caches.Cache], seen_in: Part, held_in: Part
) -> None:
    """Says how many documents, or pairs, of the part `held_in` are in the part `seen_in` too. Of the latter only those
    are read that are as long as one of the former."""
    if not train or not valid:
        return

    def digest(c: caches.Cache, i: int) -> bytes:
        return hashlib.blake2b(c.document(i).tobytes(), digest_size=16).digest()

    held = [digest(c, i) for c in valid for i in range(len(c))]
    lengths = np.unique(np.concatenate([np.diff(c.offsets) for c in valid]))
    wanted, seen = set(held), set()
    for c in train:
        for i in np.flatnonzero(np.isin(np.diff(c.offsets), lengths)).tolist():
            if (key := digest(c, i)) in wanted:
                seen.add(key)
    _warn_of_leaks([(key, "") for key in seen], [(key, "") for key in held], seen_in, held_in)


def _warn_of_leaks(
    train: Sequence[tuple[Any, str]], valid: Sequence[tuple[Any, str]], seen_in: Part, held_in: Part
) -> None:
    """Says how many examples of the part `held_in` were seen in the part `seen_in`, so that their scores tell nothing.

    Each example is a key that tells it from others, and its file and line or nothing.
    """
    seen = dict(train)
    if both := [(key, where) for key, where in valid if key in seen]:
        key, where = both[0]
        first = f" (first: {where} is {seen[key]})" if where else ""
        print(f"{len(both):,} of {len(valid):,} {NAMES[held_in]} examples stand in the {NAMES[seen_in]} data "
              f"too{first}; scores on them tell nothing: remove them from one of the two")  # fmt: skip


def as_records(objective: BoundObjective, part: Any, *, document_mask: bool, seed: int) -> packing.Records:
    """Returns a part of a corpus as records that the objective makes examples of."""
    match objective.records:
        case ExampleReader():
            return part
        case TextPairs() as pairs:
            lengths, _, takes, rooms = objective.fit(pairs, part)
            pack = objective.row.shared and pairs.packs(objective.settings)
            return packing.texts(part, lengths, takes, rooms, pack=pack)
        case "pairs":
            return packing.pairs(part, objective.window_length, seed)
        case "packed":
            return packing.packed(part, objective.window_length, document_mask=document_mask)


def training_loader(
    run: config.Run, objective: BoundObjective, data: Corpus, rows: list[int] | None, replayed: Replayed | None = None,
    example: loader.ToExample | None = None,
) -> loader.Loader:  # fmt: skip
    """Returns the loader of a run's training batches, of which this process makes `rows` (None: all). Rows of earlier
    tasks, `replayed`, stand in the place of some. `example` makes rows in the objective's place."""
    parts = [as_records(objective, part, document_mask=run.data.document_mask, seed=run.seed) for part in data.train]
    return loader.Loader(
        parts,
        data.weights or [float(len(part)) for part in parts],
        objective.example if example is None else example,
        batch_size=run.train.batch_size - (0 if replayed is None else replayed.rows_per_batch),
        micro_batches=run.train.micro_batches,
        seed=run.seed,
        rows=rows,
        workers=run.data.workers,
        added=replayed,
    )


def validation_batches(p: Program, data: Corpus, limit: int = 0) -> Iterator[DeviceBatch]:
    """Yields every validation record once, in order, on the devices; `limit` batches of each source if not 0."""
    return batches_of(p, data.valid, limit)


def batches_of(p: Program, several: Sequence[Any], limit: int = 0) -> Iterator[DeviceBatch]:
    """Yields every record of the sources of a part once, in order, on the devices; `limit` batches of each source if
    not 0. The last batch of a source is filled up."""
    for part in several:
        yield from _batches(p, part, limit)


def batches_by_source(p: Program, data: Corpus) -> Iterator[Iterator[DeviceBatch]]:
    """Yields the batches of each source, those of training first, then of validation, then of the test."""
    for source in [*data.train, *data.valid, *data.test]:
        yield _batches(p, source)


def _batches(p: Program, part: Any, limit: int = 0) -> Iterator[DeviceBatch]:
    size = p.run.train.batch_size // p.run.train.micro_batches
    rows = p.rows(size)
    for batch in loader.evaluation_batches(
        as_records(p.objective, part, document_mask=p.run.data.document_mask, seed=p.run.seed),
        p.objective.example,
        batch_size=size,
        rows=rows,
        limit=limit * size if limit else None,
    ):
        yield p.to_device(batch, rows)
