"""`jaxlm train --dry-run` shows the resolved run, its parameters, its memory and one decoded batch, without
training."""

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.table
import rich.text

from jaxlm.assembly import corpus, earlier, open_model, program, remember, teacher
from jaxlm.assembly.model_source import StartModel
from jaxlm.core import config, config_io, registry, spec, tree
from jaxlm.runtime import mesh

console = rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def show(run: config.Run, start: StartModel, origins: Mapping[str, str]) -> dict[str, Any]:
    """Shows what would run, and returns it as values; `origins` says where each field's value comes from."""
    show_config(run, origins)
    tokens, template = open_model.load_tokenizer(run, start), open_model.template_of(run, start)
    read = teacher.reading(run)  # a teacher whose logits aren't there yet
    p = program.program(read, tokens, template, earlier.earlier_tasks(run, start), teacher.source(run))
    for name, note in p.notes.items():
        console.print(f"{name:12} {note}")
    show_parameters(p)
    data = corpus.corpus(run.data, p.objective)
    for line in data.described(run.data):
        console.print(line, soft_wrap=True)
    loader = corpus.training_loader(run, p.objective, data, None)
    console.print(
        f"data         {loader.examples_per_epoch:,} windows an epoch; "
        f"{run.train.steps * run.train.batch_size / loader.examples_per_epoch:.2f} epochs"
    )
    memory = show_memory(p, loader)
    show_example(loader.example(0), p.tokens, "first training example", label_names(run.objective))
    count, trained = p.parameters
    return {
        "config": config_io.flatten(run), "notes": p.notes, "parameters": count, "trainable": trained,
        "sources": data.sizes(run.data), "memory_bytes": memory,
    }  # fmt: skip


