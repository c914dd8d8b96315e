"""Use of a trained run: its config and weights alone, on whatever devices are here."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxlm import assemble, config, params, sharding
from jaxlm.checkpoint import Checkpoints
from jaxlm.eval import perplexity
from jaxlm.generate import Generator
from jaxlm.sampling import Sampling
from jaxlm.train import read_config


def open_run(folder: Path, step: int | None = None, data: Sequence[str] | None = None) -> tuple[assemble.Program, Any]:
    """(program, weights): the averaged weights where the run keeps an average.

    The mesh is this machine's, every device with whole weights and its share of the batch, whatever it was in training.
    """
    run = read_config(folder)
    run = dataclasses.replace(run, name=folder.resolve().name, out=str(folder.parent), mesh=config.Mesh())
    rows, n = run.train.batch_size // run.train.micro_batches, jax.device_count()  # rows that divide over devices here
    train = dataclasses.replace(run.train, batch_size=-(-rows // n) * n, micro_batches=1)
    run = dataclasses.replace(run, train=train)
    if data:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, valid=tuple(data)))
    p = assemble.program(run, assemble.load_tokenizer(run))
    with Checkpoints(folder / "checkpoints") as checkpoints, sharding.on_mesh(p.mesh):
        if checkpoints.latest() is None:
            raise ValueError(f"{folder}: no checkpoint yet; train it with: jaxlm train {folder}")
        homes = p.layout.shardings(p.specs, p.mesh)
        item = "ema" if run.optim.ema else "params"
        return p, checkpoints.restore_params(params.abstract(p.specs, homes), step, item=item)


def evaluate(folder: Path, *, data: Sequence[str] | None, step: int | None, batches: int) -> dict[str, float]:
    p, weights = open_run(folder, step, data)
    corpus = assemble.corpus(p.run, p.tokens)
    with sharding.on_mesh(p.mesh):
        eval_step = perplexity.make_eval_step(p.loss, p.objective.weights, p.tokens.bytes_per_token)
        return perplexity.evaluate(eval_step, weights, assemble.validation_batches(p, corpus, batches))


def generate(folder: Path, prompts: Sequence[str], sampling: Sampling, step: int | None = None) -> list[str]:
    """The new text of each prompt."""
    p, weights = open_run(folder, step)
    run = Generator(p.model, [p.tokens.eos_id])
    ids = [[p.tokens.bos_id, *p.tokens.encode(text)] for text in prompts]
    with sharding.on_mesh(p.mesh):
        return [p.tokens.decode(answer.tokens) for [answer] in run(weights, ids, sampling)]
