"""Makes the layers of a model small one after another: each from what the small layers before it give, written once it
is small. A budget first measures how much each matrix loses in each format."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly import compress_journal
from jaxlm.assembly.compress_folds import Fold, multiplied_rows
from jaxlm.assembly.compress_journal import Journal
from jaxlm.assembly.layer_walk import LayerWalk, Stack
from jaxlm.assembly.model_source import Source
from jaxlm.core import spec, tree
from jaxlm.core.compress_request import Settings
from jaxlm.core.compression import Format, Stored
from jaxlm.nn.layout import Layout
from jaxlm.weights import stored
from jaxlm.weights.compress import budget, formats
from jaxlm.weights.compress.solve import shared_factors, solve, solve_multiplied
from jaxlm.weights.compress.statistics import check
from jaxlm.weights.matrices import Matrix

NEED_HESSIAN = ("gptq", "sparsegpt", "awq", "svd")
CANDIDATES = (Format("int4", 128), Format("int4", 32), Format("int8"))
"""Formats that a budget chooses among."""


@dataclass(frozen=True)
class Task:
    """A Task is what is to be done to a model's layers, and with what."""

    source: Source
    settings: Settings
    chosen: Mapping[str, Matrix]
    """The matrices that become small, by their paths."""
    journal: Journal
    walk: LayerWalk | None
    """None: the method needs no calibration, and there is none."""
    layout: Layout
    mesh: jax.sharding.Mesh | None
    stacks: Sequence[Stack]
    folds: Mapping[str, Sequence[Fold]] = field(default_factory=dict)
    """What is divided instead of the inputs of matrices, by stack, where the method multiplies their rows."""

    def folded(self, stack: Stack) -> dict[str, Fold]:
        """Returns the folds of a stack by the paths in it of the matrices that read what they make."""
        return {path: fold for fold in self.folds.get(stack.path, ()) for path in fold.readers}

    def changed(self, stack: Stack) -> list[str]:
        """Returns the paths in a stack of weights that stay plain and are divided, or multiplied, all the same."""
        paths = [p for f in self.folds.get(stack.path, ()) for p in (f.source, f"{f.source}_bias", *f.readers)]
        return [p for p in paths if p in stack.specs and f"{stack.path}/{p}" not in self.chosen]

    def recorded(self, stack: Stack) -> dict[str, Matrix]:
        """Returns the chosen matrices of a stack by their paths in it."""
        prefix = f"{stack.path}/"
        return {path.removeprefix(prefix): m for path, m in self.chosen.items() if path.startswith(prefix)}

    def weights(self, stack: Stack, layer: int) -> dict[str, Any]:
        """Returns a layer's weights as they were, on the devices."""
        arrays = {path: np.array(self.journal.weight(f"{stack.path}/{path}")[layer]) for path in stack.specs}
        specs = {path: s._replace(shape=s.shape[1:], axes=s.axes[1:]) for path, s in stack.specs.items()}
        return compress_journal.on_devices(arrays, self.layout.shardings(specs, self.mesh))


def stored_as(task: Task) -> dict[str, Stored]:
    """Returns how each chosen matrix is stored in the end."""
    solver, settings = task.settings.solver(), task.settings
    if settings.prunes:
        return dict.fromkeys(task.chosen, Stored(None))
    if settings.method == "svd":
        return {path: Stored(None, rank=settings.rank_of(m.inputs, m.outputs)) for path, m in task.chosen.items()}
    folded = {f"{stack.path}/{path}" for stack in task.stacks for path in task.folded(stack)}

    def form(path: str, f: Format) -> Stored:
        return Stored(f, bool(settings.own_scales) and path not in folded)

    if not settings.budget:
        return {path: form(path, solver.format) for path in task.chosen}  # type: ignore[union-attr]
    given, least = _bytes(settings.budget, task.chosen), sum(_size(m, CANDIDATES[0]) for m in task.chosen.values())
    if given < least:
        raise ValueError(f"budget: {settings.budget} are {given:,} bytes, and int4 takes {least:,}; give at least that")
    picked = budget.choose(_sensitivities(task), given)
    by_name = {str(Stored(f)): f for f in CANDIDATES}
    return {path: form(path, by_name[option.name]) for path, option in picked.items()}


