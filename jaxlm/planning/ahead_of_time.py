"""Compiles the very step that `jaxlm train` would run for machines that aren't here, and tells its cost (`jaxlm plan`).

No weight, no data and no tokenizer is needed: shapes come from the configuration. Bytes are the compiler's own; FLOPs
are counted in the traced step; collectives and traffic are read from the compiled program; times follow from the chip's
numbers (`chips`) as `roofline.combine` says.
"""

import contextlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.assembly import earlier, remember, teacher
from jaxlm.assembly import program as programs
from jaxlm.assembly.model_source import StartModel
from jaxlm.assembly.run_objective import placeholder_tokenizer
from jaxlm.core import config, spec, tree
from jaxlm.core.errors import one_line
from jaxlm.data import replay
from jaxlm.nn.layout import Layout
from jaxlm.objectives import outputs
from jaxlm.planning import count_flops, hlo, roofline, targets
from jaxlm.planning.roofline import Cost, Flow
from jaxlm.planning.targets import Target
from jaxlm.runtime import device_order, mesh
from jaxlm.training.distributed import exchange as exchanges

ACTIVATION_AXES = ("tensor", "expert", "context", "stage")  # activations travel over these axes, not weights
RESERVE = 0.04  # the share of a device's memory that the runtime and fragmentation take


class Refused(RuntimeError):
    """A compiler refuses a program, most often because the step doesn't fit."""


def program_for(run: config.Run, t: Target) -> programs.Program:
    """Returns the run's program on a target, for which it needs no compiler and looks at no device.

    Raises ValueError where `jaxlm train` would.
    """
    with targets.without_driver(t), mesh.on_devices([mesh.Described(t.chip.platform, t.chip.kind)] * t.count):
        return program_of(run)


def program_of(run: config.Run) -> programs.Program:
    """Returns the run's program on the devices that programs are made for now, with what the run directory that it
    starts from, if that is here, says of earlier tasks. ValueError: a run that keeps these starts from no model."""
    tasks = earlier.earlier_tasks(run, _start(run.start))
    tokens, taught = placeholder_tokenizer(run), teacher.source(run)
    return programs.program(teacher.reading(run), tokens, None, tasks, taught and replace(taught, tokens=tokens))


def _start(place: str) -> StartModel:
    """Returns the model that runs start from, described once for all the layouts of a search."""
    file = Path(place).expanduser() / "config.json"
    return _described(place, file.stat().st_mtime_ns if place and file.is_file() else 0)


@lru_cache(maxsize=1)
def _described(place: str, stamp: int) -> StartModel:
    return StartModel(place)


def estimate(run: config.Run, t: Target) -> Cost:
    """Returns the cost of the run's step by arithmetic alone."""
    return roofline.cost(program_for(run, t), t)


def abstract_batch(p: programs.Program) -> dict[str, Any]:
    """Returns the shapes of a batch, each with its sharding."""
    leaves = _leaves(p, p.objective.full_example(), p.new_rows)
    for i in _replayed(p):
        each = p.earlier.rows // p.run.train.micro_batches // len(_replayed(p))
        rows = _leaves(p, _kept_row(p, i), each)
        leaves |= {replay.key(i, name): leaf for name, leaf in rows.items()}
    shardings = p.batch_shardings(leaves)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name]) for name, x in leaves.items()}


def _leaves(p: programs.Program, row: Mapping[str, Any], rows: int) -> dict[str, np.ndarray]:
    shape = p.run.train.micro_batches, rows
    return {name: np.broadcast_to(x, (*shape, *np.shape(x))) for name, x in row.items()}


def _replayed(p: programs.Program) -> list[int]:
    """Returns the earlier tasks whose rows stand in one batch: all, or the one with the longest rows."""
    if not p.earlier.replays:
        return []
    tasks = range(len(p.earlier.tasks))
    return [*tasks] if "gem" in p.run.continual.methods else [max(tasks, key=lambda i: p.earlier.tasks[i].seq_len)]


def _kept_row(p: programs.Program, i: int) -> dict[str, Any]:
    """Returns a row that is kept of an earlier task, as large as it can be."""
    objective, task, top = p.earlier.objectives[i], p.earlier.tasks[i], p.run.continual.der.top
    row = dict(objective.full_example())
    if "der" not in p.run.continual.methods:
        return row

    alone = replace(p.model, shard=Layout.of(config.Mesh(), p.run.execution))  # shapes are the same on any mesh

    def largest(weights: Any, batch: Any) -> Any:
        now = objective.outputs(alone, p.earlier.weights_for(weights, task), batch)
        return outputs.largest(now, top, alone.shard)

    found = jax.eval_shape(largest, spec.abstract(p.specs), jax.tree.map(lambda x: np.asarray(x)[None], row))
    return row | {name: np.broadcast_to(np.zeros((), x.dtype), x.shape[1:])
                  for name, x in zip(("stored", "stored_classes"), found, strict=True)}  # fmt: skip


