"""Says what a run with a parameter server must be like, what its workers must agree in, and what a worker's own run
is."""

import dataclasses
import hashlib
import json
import re
from importlib import metadata
from typing import Any

from jaxlm.assembly import run_directory
from jaxlm.assembly.program import Program
from jaxlm.core import config, config_io, registry, spec, tree
from jaxlm.objectives import OBJECTIVES

OWN = (
    *run_directory.MAY_CHANGE, "distributed.server.", "train.eval_", "train.sample_", "train.metric", "data.test",
    "data.compare_compression",
)  # fmt: skip
"""Fields that each worker has for itself: nothing that changes what is learned."""
WORKERS = "workers"
"""The folder of a run that holds the run directories of its workers."""


def check(run: config.Run) -> None:
    """Refuses a run that can't be trained by workers and a server. ValueError: it names the field and the remedy."""
    config_io.check(run)
    d, t = run.distributed, run.train
    if d.method != "server":
        raise ValueError(f"distributed.method: is {d.method}; set it to server for workers that are jobs of their own")
    if d.workers is None:
        raise ValueError("distributed.workers: say into how many shards the data is dealt, one for each worker")
    rows = t.batch_size // t.micro_batches
    if rows % d.workers:
        raise ValueError(
            f"distributed.workers: {d.workers} do not divide the {rows} rows of train.batch_size over "
            f"train.micro_batches; change one of them"
        )
    outer = d.outer
    if outer.name == "delayed_nesterov" and d.server.mode != "sync" and outer.delay < d.workers:
        raise ValueError(f"distributed.outer.delay: {outer.delay} is less than the {d.workers} workers; raise it")
    if d.weigh == "tokens" and d.server.mode != "sync":
        raise ValueError(
            f"distributed.weigh: tokens weigh the pushes of a round, and in mode {d.server.mode} each moves the "
            "weights by itself; set it to equal, or distributed.server.mode to sync"
        )
    objective = registry.name_of(run.objective)
    refused = {
        "distributed.fragments": (d.fragments != 1, "1"), "distributed.overlap": (d.overlap, "0"),
        "distributed.mix": (d.mix, "0"), "optim.ema": (run.optim.ema, "0"), "train.patience": (t.patience, "0"),
        "train.use": (t.use != "last", "last"), "continual.methods": (run.continual.methods, "()"),
        "optim.moments": (run.optim.moments != "fresh", "fresh"), "distill.teacher": (run.distill.teacher, "''"),
        f"objective: {objective}": (OBJECTIVES.of(run.objective).reference is not None, "another one"),
    }  # fmt: skip
    for name, (given, remedy) in refused.items():
        if given:
            raise ValueError(f"{name}: is not for workers with a server; set it to {remedy}")


def check_name(name: str) -> str:
    """Returns the name of a worker, which is that of its folder. ValueError: it can't be one."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"worker: {name!r} is no name of a folder; give letters, digits, - and _")
    return name


def of(run: config.Run, p: Program) -> dict[str, Any]:
    """Returns what a worker and the server must agree in, by name: what the run of all computes, and on which weights,
    which are those of the program."""
    fields = {name: v for name, v in config_io.flatten(run).items() if not name.startswith(OWN)}
    shapes = [(path, s.shape, str(s.dtype)) for path, s in tree.flatten(p.specs, spec.is_spec).items()]
    plain = json.loads(json.dumps(fields, default=str))
    digest = hashlib.sha256(json.dumps(shapes, default=str).encode()).hexdigest()[:16]
    return plain | {"the weights": digest, "the tokenizer": p.tokens.fingerprint, "jaxlm": metadata.version("jaxlm")}


def worker_run(run: config.Run, name: str) -> config.Run:
    """Returns the run of one worker: its own directory, and its share of every batch."""
    assert run.distributed.workers is not None
    train = dataclasses.replace(
        run.train, batch_size=run.train.batch_size // run.distributed.workers, eval_every=0, sample_every=0, prompts=()
    )
    return dataclasses.replace(run, name=name, out=str(run.folder / WORKERS), train=train)
