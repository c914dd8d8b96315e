"""The tokenised training and validation data of a run, and the batches made of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.assembly.program import Program
from jaxlm.assembly.run_objective import fit_texts, host_half, row_shape, text_field, window_length
from jaxlm.core import config
from jaxlm.data import loader, packing
from jaxlm.data import token_cache as caches
from jaxlm.objectives import OBJECTIVES


@dataclass(frozen=True)
class Corpus:
    """Tokenised training and validation data of a run: caches, or for objectives that read their sources themselves
    lists of records."""

    train: list[Any]
    weights: list[float]
    valid: list[Any]


def corpus(run: config.Run, tokens: Any, template: str | None = None) -> Corpus:
    """Tokenise what isn't yet, and open it by memory map. `template`: the model's own, of chats."""
    share = 0.0 if run.data.valid else run.data.holdout
    if not run.data.valid and not share:
        raise ValueError("data.holdout: 0 leaves nothing to validate on; set it above 0 or name data.valid")
    if OBJECTIVES.of(run.objective).records == "examples":
        return _examples(run, tokens, template)

    def prepared(source: str, holdout: float) -> dict[str, Path]:
        return caches.prepare(
            source,
            tokens,
            run.data.cache,
            field=text_field(run),
            holdout=holdout,
            workers=run.data.tokenize_workers,
            progress=jax.process_index() == 0,
        )

    parts = [prepared(source, share) for source in run.data.train]
    train = [caches.open_cache(p["train"]) for p in parts]
    valid_paths = [prepared(s, 0.0)["train"] for s in run.data.valid] or [p["valid"] for p in parts]
    valid = [caches.open_cache(p) for p in valid_paths]
    if OBJECTIVES.of(run.objective).records == "texts" and jax.process_index() == 0:
        for source, part in zip([*run.data.train, *(run.data.valid or run.data.train)], [*train, *valid], strict=True):
            _warn_of_cuts(run, tokens, source, part)
        _warn_of_leaks(train, valid)
    return Corpus(train, _weights(run, [len(c.tokens) for c in train]), valid)


def _weights(run: config.Run, sizes: Sequence[int]) -> list[float]:
    """Of the training sources in the mixture."""
    weights = list(run.data.weights) or [float(n) for n in sizes]
    if len(weights) != len(sizes):
        raise ValueError(f"data.weights: {len(weights)} weights for {len(sizes)} training sources")
    return weights


def _examples(run: config.Run, tokens: Any, template: str | None) -> Corpus:
    objective, row = OBJECTIVES.of(run.objective), row_shape(run) | {"template": template}

    def read(source: str) -> list[dict]:
        found, notes = objective.read(run.objective, source, tokens, row)
        for note in notes if jax.process_index() == 0 else ():
            print(note)
        return found

    train, valid = [read(source) for source in run.data.train], [read(source) for source in run.data.valid]
    if not valid:
        for i, items in enumerate(train):
            # What stands at one place of a file, such as the windows of a long text, stays together.
            of = [item.get("where", j) for j, item in enumerate(items)]
            places = list(dict.fromkeys(of))
            n = max(1, round(run.data.holdout * len(places)))
            if n == len(places):
                raise ValueError(
                    f"data.train: {run.data.train[i]} has too few examples to hold some out for validation"
                )
            held = {places[j] for j in np.random.default_rng(0).permutation(len(places))[:n]}
            valid.append([item for item, place in zip(items, of, strict=True) if place in held])
            train[i] = [item for item, place in zip(items, of, strict=True) if place not in held]
    if jax.process_index() == 0:
        _warn_of_leaks(train, valid)
    return Corpus(train, _weights(run, [len(items) for items in train]), valid)


def _warn_of_cuts(run: config.Run, tokens: Any, source: str, part: caches.Cache) -> None:
    """Texts that are too long lose their end."""
    lengths, kept, _, _ = fit_texts(run, tokens, part)
    cut = (kept < lengths).sum(0)
    if cut.any():
        print(f"{source}: of {len(lengths):,} pairs {cut[0]:,} sources and {cut[1]:,} targets lose their end; "
              f"raise train.seq_len to keep it")  # fmt: skip


def _warn_of_leaks(train: Sequence[Any], valid: Sequence[Any]) -> None:
    """Validation examples that are learned tell nothing."""
    seen = {key: where for part in train for key, where in _keys(part)}
    every = [found for part in valid for found in _keys(part)]
    if both := [(key, where) for key, where in every if key in seen]:
        key, where = both[0]
        first = f" (first: {where} is {seen[key]})" if where else ""
        print(f"{len(both):,} of {len(every):,} validation examples stand in the training data too{first}; scores on "
              "them tell nothing: remove them from one of the two")  # fmt: skip


def _keys(part: Any) -> Iterator[tuple[Any, str]]:
    """(what tells an example from others, where it stands or nothing) of a part of a corpus."""
    if isinstance(part, caches.Cache):
        yield from ((part.document(i).tobytes(), "") for i in range(len(part)))
        return
    for item in part:
        if "ids" in item:
            yield tuple(item["ids"]), item["where"]
        elif "texts" in item:
            yield from ((tuple(text[0]), "") for text in item["texts"])  # ids stand first


def records(run: config.Run, tokens: Any, part: Any) -> Any:
    """A part of a corpus as what the objective's host half takes."""
    objective = OBJECTIVES.of(run.objective)
    if objective.records == "examples":
        return part
    if objective.records == "pairs":
        return packing.pairs(part, window_length(run), run.seed)
    if objective.records == "packed":
        return packing.packed(part, window_length(run), document_mask=run.data.document_mask)
    lengths, _, takes, rooms = fit_texts(run, tokens, part)
    return packing.texts(part, lengths, takes, rooms, pack=run.objective.pack)


