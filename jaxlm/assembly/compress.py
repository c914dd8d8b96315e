"""A model is made small, layer by layer, each from what the small layers before it give: a new run directory that
computes on few bits or narrow factors, or with zeros that stay.

Weights lie on disk but for one layer; its statistics and the states of the calibration's tokens are in memory. Each
layer is written once it is small, so that a compression that was killed goes on.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly import calibration as calibrations
from jaxlm.assembly import compress_folds, compress_journal, compress_report, convert, earlier, open_model
from jaxlm.assembly.compress_folds import Fold
from jaxlm.assembly.compress_journal import Journal
from jaxlm.assembly.compress_layers import Task, all_layers, layer_specs, stored_as
from jaxlm.assembly.layer_walk import LayerWalk, Stack
from jaxlm.assembly.model_source import Source
from jaxlm.core import config, config_io, spec, tree
from jaxlm.core.compress_request import Calibration, Comparison, Settings
from jaxlm.core.compression import ZEROS, Compression, Stored
from jaxlm.formats import model_card
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.nn.layout import Layout
from jaxlm.runtime import mesh as meshes
from jaxlm.weights import stored
from jaxlm.weights.compress import pruning
from jaxlm.weights.compress.solve import NEED_NOTHING
from jaxlm.weights.matrices import Matrix, matrices

RECORD, CARD = "compress.json", "README.md"


@dataclass(frozen=True)
class Compressed:
    """It says what was written."""

    folder: Path
    record: dict[str, Any]
    """What `compress.json` holds."""
    lines: list[str]
    """The table that compares the model with what it was, as Markdown."""


def compress(
    model: str | Path,
    target: str | Path,
    settings: Settings,
    calibration: Calibration | None = None,
    comparison: Comparison | None = None,
    step: int | None = None,
) -> Compressed:
    """Writes a run directory with the model made small, and what that changed.

    A compression of the same request that was cut off goes on where it was. ValueError: a setting, the calibration or
    the model doesn't fit, or `target` is there already; nothing is left then.
    """
    folder = convert.fresh(target)
    c, comparison = calibration or Calibration(), comparison or Comparison()
    for part in (settings, c, comparison):
        config_io.check(part)
    solver = settings.solver()
    if jax.process_count() > 1:
        raise ValueError("compress: runs in one process; start it on one host")
    source = describe(model, step)
    if not c.calibration and (not isinstance(solver, NEED_NOTHING) or settings.budget):
        what = "budget" if settings.budget else settings.method
        raise ValueError(f"calibration: {what} needs text to be calibrated on; name some, such as a text file")
    if both := {str(Path(p).expanduser().resolve()) for p in comparison.data} & {
        str(Path(p).expanduser().resolve()) for p in c.calibration
    }:
        raise ValueError(f"data: {min(both)} is the calibration too, so its figures tell nothing; name other text")
    chosen, kept = _chosen(source, settings)
    request = dict(model=str(source.path), files=compress_journal.stamp(source), settings=dataclasses.asdict(settings),
                   calibration=dataclasses.asdict(c), step=step)  # fmt: skip
    journal = Journal(folder.with_name(f"{folder.name}.part"), request)
    try:
        record = _small(source, settings, c, chosen, journal, folder, step) | {"kept": kept}
        lines = _compared(source, record, journal.folder, comparison, step)
        journal.tidy()
    except ValueError:
        if journal.is_new:
            shutil.rmtree(journal.folder, ignore_errors=True)
        raise
    journal.folder.rename(folder)
    return Compressed(folder, record, lines)


def describe(model: str | Path, step: int | None = None) -> Source:
    """Returns what the files of a model say that can be made small. ValueError: it can't."""
    source = open_model.source_of(model)
    where = source.path
    if source.run is None and step is not None:
        raise ValueError(f"step: {where} is no run directory; leave it out")
    if source.adapted.compression.weights:
        raise ValueError(f"{where}: is compressed already; take the model that it was made from")
    if source.adapter != config.Adapter():
        raise ValueError(f"{where}: has an adapter; merge it first: jaxlm export {where} MERGED --format hf")
    if source.run is not None and "packnet" in source.run.continual.methods:
        raise ValueError(f"{where}: its tasks own weights (packnet); write one task first: jaxlm export {where} TARGET")
    if source.run is not None and earlier.of_directory(where, source.run).tasks:
        raise ValueError(f"{where}: has heads of earlier tasks; write one task first: jaxlm export {where}#TASK TARGET")
    return source