def _bytes(text: str, chosen: Mapping[str, Matrix]) -> int:
    """Returns the bytes of a budget such as 5.5bits or 80MB. ValueError: it is none."""
    count = sum(int(np.prod(m.spec.shape)) for m in chosen.values())
    units = {"bits": count / 8, "kb": 1e3, "mb": 1e6, "gb": 1e9}
    for unit, size in units.items():
        number = text.lower().removesuffix(unit).strip()
        if text.lower().endswith(unit) and number.replace(".", "", 1).isdecimal():
            return int(float(number) * size)
    raise ValueError(f"budget: {text!r} is no size; give bits of a weight such as 5.5bits, or bytes such as 80MB")


def _sensitivities(task: Task) -> dict[str, list[budget.Option]]:
    """Returns the options of each matrix with their errors, relative to what its layers give, on the model as it was:
    rounded to the nearest."""
    assert task.walk is not None
    errors = {path: dict.fromkeys(CANDIDATES, 0.0) for path in task.chosen}
    solvers = {f: _jitted(Settings("nearest").solver(Stored(f))) for f in CANDIDATES}
    with _bar(task, "measuring") as advance:
        for stack in task.stacks:
            task.walk.begin(stack)
            recorded = task.recorded(stack)
            for i in range(stack.layers):
                weights = task.weights(stack, i)
                found = task.walk.observe(stack, i, weights, recorded, False) if recorded else {}
                for path, m in recorded.items():
                    check(found[path], f"{stack.path}/{path} of layer {i}", "expert")
                    for f, solver in solvers.items():
                        made = solver(tree.at(weights, path), m.ins, m.outs, found[path])
                        errors[f"{stack.path}/{path}"][f] += float((made.error / made.power).mean())
                task.walk.run(stack, i, weights)
                advance()
            task.walk.end(stack)
    sizes = {path: {f: _size(m, f) for f in CANDIDATES} for path, m in task.chosen.items()}
    return {path: [budget.Option(str(Stored(f)), sizes[path][f], errors[path][f]) for f in CANDIDATES]
            for path in task.chosen}  # fmt: skip


def _size(m: Matrix, f: Format) -> int:
    copies = int(np.prod(m.spec.shape[: m.lead]))
    return copies * formats.nbytes(f, int(np.prod(m.in_shape)), int(np.prod(m.out_shape)))


@lru_cache(32)
def _jitted(solver: Any) -> Any:
    """Returns the jitted `(weight, ins, outs, statistics) → Solution`."""
    return jax.jit(partial(_solved, solver), static_argnums=(1, 2))


def _solved(solver: Any, w: Any, ins: int, outs: int, statistics: Any) -> Any:
    return solve(solver, w, ins, outs, statistics)


@lru_cache(32)
def _jitted_factors(solvers: tuple[Any, ...]) -> Any:
    """Returns the jitted `(weights, statistics) → factors` of weights that read the same inputs."""
    return jax.jit(partial(shared_factors, solvers))


@lru_cache(32)
def _jitted_multiplied(solver: Any) -> Any:
    """Returns the jitted `(weight, ins, statistics, factors) → Solution`."""
    return jax.jit(partial(solve_multiplied, solver), static_argnums=1)


def all_layers(task: Task, how: Mapping[str, Stored]) -> None:
    """Makes one layer after another small, and takes the calibration through each as it is then."""
    settings, solvers = task.settings, {}
    for form in set(how.values()):
        alone = Settings("nearest") if settings.scales and not form.scaled else settings
        solvers[form] = _jitted(alone.solver(form))
    hessian = settings.method in NEED_HESSIAN
    with _bar(task, "compressing") as advance:
        for stack in task.stacks:
            recorded, walk = task.recorded(stack), task.walk
            if walk is not None:
                walk.begin(stack)
            for i in range(stack.layers):
                weights = task.weights(stack, i)
                if not task.journal.has(stack.path, i):
                    found = walk.observe(stack, i, weights, recorded, hessian) if walk and recorded else {}
                    _one_layer(task, how, solvers, stack, i, weights, found)
                if walk is not None:
                    walk.run(stack, i, _bound(task, how, stack, i, weights))
                advance()
            if walk is not None:
                walk.end(stack)


