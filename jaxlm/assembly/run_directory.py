"""A run directory holds the configuration, the tokenizer and checkpoints."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxlm.assembly.run_objective import text_field
from jaxlm.core import config, config_io, tree
from jaxlm.core.paths import local
from jaxlm.data import token_cache as caches
from jaxlm.data import tokenizer
from jaxlm.data import train_tokenizer as vocabularies
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.models import MODELS
from jaxlm.objectives import OBJECTIVES
from jaxlm.runtime import processes
from jaxlm.training import optimizers, step
from jaxlm.training.distributed import replicas
from jaxlm.training.log import read_lines
from jaxlm.weights.adapters import METHODS, adapted
from jaxlm.weights.adapters.old_settings import upgraded

BASE = "base"  # folder of a run: the weights that its adapter rests on


FORMER: dict[str, dict[str, Any]] = {
    "next_sentence": {"next_label": 1},
    "classify": {"bias": True, "bos": True},
    "tag": {"bos": True},
    "choice": {"bias": False},
}
"""Fields of objectives that did not always exist, with what held in runs whose `config.json` lacks them."""
RENAMED: dict[str, dict[str, str]] = {
    "execution": {"fp8_skip_first": "matmul_skip_first", "fp8_skip_last": "matmul_skip_last"},
}
"""Fields by their former names, part by part of a run."""


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a `config.json` in which every field of a part of the run has its present name."""
    parts = {
        part: {names.get(key, key): value for key, value in values[part].items()}
        for part, names in RENAMED.items() if isinstance(values.get(part), dict)
    }  # fmt: skip
    return values | parts