def _chosen(source: Source, settings: Settings) -> tuple[dict[str, Matrix], list[str]]:
    """Returns the matrices that become small, and the paths of those that the method can't make smaller. ValueError:
    the method doesn't fit one, or none is left."""
    found = {path: m for path, m in matrices(source.family, source.config).items() if m.spec.role == "matrix"}
    if not found:
        raise ValueError("model: its layers have no matrices that could be made small")
    skipped = tree.matcher(settings.skip, found, "skip")
    found = {path: m for path, m in found.items() if not skipped(path)}
    if not found:
        raise ValueError("skip: leaves no matrix to make small; leave some patterns out")
    solver, kept = settings.solver(), []
    for path, m in found.items():
        try:
            if settings.prunes:
                pruning.checked(solver.sparsity, m.inputs)  # type: ignore[union-attr]
            elif settings.method == "svd":
                kept += [] if settings.rank_of(m.inputs, m.outputs) else [path]
            else:
                stored.specs(m, Stored(solver.format))  # type: ignore[union-attr]
        except ValueError as error:
            said = str(error).replace("kept:", "pattern:")
            by_size = settings.prunes or settings.method == "svd"
            raise ValueError(f"{said}, which {path} is; --skip {path}" if by_size else said) from None
    if len(kept) == len(found):
        given = f"rank: {settings.rank}" if settings.rank else f"share: {settings.share:g}"
        raise ValueError(f"{given} makes no matrix of this model smaller; give {'less' if settings.rank else 'more'}")
    return {path: m for path, m in found.items() if path not in kept}, kept