def show_config(run: config.Run, origins: Mapping[str, str]) -> None:
    plain: dict[str, Any] = {"adapter": registry.name_of(config.Adapter())}
    for part, prefix in ((config.Data(), "data."), (config.Optim(), "optim."), (config.Train(), "train."),
                         (type(run.adapter)(), "adapter."),
                         (config.Transfer(), "transfer."),
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


def show_memory(p: program.Program, loader: Any) -> int | None:
    """Prints what the compiler says of this very step: nothing is guessed, and nothing runs. Returns the bytes that a
    device needs; None: the compiler doesn't say."""
    c = p.run.train
    rows = p.rows(c.batch_size // c.micro_batches)
    with mesh.on_mesh(p.mesh):
        batch = p.to_device(loader.batch(0), rows)
        compiled = p.train_step().lower(p.abstract_state().replace(memory=remember.memory_like(p)), batch).compile()
    m = compiled.memory_analysis()
    if m is None:
        console.print("memory       this backend's compiler gives no memory analysis")
        return None
    mib = 1 << 20
    console.print(
        f"memory       {(m.argument_size_in_bytes + m.temp_size_in_bytes) / mib:,.0f} MiB a device: "
        f"state and batch {m.argument_size_in_bytes / mib:,.0f}, temporaries {m.temp_size_in_bytes / mib:,.0f}"
    )
    return m.argument_size_in_bytes + m.temp_size_in_bytes


def label_names(objective: Any) -> Sequence[str]:
    """Returns the labels of an objective's settings, in the order of their numbers; none where it has no such field."""
    return dict(vars(objective)).get("labels", ())


def show_example(example: Mapping[str, np.ndarray], tokens: Any, title: str, labels: Sequence[str] = ()) -> None:
    """Prints an example decoded, without its padding, with the targets that count marked and its labels by name.

    On a terminal marks are lines below the text and every document has its own colour; elsewhere marks are brackets and
    every document has its own line.
    """
    if "source" in example:
        show_both_sides(example, tokens, title)
        return
    if "weights" not in example:
        show_whole(example, tokens, title, labels)
        return
    ids, segments, counts = example["tokens"], example["segments"], example["weights"] > 0
    if "at" in example:
        at = set(example["at"][counts].tolist())
    else:
        # In causal training position t predicts t + 1: mark the token that is predicted. Tags are of the token itself.
        ahead = np.array_equal(example["targets"][:-1][counts[:-1]], ids[1:][counts[:-1]])
        at = set((np.flatnonzero(counts) + ahead).tolist())
    marked = [t in at for t in range(len(ids))]
    real = int((segments > 0).sum())
    console.print(f"{title}: {real} tokens{padding(len(ids) - real)} in {len(set(segments[segments > 0].tolist()))} "
                  f"document(s), {sum(marked)} of them targets {MARKED[console.is_terminal]}")  # fmt: skip
    print_text(decoded(ids, segments, tokens, marked))
    if labels:
        console.print(f"labels: {' '.join(labels[i] for i in example['targets'][counts].tolist())}", markup=False)


MARKED = {True: "(underlined)", False: "(in brackets ⟦ ⟧)"}


def padding(n: int) -> str:
    """Returns what is said of so many positions of padding."""
    return f" (and {n} of padding)" if n else ""


def print_text(text: rich.text.Text) -> None:
    """Prints a text, which is only broken into lines where a terminal must."""
    console.print(text, soft_wrap=not console.is_terminal)


def show_whole(example: Mapping[str, np.ndarray], tokens: Any, title: str, labels: Sequence[str]) -> None:
    """An example that is judged as a whole: its text, or its texts, and what is wanted of it."""
    rows, segments = (np.atleast_2d(example[name]) for name in ("tokens", "segments"))
    for ids, segment in zip(rows, segments, strict=True):
        n = int((segment > 0).sum())
        console.print(f"{title}: {n} tokens{padding(len(ids) - n)}")
        print_text(decoded(ids[:n], segment[:n], tokens, [False] * n))
    wanted = {name: np.asarray(leaf) for name, leaf in example.items() if np.shape(leaf) != example["tokens"].shape}
    said = (f"{name} {named(leaf, labels)}" for name, leaf in wanted.items())
    console.print(", ".join(said), markup=False)


def named(leaf: np.ndarray, labels: Sequence[str]) -> str:
    """Returns an array as text; one with a 1 for each label, or for the choice, that is right names them."""
    if leaf.dtype.kind == "f" and leaf.ndim == 1 and np.isin(leaf, (0, 1)).all():
        if len(labels) == len(leaf):
            return " ".join(label for label, holds in zip(labels, leaf, strict=True) if holds) or "no label"
        if not labels and leaf.sum() == 1:
            return f"number {int(np.argmax(leaf))}"
    return str(leaf.tolist())


def show_both_sides(example: Mapping[str, np.ndarray], tokens: Any, title: str) -> None:
    """An encoder-decoder's row: what it reads, then what it is to write; what belongs together has one colour."""
    marked = (example["weights"] > 0).tolist()
    read, written = example["source_segments"], example["segments"]
    for side, ids, segments, marks in (("source", example["source"], read, [False] * len(read)),
                                       ("target", example["targets"], written, marked)):  # fmt: skip
        real = int((segments > 0).sum())
        targets = f", {sum(marks)} of them targets {MARKED[console.is_terminal]}" if side == "target" else ""
        texts = len(set(segments[segments > 0].tolist()))
        console.print(f"{title}, {side}: {real} tokens{padding(len(ids) - real)} in {texts} text(s){targets}")
        print_text(decoded(ids, segments, tokens, marks))


def decoded(ids: np.ndarray, segments: np.ndarray, tokens: Any, marked: list[bool]) -> rich.text.Text:
    """Returns the text of tokens without padding; special tokens are spelled."""
    text, before = rich.text.Text(), 0
    real = (each for each in zip(ids.tolist(), segments.tolist(), marked, strict=True) if each[1])
    for (segment, mark), run in itertools.groupby(real, key=lambda each: each[1:]):
        # An objective may use rows of the model's vocabulary that the tokenizer doesn't know.
        several = (tokens.token_bytes[id] if id < tokens.vocab_size else f"<row {id}>".encode() for id, *_ in run)
        part = b"".join(several).decode("utf-8", "replace")
        if not console.is_terminal:
            part = ("\n" if before not in (0, segment) else "") + (f"⟦{part}⟧" if mark else part)
        colour = ("cyan", "green", "magenta", "yellow")[segment % 4]
        text.append(part, style=colour + (" underline" if mark else ""))
        before = segment
    return text
