"""Fills the store of a teacher's predictions with all rows that a run trains on, before it trains."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.assembly import corpus, teacher
from jaxlm.assembly.program import HOURS, Program
from jaxlm.core import config_io, registry
from jaxlm.data import loader
from jaxlm.data.teacher_logits import Store, WithTeacher, key
from jaxlm.objectives import distill, outputs
from jaxlm.runtime import processes


def example(p: Program, data: corpus.Corpus, begins: bool) -> loader.ToExample | None:
    """Returns what makes a run's examples with the teacher's predictions of them, once all of these are stored; None:
    the teacher reads each batch itself, or there is none."""
    if p.teacher is None or p.teacher.reads_each_batch:
        return None
    weights = teacher.read(p)
    found = teacher.fingerprint(weights)
    teacher.know(p, found, begins)
    return WithTeacher(p.objective.example, _filled(p, data, weights, found))


def _predicted(p: Program, weights: Any, batch: Any) -> outputs.Stored:
    """Returns what is stored of each row of a batch `[1, rows, …]`."""
    t = p.teacher
    assert t is not None
    predictions = t.predictions(t.model, weights, jax.tree.map(lambda x: x[0], batch))
    how = distill.measure(t.c.logits, t.used)
    z = predictions.logits
    classes = z.shape[-1] if isinstance(z, jax.Array) else z.w_VD.shape[0]
    return outputs.stored(predictions, t.c.logits.top_k or classes, t.model.shard, how)


def _filled(p: Program, data: corpus.Corpus, weights: Any, found: str) -> Store:
    """Returns the store with every row of the run's training. What is there already stays."""
    t = p.teacher
    assert t is not None
    c = p.run.train
    every = corpus.training_loader(p.run, p.objective, data, None)
    compute = jax.jit(partial(_predicted, p), out_shardings=p.whole)
    size = c.batch_size // c.micro_batches
    rows = p.rows(size)

    def placed(examples: list[Any]) -> Any:
        batch = {name: np.stack([one[name] for one in examples])[None] for name in examples[0]}
        mine = batch if rows is None else {name: leaf[:, rows] for name, leaf in batch.items()}
        return loader.to_device(mine, p.batch_shardings(mine), rows)

    first = placed([every.example(0)] * size)
    _, places, kept = jax.eval_shape(compute, weights, first).values_BNK.shape
    settings = config_io.flatten(t.objective) if t.objective is not None else {}
    read_by = hashlib.blake2b(f"{registry.name_of(t.objective)} {settings} {t.order} {t.used}".encode(), digest_size=8)
    about = dict(
        teacher=found, objective=read_by.hexdigest(), temperature=t.c.logits.temperature, places=places, kept=kept
    )
    folder, main = Path(t.c.cache).expanduser(), jax.process_index() == 0
    if main:
        Store.opened(folder, about).repaired()
    processes.barrier("the teacher's logits", HOURS)
    store = Store.opened(folder, about)
    known, pending = set(store.index), dict[bytes, Any]()
    total, before = c.steps * c.batch_size, len(known)

    def write() -> None:
        examples = [*pending.values()]
        made = jax.device_get(compute(weights, placed(examples + examples[-1:] * (size - len(examples)))))
        if main:
            store.append([*pending], [leaf[: len(pending)] for leaf in made])
        known.update(pending)
        pending.clear()

    for i in range(total):
        one = every.example(i)
        if (name := key(one)) not in known:
            pending[name] = one
        if len(pending) == size:
            write()
            if main and (len(known) - before) % (50 * size) == 0:
                print(f"teacher      {len(known):,} rows have their logits, of at most {total:,}", flush=True)
    if pending:
        write()
    processes.barrier("the teacher's last logits", HOURS)
    if main:
        print(f"teacher      {len(known) - before:,} rows were computed, {before:,} were there: {folder}")
    return Store(folder, places, kept)