def kept_bytes(p: programs.Program) -> float | None:
    """Returns the most bytes of a host's memory that the kept rows of earlier tasks take; None: only data can say,
    because its tokens alone bound them, or rows aren't windows of text."""
    if not p.earlier.replays:
        return 0.0
    c = p.run.continual.replay
    if not c.examples or any(o.records != "packed" for o in p.earlier.objectives):
        return None
    each = [sum(np.asarray(x).nbytes for x in _kept_row(p, i).values()) for i in range(len(p.earlier.tasks))]
    return float(c.examples * max(each))


@dataclass(frozen=True)
class Compiled:
    """A Compiled is a run's step as compiled for a target, with what it costs."""

    run: config.Run
    target: Target
    sizes: dict[str, int]
    cost: Cost
    module: hlo.Module
    seconds: float
    """How long tracing and compiling took."""
    warnings: tuple[str, ...]
    """The partitioner's warnings of arrays that it had to copy to every device."""
    program: programs.Program
    executable: Any
    """The `jax.stages.Compiled`, for those who want to know more."""


def compile_step(run: config.Run, t: Target) -> Compiled:
    """Compiles a run's step for a target. Raises Refused where the compiler does."""
    devices = t.devices()
    with mesh.on_devices(devices):
        p = program_of(run)
        sizes = dict(p.mesh.shape) if p.mesh is not None else {}
        started, batch = time.perf_counter(), abstract_batch(p)
        state = p.abstract_state().replace(memory=remember.memory_like(p))
        with mesh.on_mesh(p.mesh):
            traced = p.train_step().trace(state, batch)
            with capture_stderr() as captured:
                try:
                    compiled = traced.lower().compile()
                except jax.errors.JaxRuntimeError as e:
                    raise Refused(f"{t.name}'s compiler refuses this step: {one_line(e, 300)}") from None
    seconds = time.perf_counter() - started
    module, analysis = read(compiled, sizes, t), compiled.memory_analysis()
    host = host_memory(analysis, state)
    cost = Cost(
        memory=memory(p, analysis, state), flops=count_flops.count(traced.jaxpr) / t.count, hbm=float(module.traffic),
        flows=(*flows(module, t), *host_flows(module, host)), tokens=run.train.batch_size * run.train.seq_len,
        model_flops=p.flops_per_token(), host=host, kernels=module.kernels if t.chip.platform == "gpu" else 0.0,
        narrow=count_flops.count(traced.jaxpr, narrow=True) / t.count,
    )  # fmt: skip
    # A kernel that multiplies reads its operands meanwhile: the rest of the traffic alone takes time of its own.
    unhidden = min(cost.hbm, roofline.cost(p, t).hbm)
    timed = roofline.combine(replace(cost, hbm=unhidden), t, sizes)
    warnings = tuple(x for x in captured.splitlines() if "rematerialization" in x.lower())
    return Compiled(run, t, sizes, replace(timed, hbm=cost.hbm), module, seconds, warnings, p, compiled)


@dataclass(frozen=True)
class CompiledExchange:
    """A CompiledExchange is the program in which workers that train apart are brought together."""

    program: programs.Program
    module: hlo.Module
    temporaries: int
    """Bytes of a device that it needs beside the state."""
    executable: Any

    @property
    def sent(self) -> float:
        """Returns the bytes that one device sends to other workers."""
        return sum(c.sent for c in self.module.collectives if exchanges.AXIS in c.axes)


def compile_exchange(run: config.Run, t: Target, fragments: tuple[int, ...] | None = None) -> CompiledExchange:
    """Compiles the exchange of a run's workers for a target: of these fragments, or of all. Raises Refused where the
    compiler does."""
    with mesh.on_devices(t.devices()):
        p = program_of(run)
        numbers = tuple(range(p.fragments.count)) if fragments is None else fragments
        with mesh.on_mesh(p.mesh):
            try:
                compiled = p.exchange(numbers, ()).lower(p.abstract_state()).compile()
            except jax.errors.JaxRuntimeError as e:
                raise Refused(f"{t.name}'s compiler refuses the workers' exchange: {one_line(e, 300)}") from None
    module = read(compiled, dict(p.mesh.shape) if p.mesh is not None else {}, t)
    return CompiledExchange(p, module, int(compiled.memory_analysis().temp_size_in_bytes), compiled)


