"""Rows of an earlier task that the model writes itself, before it learns the new, so that the old data aren't needed.

A language model writes whole texts from their beginning; where texts answer others, the new data ask, and the model
answers as it did before. It is Robins' pseudo-rehearsal (1995), by a language model as in Sun et al. (LAMOL, 2020).
"""

import hashlib
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np

from jaxlm.assembly import corpus
from jaxlm.assembly.program import Program
from jaxlm.data import replay
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling
from jaxlm.objectives.objective import Asked, Example, Written

TEXTS = 64  # that are written at once


def rows(p: Program, weights: Any, i: int) -> replay.Kept:
    """Returns rows of earlier task `i` that the model with these weights writes: as many as the memory could hold were
    they alone in it. They depend on the seed and the task alone, and those of a smaller memory are among those of a
    larger one. ValueError: it writes not a single one."""
    c, task, objective = p.run.continual.replay, p.earlier.tasks[i], p.earlier.objectives[i]
    own = objective.writes
    assert own is not None
    made: list[Example] = []
    tokens = 0
    for texts in _in_rows(p, _texts(p, weights, i), i):
        record = own.record(objective.settings, texts, objective.row, p.tokens)
        if objective.records == "packed" and not p.run.data.document_mask:
            real = record["segments"] > 0
            record |= {"segments": real.astype(np.int32), "positions": np.arange(len(real), dtype=np.int32) * real}
        made.append(objective.example(record, np.random.default_rng(len(made))))
        tokens += sum(int(np.count_nonzero(made[-1].get(name, 0))) for name in ("segments", "source_segments"))
        if (c.examples and len(made) == c.examples) or (c.tokens and tokens >= c.tokens):
            break
    if not made:
        raise ValueError(
            f"continual.replay.source: the new data ask nothing that {task.name} could answer; set it to data"
        )
    arrays: replay.Arrays = {name: np.stack([np.asarray(row[name]) for row in made]) for name in made[0]}  # type: ignore[literal-required]
    return replay.Kept(task.name, arrays, np.sort(replay.priorities(p.run.seed, task.name, len(made))))


def _texts(p: Program, weights: Any, i: int) -> Iterator[Written]:
    """Yields what the model writes, without an end where nothing is asked."""
    c, task, objective = p.run.continual.replay, p.earlier.tasks[i], p.earlier.objectives[i]
    generate = Generator(p.model, objective.end_ids, objective.vocab_size, objective.prompts_read_both_ways)
    ready, length = generate.prepare(p.earlier.weights_for(weights, task)), _room(p, i)
    for block, asked in enumerate(_asked(p, i)):
        seed = int.from_bytes(hashlib.blake2b(f"{p.run.seed} {task.name} {block}".encode(), digest_size=4).digest())
        how = Sampling(tokens=length, length=length, temperature=c.temperature, seed=seed)
        inputs = [one.inputs for one in asked]
        found = generate(
            ready, [one.prompt for one in asked], how, None if inputs[0] is None else [x or [] for x in inputs]
        )
        for one, [answer] in zip(asked, found, strict=True):
            ids = [*answer.tokens, *(one.end if answer.reason == "stop" else ())]
            if ids:
                yield Written(one, ids[: length - len(one.prompt)])


def _room(p: Program, i: int) -> int:
    """Returns how many tokens a text has at most, its prompt included."""
    objective = p.earlier.objectives[i]
    if objective.row.kind == "encoder_decoder":
        room = objective.target_positions
    else:
        room = objective.row.seq_len + 1  # inputs and targets are a window's tokens but the last, and but the first
    return min(room, p.run.model.positions or room)


def _asked(p: Program, i: int) -> Iterator[list[Asked]]:
    """Yields what the model is asked, in blocks of one size but for the last."""
    objective, task = p.earlier.objectives[i], p.earlier.tasks[i]
    assert objective.writes is not None
    asked = objective.writes.asked
    if asked is None:
        start = Asked([p.tokens.bos_id], None, (p.tokens.eos_id,))
        yield from ([start] * TEXTS for _ in count())
        return
    data = p.run.data
    parts = [corpus.as_records(objective, part, document_mask=data.document_mask, seed=p.run.seed)
             for part in corpus.corpus(data, objective, ["train"]).train]  # fmt: skip
    records = replay.Chosen.first(parts, p.run.seed, f"{task.name}:asked", sum(map(len, parts)))
    block: list[Asked] = []
    for k in range(len(records)):
        block += asked(objective.settings, records[k], objective.row, p.tokens)
        while len(block) >= TEXTS:
            yield block[:TEXTS]
            block = block[TEXTS:]
    if block:
        yield block


def _in_rows(p: Program, texts: Iterator[Written], i: int) -> Iterator[list[Written]]:
    """Yields the texts of each row: neighbours, as many as fit, or one."""
    objective = p.earlier.objectives[i]
    assert objective.writes is not None
    room, packs = objective.row.seq_len + 1, objective.writes.packs(objective.settings, objective.row.kind)
    row: list[Written] = []
    used = 0
    for text in texts:
        size = len(text.asked.prompt) + len(text.answer)
        if row and (not packs or used + size > room):
            yield row
            row, used = [], 0
        row, used = [*row, text], used + size
    if row:
        yield row
