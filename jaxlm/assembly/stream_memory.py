"""Makes the run that learns all stages of a stream at once, which a stream's results are compared with."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np

from jaxlm.assembly import corpus, open_model, remember, run_objective, run_source
from jaxlm.assembly.model_source import StartModel
from jaxlm.assembly.task_index import FOLDER, INDEX, Task
from jaxlm.core import config
from jaxlm.core.continual import Continual, Replay
from jaxlm.data import loader, replay


def write_joint(runs: list[config.Run], folder: Path) -> config.Run:
    """Returns the run that trains on the data of all stages for as many steps as they have together.

    Stages of one objective are one mixture of data, in proportion to their steps. Of others the last one is the run's
    own, and examples of the others, as many as their steps see, are written as rows of earlier tasks into its
    directory, which stand in each batch in that proportion.
    """
    steps = [run.train.steps for run in runs]
    last = dataclasses.replace(
        runs[-1], name="joint", out=str(folder), start=runs[0].start, continual=Continual(heads=True),
        train=dataclasses.replace(runs[-1].train, steps=sum(steps)),
        optim=dataclasses.replace(runs[-1].optim, moments=runs[0].optim.moments),
    )  # fmt: skip
    last = run_source.growing(last, StartModel(last.start))
    if all(run.objective == runs[0].objective for run in runs):
        sources = [(s, n / len(run.data.train)) for run, n in zip(runs, steps, strict=True) for s in run.data.train]
        valid = tuple(source for run in runs for source in run.data.valid)
        data = dataclasses.replace(
            last.data, train=tuple(s for s, _ in sources), weights=tuple(w for _, w in sources),
            valid=valid if all(run.data.valid for run in runs) else (),
        )  # fmt: skip
        return dataclasses.replace(last, data=data)
    share = 1 - steps[-1] / sum(steps)
    run = dataclasses.replace(last, continual=Continual(("replay",), replay=Replay(share=share, examples=0, tokens=1)))
    if not (run.folder / FOLDER / INDEX).is_file():
        _write_rows(runs[:-1], run)
    return run


def _write_rows(runs: list[config.Run], joint: config.Run) -> None:
    part, start = joint.folder / f"{FOLDER}.part", StartModel(joint.start)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tasks = []
    for i, run in enumerate(runs):
        tokens, template = open_model.load_tokenizer(run, start), open_model.template_of(run, start)
        objective = run_objective.bind_run(run, tokens, template)
        data = corpus.corpus(run.data, objective, ["train"])
        records = [
            corpus.as_records(objective, p, document_mask=run.data.document_mask, seed=run.seed) for p in data.train
        ]
        chosen = replay.Chosen.first(records, run.seed, run.name, run.train.steps * run.train.batch_size)
        [rows] = loader.evaluation_batches(chosen, objective.example, batch_size=len(chosen))
        arrays = {name: leaf[0] for name, leaf in rows.items()}
        np.savez(part / remember.ROWS.format(i), priorities=np.arange(len(chosen), dtype=float), **arrays)
        has_head = bool(objective.specs(run.model.width))
        tasks.append(Task(run.name, run.objective, run.train.seq_len, template, run.data.train, has_head))
    (part / INDEX).write_text(json.dumps({"tasks": [task.to_dict() for task in tasks], "trained": []}) + "\n", "utf-8")
    part.rename(joint.folder / FOLDER)