def read(compiled: Any, sizes: Mapping[str, int], t: Target) -> hlo.Module:
    """Returns a compiled program as read from its HLO text, on a mesh of these sizes."""
    crossing = device_order.ways_across_slices(sizes, t.slices) if t.slices > 1 else {}
    return hlo.Module(hlo_of(compiled), sizes, crossing)


def hlo_of(compiled: Any) -> str:
    """Returns the HLO text of a compiled program. Raises ValueError where jaxlib is too old to read it."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as e:  # a compiler newer than jaxlib writes what that can't read
        raise ValueError(
            f"target: jaxlib {jax.lib.__version__} can't read this compiler's program; install the one made for it: "
            f'pip install "jax[tpu]=={jax.__version__}" ({one_line(e, 300)})'
        ) from None


@contextlib.contextmanager
def capture_stderr() -> Iterator[Any]:
    """Captures what compilers, which are no Python programs, write to standard error; it is passed on at the end."""

    class Captured:
        text = ""

        def splitlines(self) -> list[str]:
            return self.text.splitlines()

    captured, original = Captured(), os.dup(2)
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield captured
        finally:
            os.dup2(original, 2)
            os.close(original)
            file.seek(0)
            captured.text = file.read().decode("utf-8", "replace")


def memory(p: programs.Program, analysis: Any, state: Any) -> dict[str, float]:
    """Returns the bytes of one device by part.

    Arguments are told apart by what they are; of the compiler's temporaries at most the gradients' size are gradients.
    What rests in the host's memory is left out.
    """
    weights, moments = bytes_of(state.params) + bytes_of(state.frozen), bytes_of(state.opt) + bytes_of(state.ema)
    flat = tree.flatten(p.specs, spec.is_spec)
    shardings = tree.flatten(p.layout.shardings(p.specs, p.mesh))
    grads = sum(4.0 * math.prod(shardings[path].shard_shape(s.shape)) for path, s in flat.items()
                if p.optimizer.trainable(path))  # fmt: skip
    kept, held = bytes_of(state.tracks) + bytes_of(state.memory), {}
    if state.outer is not None:
        held = {roofline.GLOBAL: bytes_of(state.outer.params), roofline.OUTER: bytes_of(state.outer.opt),
                roofline.ERROR: bytes_of(state.outer.error)}  # fmt: skip
    copied = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    grads = min(grads, analysis.temp_size_in_bytes)
    return {
        "parameters": weights, "optimizer state": moments, "gradients": grads,
        "activations and other temporaries": analysis.temp_size_in_bytes - grads,
        "batch and copies": max(0.0, analysis.argument_size_in_bytes - weights - moments - kept - sum(held.values()))
        + copied,
    } | {name: n for name, n in {roofline.KEPT: kept, **held}.items() if n}  # fmt: skip


def bytes_of(part: Any, host: bool = False) -> float:
    """Returns the bytes of arrays on one device, or of those that rest in its host's memory."""
    leaves = [x for x in jax.tree.leaves(part) if hasattr(x, "sharding")]
    leaves = [x for x in leaves if (x.sharding.memory_kind == "pinned_host") == host]
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


def host_memory(analysis: Any, state: Any) -> dict[str, float]:
    """Returns the bytes by part that one device has in its host's memory."""
    parts = {"optimizer state": bytes_of(state.opt, host=True), "activations": float(analysis.host_temp_size_in_bytes)}
    return {name: n for name, n in parts.items() if n}


def host_flows(module: hlo.Module, host: Mapping[str, float]) -> tuple[Flow, ...]:
    """Returns what one device reads and writes of its host's memory: the optimizer's state, which is waited for, and
    the rest beside the products."""
    state = min(module.host_traffic, 2 * host.get("optimizer state", 0.0))
    parts = (("optimizer state", state, False), ("activations", module.host_traffic - state, True))
    return tuple(Flow(what, roofline.HOST, (), sent, hidden) for what, sent, hidden in parts if sent)


def flows(module: hlo.Module, t: Target) -> tuple[Flow, ...]:
    """Returns the bytes that one device sends, by kind of collective and mesh axes."""
    totals: dict[tuple[str, tuple[str, ...]], float] = {}
    for c in module.collectives:
        totals[c.kind, c.axes] = totals.get((c.kind, c.axes), 0.0) + c.sent
    return tuple(
        Flow("", kind, axes, sent, not any(a in ACTIVATION_AXES for a in axes) or roofline.hidden(axes, t))
        for (kind, axes), sent in sorted(totals.items())
    )