def _one_layer(
    task: Task, how: Mapping[str, Stored], solvers: Mapping[Stored, Any], stack: Stack, i: int, weights: Any, found: Any
) -> None:
    """Makes the matrices of a layer small, and writes them with what else of it was changed."""
    recorded = task.recorded(stack)
    for path, record in found.items():
        check(record, f"{stack.path}/{path} of layer {i}", "expert")
    weights, factors = _divided(task, how, stack, weights, found)
    arrays: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    for path in task.changed(stack):
        arrays = tree.put(arrays, path, jax.device_get(tree.at(weights, path)))
    for path, m in recorded.items():
        form, w = how[f"{stack.path}/{path}"], tree.at(weights, path)
        note: dict[str, Any] = {}
        if path in factors:
            solver = _jitted_multiplied(task.settings.solver(form))
            made = solver(w, m.ins, found[path], factors[path])
            note = {"divides": f"{stack.path}/{task.folded(stack)[path].source}"}
        else:
            made = solvers[form](w, m.ins, m.outs, found.get(path))
            if task.settings.scales:
                note = {"divides": "its own inputs" if form.scaled else None}
        kept = made.weight if form.is_array else stored.arrays(made.weight)
        arrays = tree.put(arrays, path, jax.device_get(kept))
        known = {name: float(jnp.sum(getattr(made, name))) for name in ("error", "plain_error", "power")}
        if not np.isfinite(list(known.values())).all():
            raise ValueError(f"{stack.path}/{path}: layer {i} holds NaN or infinity; mend the model first")
        figures[path] = known | note | {"format": str(form)}
    task.journal.write(stack.path, i, arrays, figures)


def _divided(
    task: Task, how: Mapping[str, Stored], stack: Stack, weights: Any, found: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Returns a layer's weights with what makes the inputs of matrices divided, and the rows of those that stay plain
    multiplied; and the factors of the others, whose rows are multiplied when they are rounded."""
    factors: dict[str, Any] = {}
    # Outputs are divided before rows are multiplied: of a matrix that has both, the errors then count as they are.
    for fold in sorted(task.folds.get(stack.path, ()), key=lambda fold: stack.specs[fold.source].is_vector):
        small = [path for path in fold.readers if path in found]
        solvers = tuple(task.settings.solver(how[f"{stack.path}/{path}"]) for path in small)
        by = _jitted_factors(solvers)([tree.at(weights, path) for path in small], found[small[0]])
        weights = fold.divided(weights, by)
        factors |= dict.fromkeys(small, by)
        for path in set(fold.readers) - set(small):
            weights = tree.put(weights, path, multiplied_rows(tree.at(weights, path), by))
    return weights, factors


def layer_specs(task: Task, how: Mapping[str, Stored], stack: Stack) -> dict[str, spec.Spec]:
    """Returns the specs of what the journal holds of a layer, by their paths in it."""
    whole = {path: stack.specs[path] for path in task.changed(stack)}
    for path, m in task.recorded(stack).items():
        form = how[f"{stack.path}/{path}"]
        whole |= {path: m.spec} if form.is_array else {
            f"{path}/{name}": s for name, s in stored.specs(m, form).items()
        }  # fmt: skip
    return {name: s._replace(shape=s.shape[1:], axes=s.axes[1:]) for name, s in whole.items()}


def _bound(task: Task, how: Mapping[str, Stored], stack: Stack, i: int, weights: Any) -> Any:
    """Returns a layer's weights as they are now, with leaves for what has few bits or factors. They are read from the
    journal whether they were made just now or before."""
    specs = layer_specs(task, how, stack)
    arrays = task.journal.layer(stack.path, i, {path: jnp.dtype(s.dtype) for path, s in specs.items()})
    homes = tree.flatten(task.layout.shardings(specs, task.mesh))
    made = compress_journal.on_devices(arrays, homes)
    for path in task.changed(stack):
        weights = tree.put(weights, path, tree.at(made, path))
    for path, m in task.recorded(stack).items():
        form = how[f"{stack.path}/{path}"]
        now = tree.at(made, path)
        weights = tree.put(weights, path, now if form.is_array else stored.bound(m, form, now))
    return weights


@contextlib.contextmanager
def _bar(task: Task, what: str) -> Iterator[Any]:
    """Shows a progress bar on standard error if a person watches, else a line every tenth of the layers."""
    total, done = sum(stack.layers for stack in task.stacks), 0
    if sys.stderr.isatty():
        from rich import console
        from rich import progress as bars

        columns = bars.TextColumn(what), bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn()
        with bars.Progress(*columns, console=console.Console(stderr=True)) as bar:
            row = bar.add_task("", total=total)
            yield lambda: bar.advance(row)
        return

    def tell() -> None:
        nonlocal done
        done += 1
        if done * 10 // total != (done - 1) * 10 // total:
            print(f"{what}: {done} of {total} layers", file=sys.stderr, flush=True)

    yield tell
