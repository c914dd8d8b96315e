"""`jaxlm train --dry-run` shows the resolved run, its parameters, its memory and one decoded batch, without
training."""

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import rich.console
import rich.table
import rich.text

from jaxlm.assembly import corpus, open_model, program
from jaxlm.assembly.model_source import StartModel
from jaxlm.core import config, config_io, registry, spec, tree
from jaxlm.runtime import mesh

console = rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def show(run: config.Run, start: StartModel, origins: Mapping[str, str]) -> int:
    """Shows what would run; `origins` says where each field's value comes from."""
    show_config(run, origins)
    p = program.program(run, open_model.load_tokenizer(run, start), open_model.template_of(run, start))
    for name, note in p.notes.items():
        console.print(f"{name:12} {note}")
    show_parameters(p)
    loader = corpus.training_loader(run, p.objective, corpus.corpus(run.data, p.objective), None)
    console.print(
        f"data         {loader.examples_per_epoch:,} windows an epoch; "
        f"{run.train.steps * run.train.batch_size / loader.examples_per_epoch:.2f} epochs"
    )
    show_memory(p, loader)
    show_example(loader.example(0), p.tokens, "first training example")
    return 0


def show_config(run: config.Run, origins: Mapping[str, str]) -> None:
    plain: dict[str, Any] = {"adapter": registry.name_of(config.Adapter())}
    for part, prefix in ((config.Data(), "data."), (config.Optim(), "optim."), (config.Train(), "train."),
                         (type(run.adapter)(), "adapter."),
                         (config.Mesh(), "mesh."), (config.Execution(), "execution."), (type(run.model)(), "model."),
                         (type(run.objective)(), "objective.")):  # fmt: skip
        plain |= config_io.flatten(part, prefix)
    table = rich.table.Table("field", "value", "from", title=f"run {run.name} → {run.folder}", title_justify="left")
    for key, value in config_io.flatten(run).items():
        where = origins[key]
        if where == "config file" and key in plain and plain[key] == value:
            where = "default"
        table.add_row(key, repr(value), where, style={"default": "dim", "config file": ""}.get(where, "bold"))
    console.print(table)


def show_parameters(p: program.Program) -> None:
    flat = tree.flatten(p.specs, spec.is_spec)
    table = rich.table.Table("parameter", "shape", "axes", "at rest", "elements", "optimizer")
    for path, s in flat.items():
        rest = "whole" if p.mesh is None else str(p.layout.spec(s.axes, p.layout.store)).removeprefix("PartitionSpec")
        axes = ", ".join(a or "·" for a in s.axes)
        table.add_row(
            path, "×".join(map(str, s.shape)), axes, rest, f"{math.prod(s.shape):,}", p.optimizer.groups[path]
        )
    console.print(table)
    count, trained = p.parameters
    console.print(f"parameters   {count:,}, of which {trained:,} are trained")


def show_memory(p: program.Program, loader: Any) -> None:
    """Prints what the compiler says of this very step: nothing is guessed, and nothing runs."""
    c = p.run.train
    rows = p.rows(c.batch_size // c.micro_batches)
    with mesh.on_mesh(p.mesh):
        batch = p.to_device(loader.batch(0), rows)
        compiled = p.train_step().lower(p.abstract_state(), batch).compile()
    m = compiled.memory_analysis()
    if m is None:
        console.print("memory       this backend's compiler gives no memory analysis")
        return
    mib = 1 << 20
    console.print(
        f"memory       {(m.argument_size_in_bytes + m.temp_size_in_bytes) / mib:,.0f} MiB a device: "
        f"state and batch {m.argument_size_in_bytes / mib:,.0f}, temporaries {m.temp_size_in_bytes / mib:,.0f}"
    )


def show_example(example: Mapping[str, np.ndarray], tokens: Any, title: str) -> None:
    """Prints an example decoded, with the targets that count underlined and every document in its own colour."""
    if "source" in example:
        show_both_sides(example, tokens, title)
        return
    if "weights" not in example:
        show_whole(example, tokens, title)
        return
    ids, segments, counts = example["tokens"], example["segments"], example["weights"] > 0
    if "at" in example:
        at = set(example["at"][counts].tolist())
    else:
        # In causal training position t predicts t + 1: mark the token that is predicted. Tags are of the token itself.
        ahead = np.array_equal(example["targets"][:-1][counts[:-1]], ids[1:][counts[:-1]])
        at = set((np.flatnonzero(counts) + ahead).tolist())
    marked = [t in at for t in range(len(ids))]
    console.print(f"{title}: {len(ids)} tokens in {len(set(segments[segments > 0].tolist()))} document(s), "
                  f"{sum(marked)} of them targets (underlined)")  # fmt: skip
    console.print(decoded(ids, segments, tokens, marked))


def show_whole(example: Mapping[str, np.ndarray], tokens: Any, title: str) -> None:
    """An example that is judged as a whole: its text, or its texts, and what is wanted of it."""
    rows, segments = (np.atleast_2d(example[name]) for name in ("tokens", "segments"))
    for ids, segment in zip(rows, segments, strict=True):
        n = int((segment > 0).sum())
        console.print(f"{title}: {n} of {len(ids)} tokens")
        console.print(decoded(ids[:n], segment[:n], tokens, [False] * n))
    wanted = {name: leaf for name, leaf in example.items() if np.shape(leaf) != example["tokens"].shape}
    console.print(", ".join(f"{name} {np.asarray(leaf).tolist()}" for name, leaf in wanted.items()))


def show_both_sides(example: Mapping[str, np.ndarray], tokens: Any, title: str) -> None:
    """An encoder-decoder's row: what it reads, then what it is to write; what belongs together has one colour."""
    marked = (example["weights"] > 0).tolist()
    read, written = example["source_segments"], example["segments"]
    console.print(
        f"{title}, source: {(read > 0).sum()} of {len(read)} tokens, {len(set(read[read > 0].tolist()))} text(s)"
    )
    console.print(decoded(example["source"], read, tokens, [False] * len(read)))
    console.print(f"{title}, target: {len(written)} tokens, {sum(marked)} of them targets (underlined)")
    console.print(decoded(example["targets"], written, tokens, marked))


def decoded(ids: np.ndarray, segments: np.ndarray, tokens: Any, marked: list[bool]) -> rich.text.Text:
    text = rich.text.Text()
    for id, segment, mark in zip(ids.tolist(), segments.tolist(), marked, strict=True):
        colour = "dim" if segment == 0 else ("cyan", "green", "magenta", "yellow")[segment % 4]
        # An objective may use rows of the model's vocabulary that the tokenizer doesn't know.
        piece = tokens.piece(id) if id < tokens.vocab_size else f"<row {id}>"
        text.append(piece, style=colour + (" underline" if mark else ""))
    return text
