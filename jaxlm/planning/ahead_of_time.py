"""`jaxlm plan`: the very step that `jaxlm train` would run, compiled for machines that aren't here, and what it costs.

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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxlm.assembly import program as programs
from jaxlm.assembly.run_objective import placeholder_tokenizer
from jaxlm.core import config, spec, tree
from jaxlm.core.errors import one_line
from jaxlm.planning import count_flops, hlo, roofline
from jaxlm.planning.roofline import Cost, Flow
from jaxlm.planning.targets import Target
from jaxlm.runtime import mesh

BETWEEN = ("tensor", "expert", "context", "stage")  # what goes over these axes are activations, not weights
RESERVE = 0.04  # of a device's memory, that the runtime and fragmentation take


class Refused(RuntimeError):
    """A compiler that says no, most often because the step doesn't fit."""


def laid_out(run: config.Run, t: Target) -> programs.Program:
    """The run's program on a target that needs no compiler and isn't looked at; refused as `jaxlm train` would."""
    with mesh.on_devices([mesh.Described(t.chip.platform, t.chip.kind)] * t.count):
        return programs.program(run, placeholder_tokenizer(run))


def estimate(run: config.Run, t: Target) -> Cost:
    """By arithmetic alone."""
    return roofline.cost(laid_out(run, t), t)


def batch_of(p: programs.Program) -> dict[str, Any]:
    """Shapes of a batch, each with its place on the mesh."""
    c, row = p.run.train, p.objective.full_example()
    rows = c.micro_batches, c.batch_size // c.micro_batches
    leaves = {name: np.broadcast_to(x, (*rows, *np.shape(x))) for name, x in row.items()}
    homes = p.batch_shardings(leaves)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=homes[name]) for name, x in leaves.items()}


@dataclass(frozen=True)
class Compiled:
    run: config.Run
    target: Target
    sizes: dict[str, int]
    cost: Cost
    module: hlo.Module
    seconds: float
    warnings: tuple[str, ...]
    """What the partitioner says of arrays that it had to copy to every device."""
    program: programs.Program
    executable: Any
    """Of `jax.stages`, for whoever wants more of it."""


def compile_step(run: config.Run, t: Target) -> Compiled:
    devices = t.devices()
    with mesh.on_devices(devices):
        p = programs.program(run, placeholder_tokenizer(run))
        sizes = dict(p.mesh.shape) if p.mesh is not None else {}
        started, batch, state = time.perf_counter(), batch_of(p), p.abstract_state()
        with mesh.on_mesh(p.mesh):
            traced = p.train_step().trace(state, batch)
            with stderr() as said:
                try:
                    compiled = traced.lower().compile()
                except jax.errors.JaxRuntimeError as e:
                    raise Refused(f"{t.name}'s compiler refuses this step: {one_line(e, 300)}") from None
    seconds = time.perf_counter() - started
    module = hlo.Module(text_of(compiled), sizes)
    found = Cost(
        memory=memory(p, compiled.memory_analysis(), state), flops=count_flops.count(traced.jaxpr) / t.count,
        hbm=float(module.traffic), flows=flows(module, t), tokens=run.train.batch_size * run.train.seq_len,
        model_flops=p.flops_per_token(),
    )  # fmt: skip
    # A kernel that multiplies reads its operands meanwhile; only the rest of the traffic takes time of its own.
    between = min(found.hbm, roofline.cost(p, t).hbm)
    timed = roofline.combine(replace(found, hbm=between), t, sizes)
    warnings = tuple(x for x in said.splitlines() if "rematerialization" in x.lower())
    return Compiled(run, t, sizes, replace(timed, hbm=found.hbm), module, seconds, warnings, p, compiled)


def text_of(compiled: Any) -> str:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as e:  # a compiler newer than jaxlib writes what that can't read
        raise ValueError(
            f"--target: jaxlib {jax.lib.__version__} can't read this compiler's program; install the one made for it: "
            f'pip install "jax[tpu]=={jax.__version__}" ({one_line(e, 300)})'
        ) from None


@contextlib.contextmanager
def stderr() -> Iterator[Any]:
    """What compilers write to standard error, which are no Python programs; passed on at the end."""

    class Said:
        text = ""

        def splitlines(self) -> list[str]:
            return self.text.splitlines()

    said, old = Said(), os.dup(2)
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(old, 2)
            os.close(old)
            file.seek(0)
            said.text = file.read().decode("utf-8", "replace")


def memory(p: programs.Program, m: Any, state: Any) -> dict[str, float]:
    """Bytes of one device by part. Arguments by what they are; of the compiler's temporaries at most the gradients'
    size are gradients."""

    def held(part: Any) -> float:
        leaves = [x for x in jax.tree.leaves(part) if hasattr(x, "sharding")]
        return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))

    weights, moments = held(state.params) + held(state.frozen), held(state.opt) + held(state.ema)
    flat = tree.flatten(p.specs, spec.is_spec)
    homes = tree.flatten(p.layout.shardings(p.specs, p.mesh))
    grads = sum(4.0 * math.prod(homes[path].shard_shape(s.shape)) for path, s in flat.items()
                if p.optimizer.trainable(path))  # fmt: skip
    copied = max(0, m.output_size_in_bytes - m.alias_size_in_bytes)
    grads = min(grads, m.temp_size_in_bytes)
    return {
        "parameters": weights, "optimizer state": moments, "gradients": grads,
        "activations and other temporaries": m.temp_size_in_bytes - grads,
        "batch and copies": max(0.0, m.argument_size_in_bytes - weights - moments) + copied,
    }  # fmt: skip


def flows(module: hlo.Module, t: Target) -> tuple[Flow, ...]:
    out: dict[tuple[str, tuple[str, ...]], float] = {}
    for c in module.collectives:
        out[c.kind, c.axes] = out.get((c.kind, c.axes), 0.0) + c.sent
    return tuple(
        Flow("", kind, axes, sent, not any(a in BETWEEN for a in axes) or roofline.hidden(axes, t))
        for (kind, axes), sent in sorted(out.items())
    )