def _with_former(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a `config.json` in which the objective states what it was before there was a choice."""
    objective = values.get("objective")
    if not isinstance(objective, dict):
        return values
    return values | {"objective": {**FORMER.get(str(objective.get("family")), {}), **objective}}


def read_config(folder: Path) -> config.Run:
    """Reads the configuration of a run directory."""
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder}: not a run directory (it has no config.json)")
    return read_config_file(file)


def read_config_file(file: Path) -> config.Run:
    """Reads a run's configuration as `config.json` holds it."""
    if not file.is_file():
        raise ValueError(f"no file {file}")
    try:
        values = json.loads(file.read_text("utf-8"))
    except ValueError as e:
        raise ValueError(f"{file}: not JSON ({e}); restore it, or delete the run directory") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: holds no configuration of a run, as its config.json does")
    return config_io.from_dict(_with_former(_renamed(upgraded(values))), MODELS, OBJECTIVES, METHODS)


def load_tokenizer(run: config.Run, say: Callable[[str], None] = print) -> Any:
    """Loads the run's own copy, else what `data.tokenizer` names, trained on the training text if it must be."""
    folder = run.folder / "tokenizer"
    if folder.is_dir():
        return tokenizer.load(str(folder))
    kind, _, size = run.data.tokenizer.partition(":")
    if kind != "sentencepiece" or not size:
        return tokenizer.load(run.data.tokenizer)
    try:
        vocab = int(size)
    except ValueError:
        raise ValueError(f"data.tokenizer: {size!r} in {run.data.tokenizer!r} is not a vocabulary size") from None
    share = 0.0 if run.data.valid else run.data.holdout
    field = text_field(run.objective, run.data.text_field)
    stamp = [(s.name, s.stamp) for source in run.data.train for s in caches.sources.shards(source, field=field)]
    name = hashlib.sha256(
        repr((run.data.train, field, share, vocab, stamp, vocabularies.TRAINER)).encode()
    ).hexdigest()[:16]
    path = Path(run.data.cache).expanduser() / "tokenizers" / f"{name}.model"
    if not path.exists() and jax.process_index() == 0:
        say(f"training a SentencePiece tokenizer of {vocab} pieces on {', '.join(run.data.train)} …")
        started = time.perf_counter()
        texts = (
            text for source in run.data.train for text in caches.texts(source, field=field, holdout=share, part="train")
        )
        vocabularies.train_sentencepiece(texts, path, vocab_size=vocab, name=", ".join(run.data.train))
        say(f"tokenizer: {path} ({time.perf_counter() - started:.0f} s)")
    processes.barrier("the tokenizer", 6 * 3600)
    if not path.exists():
        raise ValueError(f"data.cache: process 0 has {path}, and this host hasn't; name a folder that all hosts share")
    return tokenizer.load(str(path))


def saved(state: step.State, adapter: adapted.Adapted) -> dict[str, Any]:
    """Returns what a checkpoint holds: whole weights whatever is frozen, so that it opens without the run's
    configuration; but not a base that adapters rest on, which the run keeps once (`BASE`)."""
    kept, _ = tree.partition(state.all_params, lambda path: not adapter.in_frozen_base(path))
    more = {} if state.tracks is None else {"tracks": state.tracks}
    if state.outer is not None:
        outer = {name: getattr(state.outer, name) for name in ("opt", "error", "learned")}
        more |= {"workers": state.params, "outer": {name: value for name, value in outer.items() if value is not None}}
    return dict(step=state.step, params=kept, opt=state.opt, ema=state.ema) | more


def frozen_base(adapter: adapted.Adapted, weights: Any) -> Any:
    """Returns the weights that an adapter rests on, which `saved` leaves out; None: there are none."""
    base, _ = tree.partition(weights, adapter.in_frozen_base)
    return base if jax.tree.leaves(base) else None


def write_base(folder: Path, base: Any) -> None:
    """Writes the weights that an adapter rests on into a run directory, once for all checkpoints."""
    if jax.process_index() == 0:
        shutil.rmtree(folder / BASE, ignore_errors=True)  # of an attempt that was cut off
    with Checkpoints(folder / BASE) as once:
        once.save(0, {"params": base}, {"step": 0}, wait=True)


def restored(values: dict[str, Any], base: Any, optimizer: optimizers.Optimizer) -> step.State:
    """Returns the state of a checkpoint. `base` is what `saved` left out; None: nothing."""
    whole = values["params"] if base is None else tree.merge(values["params"], base)
    trainable, frozen = tree.partition(whole, optimizer.trainable)
    state = step.State(values["step"], trainable, frozen, values["opt"], values["ema"], values.get("tracks"))
    if "workers" not in values:
        return state
    held = values["outer"]
    shared = replicas.Global(trainable, held["opt"], held.get("error"), held.get("learned"))
    return state.replace(params=values["workers"], outer=shared)


def saved_weights(
    checkpoints: Checkpoints, number: int, abstract: step.State, now: step.State, adapter: adapted.Adapted,
    optimizer: optimizers.Optimizer,
) -> dict[str, Any]:  # fmt: skip
    """Returns the weights to evaluate of an earlier step of a run, averaged where it keeps an average. `abstract`: a
    state's shapes and shardings; `now`: the present state, whose weights that no checkpoint holds are the same."""
    weights = checkpoints.restore_params(saved(abstract, adapter)["params"], number)
    base = frozen_base(adapter, now.all_params)
    weights = weights if base is None else tree.merge(weights, base)
    if abstract.ema is None:
        return weights
    _, frozen = tree.partition(weights, optimizer.trainable)
    return tree.merge(checkpoints.restore_params(abstract.ema, number, item="ema"), frozen)


# What may differ between a run directory and the run that continues it: nothing that changes the mathematics.
MAY_CHANGE = (
    "name", "out", "mesh.", "execution.", "data.workers", "data.tokenize_workers", "data.cache", "train.log_every",
    "train.save_every", "train.keep", "train.use", "train.prompts", "train.sample_", "train.nonfinite",
    "train.patience", "train.watchdog", "train.stuck", "distill.cache",
)  # fmt: skip


def differing(run: config.Run) -> dict[str, tuple[Any, Any]]:
    """Returns the fields in which a run is another one than its directory's, with the values there and here. A run may
    be given more steps than it had."""
    before = read_config(run.folder)
    mine, existing = config_io.flatten(run), config_io.flatten(before)
    if mine["train.steps"] > existing["train.steps"]:
        existing["train.steps"] = mine["train.steps"]
    fields = (k for k in mine | existing if mine.get(k) != existing.get(k) and not k.startswith(MAY_CHANGE))
    found = {k: (existing.get(k), mine.get(k)) for k in fields}
    there, here = replicas.workers(before), replicas.workers(run)
    return found if there == here else found | {"distributed.workers": (there, here)}


def claim(run: config.Run) -> bool:
    """Checks that the run directory is this run's own, or not there yet; returns whether it holds a run to
    continue."""
    if (run.folder / "config.json").exists():
        if found := differing(run):
            k, (there, here) = next(iter(found.items()))
            raise ValueError(
                f"{run.folder} belongs to another config: {k} is {there!r} there and {here!r} here"
                f"{f' (and {len(found) - 1} more)' if len(found) > 1 else ''}; choose another `name`, or delete it"
            )
        return True
    if run.folder.is_dir() and any(path.name != "memory" for path in run.folder.iterdir()):
        raise ValueError(f"{run.folder} is not empty and holds no config.json; choose another `name` or `out`")
    return False


def has_ended(folder: Path) -> bool:
    """Returns whether a run was trained to its end, and was given no more steps since."""
    file = folder / "metrics.jsonl"
    ends = [line for line in read_lines(file) if line.get("name") in ("end", "more")] if file.exists() else []
    if not ends or ends[-1]["name"] == "more":
        return False
    return ends[-1]["reason"] != "finished" or ends[-1]["step"] >= read_config(folder).train.steps


def earlier_steps(run: config.Run) -> int | None:
    """Returns the number of steps that the run in the directory had, where it is given more now; else None."""
    if not (run.folder / "config.json").exists():
        return None
    before = read_config(run.folder).train.steps
    return before if run.train.steps > before else None


def check_place(run: config.Run) -> None:
    """Checks that the run directory can be written to, before the work and not after it. ValueError: it can't."""
    local("`out`", run.folder)
    if run.name in ("", ".", "..") or Path(run.name).name != run.name:
        raise ValueError(f"name: {run.name!r} is no name of a folder; give one without /, and its place as `out`")
    at = run.folder
    while not at.exists() and not at.is_symlink():
        at = at.parent
    if not at.is_dir():
        raise ValueError(f"out: {at} is a file; choose another `out`")
    if not os.access(at, os.W_OK):
        raise ValueError(f"out: no permission to write in {at}; choose another `out`")


@contextlib.contextmanager
def removed_if_refused(
    folder: Path, faults: tuple[type[BaseException], ...] = (ValueError, OSError)
) -> Iterator[Callable[[], None]]:
    """Removes a new directory if its run, or its model, is refused within the context by one of the faults, until the
    function that it gives is called: the work begins then."""
    begun = [folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))]
    made = [at for at in folder.parents if not at.exists()]
    try:
        yield lambda: begun.append(True)
    except faults:
        if not any(begun):
            shutil.rmtree(folder, ignore_errors=True)
            for at in made:
                with contextlib.suppress(OSError):  # it holds something else by now
                    at.rmdir()
        raise