def predictions(p: Program, weights: Any, part: Any) -> list[np.ndarray]:
    """What the model says of each of a part's records, in their order; those of like length are read together."""
    order = sorted(range(len(part)), key=lambda i: len(part[i]["ids"]))
    given = [part[i] for i in order]
    size = p.run.train.batch_size // p.run.train.micro_batches
    rows, cut = p.rows(size), p.layout.ways("stream", p.mesh) == 1
    found: list[np.ndarray] = []
    for batch in loader.evaluation_batches(given, host_half(p.run, p.tokens), batch_size=size, rows=rows):
        batch = packing.trimmed(batch) if cut else batch
        placed = loader.to_device(batch, p.batch_shardings(batch), rows)
        found += list(jax.device_get(p.predict(weights, jax.tree.map(lambda x: x[0], placed))))
    there = dict(zip(order, found, strict=False))
    return [there[i] for i in range(len(part))]


def training_loader(run: config.Run, tokens: Any, data: Corpus, rows: list[int] | None) -> loader.Loader:
    return loader.Loader(
        [records(run, tokens, c) for c in data.train],
        data.weights,
        host_half(run, tokens),
        batch_size=run.train.batch_size,
        micro_batches=run.train.micro_batches,
        seed=run.seed,
        rows=rows,
        workers=run.data.workers,
    )


def validation_batches(p: Program, data: Corpus, limit: int = 0) -> Iterator[dict]:
    """On the devices: every validation record once, in order; `limit` batches of each source if not 0."""
    for part in data.valid:
        yield from _batches(p, part, limit)


def each_record(p: Program, data: Corpus) -> Iterator[Iterator[dict]]:
    """Of each part, training first: its records once, in order; the last batch is filled up."""
    for part in [*data.train, *data.valid]:
        yield _batches(p, part)


def _batches(p: Program, part: Any, limit: int = 0) -> Iterator[dict]:
    size = p.run.train.batch_size // p.run.train.micro_batches
    rows = p.rows(size)
    for batch in loader.evaluation_batches(
        records(p.run, p.tokens, part),
        host_half(p.run, p.tokens),
        batch_size=size,
        rows=rows,
        limit=limit * size if limit else None,
    ):
        yield p.to_device(batch, rows)