def _small(
    source: Source, settings: Settings, c: Calibration, chosen: Mapping[str, Matrix], journal: Journal, folder: Path,
    step: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Writes the small model into the journal's folder; returns a record of how."""
    mesh, execution = meshes.make_mesh(config.Mesh()), open_model.published_execution()
    execution = dataclasses.replace(source.run.execution if source.run else execution, dtype="float32", remat="none")
    layout = Layout.of(config.Mesh(), execution)
    specs, own = open_model.specs_of(source), source.family.specs(source.config)
    batches = calibrations.read(source, c) if c.calibration else []
    journal.keep_source(source, specs, step)
    inner = {f"{path}/{name}" for path, flat in spec.stacks(own).items() for name in flat}
    with meshes.on_mesh(mesh):
        rest: dict[str, Any] = {}
        homes = tree.flatten(layout.shardings(specs, mesh))
        for path in homes.keys() - inner:
            rest = tree.put(rest, path, jax.device_put(jnp.asarray(journal.weight(path)), homes[path]))
        stacks, walk = [Stack.of(path, flat) for path, flat in spec.stacks(own).items()], None
        if batches:
            placed = calibrations.placed(batches, layout, mesh)
            walk = LayerWalk(source.family, source.config, rest, placed, layout)
            stacks = walk.stacks
        folds = _folds(source, settings, chosen, walk, layout, mesh) if walk and settings.scales else {}
        task = Task(source, settings, chosen, journal, walk, layout, mesh, stacks, folds)
        how = stored_as(task)
        all_layers(task, how)
        _write(task, how, rest, folder)
    notes = [{"weight": f"{stack.path}/{path}", "layer": i, **known}
             for stack in stacks for i in range(stack.layers)
             for path, known in journal.figures(stack.path, i).items()]  # fmt: skip
    calibrated = dataclasses.asdict(c) | {"tokens": calibrations.tokens(batches)} if batches else None
    if calibrated is not None:
        calibrated["length"] = batches[0]["tokens"].shape[-1]
        calibrated["calibration"] = [model_card.name_of(place) for place in c.calibration]
    return {"source": source.path.name, "settings": dataclasses.asdict(settings), "calibration": calibrated,
            "stored": {path: str(form) for path, form in how.items()}, "weights": notes}  # fmt: skip


def _folds(
    source: Source, settings: Settings, chosen: Mapping[str, Matrix], walk: LayerWalk, layout: Layout, mesh: Any
) -> dict[str, list[Fold]]:
    """Returns what is divided instead of the inputs of the chosen matrices, by stack. ValueError: there is nothing."""
    all_of_them, found = matrices(source.family, source.config), {}
    for stack in walk.stacks:
        prefix = f"{stack.path}/"
        own = {path.removeprefix(prefix): m for path, m in all_of_them.items() if path.startswith(prefix)}
        folds = compress_folds.find(walk, stack, own, layout, mesh)
        found[stack.path] = [fold for fold in folds if any(prefix + path in chosen for path in fold.readers)]
    if not any(found.values()) and not settings.own_scales:
        raise ValueError(
            f"method: nothing in this model's layers can take the factors of {settings.method}; take gptq, or set "
            "`own_scales`"
        )
    return found


def _compared(
    source: Source, record: dict[str, Any], folder: Path, c: Comparison, step: int | None
) -> list[str]:  # fmt: skip
    """Adds the comparison to the record, writes it and the card, and returns the table."""
    record["comparison"] = compress_report.compare(source, open_model.source_of(folder), c, step)
    lines = compress_report.lines(record["comparison"])
    record["card"] = [_made(record), "", *lines]
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    front = ["---", f"license: {source.licence}", "---", ""] if source.licence else []
    text = [*front, f"# {source.path.stem}, compressed", "", *record["card"]]
    (folder / CARD).write_text("\n".join(text) + "\n", "utf-8")
    return lines


def _made(record: Mapping[str, Any]) -> str:
    """Returns a sentence on how a model was made small, for its card."""
    forms = ", ".join(sorted(set(record["stored"].values())))
    c = record["calibration"]
    text = "" if c is None else (
        f", calibrated on {c['tokens']:,} tokens of {', '.join(c['calibration'])} ({c['rows']} rows of {c['length']})"
    )  # fmt: skip
    how = "with zeros that stay" if forms == ZEROS else f"as {forms}"
    but = f" ({', '.join(record['kept'])} as before, as factors would be no smaller)" if record["kept"] else ""
    return f"Made of {record['source']} by {record['settings']['method']}: matrices of the layers {how}{but}{text}."


# ------------------------------------------------------------------------------------------------------------ writing


def _write(task: Task, how: Mapping[str, Stored], rest: Any, target: Path) -> None:
    """Writes the run directory into the journal's folder: it gets its name once it is whole."""
    source, folder = task.source, task.journal.folder
    run = source.run or open_model.published_run(source)
    compression = Compression(tuple(f"{path}={form}" for path, form in how.items()))
    run = dataclasses.replace(
        run, name=target.resolve().name, out=str(target.parent), start="", compression=compression,
        optim=dataclasses.replace(run.optim, ema=0.0), train=dataclasses.replace(run.train, use="last"),
    )  # fmt: skip
    source.save_text(folder / "tokenizer")
    source.save_advice(folder)
    params = rest
    for stack in task.stacks:
        specs = layer_specs(task, how, stack)
        dtypes = {path: jnp.dtype(s.dtype) for path, s in specs.items()}
        each = [task.journal.layer(stack.path, i, dtypes) for i in range(stack.layers)]
        small = {path: np.stack([arrays[path] for arrays in each]) for path in specs}
        del each
        small |= {path: task.journal.weight(f"{stack.path}/{path}") for path in stack.specs
                  if path not in specs and f"{stack.path}/{path}" not in task.chosen}  # fmt: skip
        for path in list(small):
            params = tree.put(params, f"{stack.path}/{path}", jnp.asarray(small.pop(path)))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    with Checkpoints(folder / "checkpoints", file_each=True) as checkpoints:
        state = dict(step=jnp.zeros((), jnp.int32), params=params)
        checkpoints.save(0, state, {"step": 0, "compressed": task.settings.method}, wait=True)
    config_io.dump(run, folder / "config.json")
