"""Lets the student write the texts of some updates itself, which it then learns from the teacher on: generalised
knowledge distillation (Agarwal et al. 2024).

Which updates these are depends on the seed and the number of the update alone, and what is written on these and the
weights, so a run that goes on writes what it would have written.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxlm.assembly.distillation import SAMPLED
from jaxlm.assembly.program import Program
from jaxlm.data.loader import Arrays, Loader
from jaxlm.inference.generate import Completion, Generator
from jaxlm.inference.sampling import Sampling
from jaxlm.objectives.objective import Asked, DeviceBatch, Written

Update = Callable[[Any, DeviceBatch], tuple[Any, dict[str, Any]]]


def drawn(seed: int, step: int, share: float) -> bool:
    """Returns whether the student writes the rows of an update."""
    digest = hashlib.blake2b(f"{seed} on-policy {step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < share


def updates(p: Program, loader: Loader, rows: list[int] | None, update: Update, start: int) -> Update:
    """Returns the update, `(state, batch) → (state, metrics)`, that puts rows of the student in the place of the
    batch's where they are drawn. `start`: the updates that were made before. The update as it is, where none are."""
    if p.teacher is None or not (share := p.teacher.c.on_policy.share):
        return update
    writer, done = Writer(p, loader, rows), [start]

    def one(state: Any, batch: DeviceBatch) -> tuple[Any, dict[str, Any]]:
        step = done[0]
        done[0] += 1
        if drawn(p.run.seed, step, share):
            batch = p.to_device(writer(state.all_params, step), rows)
        return update(state, batch)

    return one


class Writer:
    """A Writer makes the batch of an update of what the model answers to its prompts."""

    def __init__(self, p: Program, loader: Loader, rows: list[int] | None) -> None:
        self.p, self.loader = p, loader
        self.mine = loader.rows if rows is None else rows
        o = p.objective
        self.generate = Generator(p.model, o.end_ids, o.vocab_size, o.prompts_read_both_ways)

    def __call__(self, weights: Any, step: int) -> Arrays:
        """Returns the batch of update `step`, leaves `[micro, rows, …]`: every process writes all rows, and keeps its
        own."""
        c, train = self.p.run.distill.on_policy, self.p.run.train
        numbers = range(step * train.batch_size, (step + 1) * train.batch_size)
        found = [self.loader.record(i) for i in numbers]
        asked = [self._asked(record) for record, _ in found]
        flat = [one for several in asked for one in several]
        seed = int.from_bytes(hashlib.blake2b(f"{self.p.run.seed} writes {step}".encode(), digest_size=4).digest())
        how = Sampling(tokens=c.tokens, temperature=c.temperature, seed=seed)
        inputs = [one.inputs for one in flat]
        found_answers: list[list[Completion]] = []
        if flat:
            source = None if inputs[0] is None else [x or [] for x in inputs]
            found_answers = self.generate(weights, [one.prompt for one in flat], how, source)
        answers = iter(found_answers)
        made = []
        for (record, rng), several in zip(found, asked, strict=True):
            texts: list[Written] = []
            for one in several:
                [answer] = next(answers)
                ids = [*answer.tokens, *(one.end if answer.reason == "stop" else ())]
                texts += [Written(one, ids)] if ids else []
            made.append(self._row(record, texts, rng))
        per_micro = train.batch_size // train.micro_batches
        at = [m * per_micro + row for m in range(train.micro_batches) for row in self.mine]
        shape = train.micro_batches, len(self.mine)
        stacked = {name: np.stack([made[i][name] for i in at]) for name in made[0]}
        batch = {name: leaf.reshape(*shape, *leaf.shape[1:]) for name, leaf in stacked.items()}
        return batch | {SAMPLED: np.ones(shape, np.float32)}

    def _asked(self, record: Any) -> list[Asked]:
        """Returns what the model is asked in a record, where an answer has room: of plain text its beginning."""
        o, c = self.p.objective, self.p.run.distill.on_policy
        assert o.writes is not None
        room = self._room()
        if o.writes.asked is not None:
            return [one for one in o.writes.asked(o.settings, record, o.row, self.p.tokens) if len(one.prompt) < room]
        tokens, segments = record["tokens"], record["segments"]
        end = max(1, min(int((segments > 0).sum()), room - c.tokens))
        first = int(np.argmax(segments == segments[end - 1]))
        return [Asked(tokens[first:end].tolist(), None, (self.p.tokens.eos_id,))]

    def _room(self) -> int:
        o = self.p.objective
        room = o.target_positions if o.row.kind == "encoder_decoder" else o.row.seq_len + 1
        return min(room, self.p.run.model.positions or room)

    def _row(self, record: Any, texts: list[Written], rng: np.random.Generator) -> Any:
        """Returns the row of the texts that fit one, cut to its length; of the record where there are none."""
        o, room, used = self.p.objective, self._room(), 0
        assert o.writes is not None
        kept: list[Written] = []
        for text in texts:
            left = room - used - len(text.asked.prompt)
            if left < 1 or (kept and not o.writes.packs(o.settings, o.row.kind)):
                break
            kept.append(Written(text.asked, text.answer[:left]))
            used += len(text.asked.prompt) + len(kept[-1].answer)
        return o.example(o.writes.record(o.settings, kept, o.row, self.p.tokens) if kept else record, rng)
