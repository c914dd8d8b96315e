"""Opens a run's teacher: its files when the program is put together, its weights when training begins, and a
fingerprint of them by which a run that goes on, or a cache of its logits, knows it again."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly import open_model
from jaxlm.assembly.distillation import MEMORY
from jaxlm.assembly.model_source import Source, describe
from jaxlm.assembly.program import HOURS, Program
from jaxlm.core import config, tree
from jaxlm.runtime import processes
from jaxlm.training.step import State
from jaxlm.weights import quantized

RECORD = "teacher.json"


def source(run: config.Run) -> Source | None:
    """Returns what the files of a run's teacher say; None: it has none. ValueError: there is no such model."""
    if not (place := run.distill.teacher):
        return None
    try:
        return describe(place)
    except ValueError as error:
        raise ValueError(f"distill.teacher: {error}") from error


def reading(run: config.Run) -> config.Run:
    """Returns the run as if its teacher read each batch, which needs no stored logits: for its shapes, and as an upper
    bound of its memory."""
    return dataclasses.replace(run, distill=dataclasses.replace(run.distill, cache=""))


def read(p: Program) -> Any:
    """Reads the teacher's weights, each device's share straight onto it, in the precision that the run asks for."""
    t = p.teacher
    assert t is not None
    stored = open_model.specs_of(t.source)
    homes = p.layout.shardings(stored, p.mesh)
    weights = open_model.read(t.source, stored, homes, transform=_quantizer(p))
    return {name: weights[name] for name in t.specs}


def _quantizer(p: Program) -> Callable[[str, jax.Array], Any] | None:
    """Returns what quantizes a weight of the teacher that has just been read; None: it is used as it is stored."""
    t = p.teacher
    assert t is not None
    adapted = t.model.adapter
    if adapted is None or adapted.c.base == t.source.adapter.base:
        return None
    homes = t.shardings(p.mesh)

    def transform(path: str, w: jax.Array) -> Any:
        if (m := adapted.matrices.get(path)) is None:
            return w
        make = partial(quantized.KINDS[adapted.c.base], ins=m.ins, outs=m.outs)
        few = jax.jit(make, out_shardings=tree.at(homes, path))(w)
        w.delete()
        return few

    return transform


def attached(p: Program, state: State, begins: bool | None) -> State:
    """Returns the state with the teacher's weights in its memory, where a step needs them. A run that begins notes the
    teacher's fingerprint; None: there is no run directory. ValueError: a run that goes on finds other weights than it
    began with."""
    if p.teacher is None or not p.teacher.reads_each_batch:
        return state
    weights = read(p)
    if begins is not None:
        know(p, fingerprint(weights), begins)
    return state.replace(memory=(state.memory or {}) | {MEMORY: weights})


def know(p: Program, found: str, begins: bool) -> None:
    """Notes the fingerprint of the teacher in the directory of a run that begins, or compares it with the one there.
    ValueError: they differ."""
    file, place = p.run.folder / RECORD, p.run.distill.teacher
    if begins:
        if jax.process_index() == 0:
            file.write_text(json.dumps({"teacher": place, "fingerprint": found}, indent=1) + "\n", "utf-8")
        processes.barrier("the teacher", HOURS)
        return
    if not file.is_file():
        raise ValueError(f"{file}: is gone, so nobody knows whether the teacher is the same; train anew")
    if json.loads(file.read_text("utf-8"))["fingerprint"] != found:
        raise ValueError(
            f"distill.teacher: {place} has other weights than when {p.run.folder} began; bring those back, or train "
            "anew under another `name`"
        )


def fingerprint(weights: Any) -> str:
    """Returns a short text that tells weights from others: of every bit of each, whatever devices hold them."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in sorted(tree.flatten(weights).items()):
        sums = np.asarray(jax.device_get(_sums(leaf)))
        digest.update(f"{path} {leaf.shape} {leaf.dtype} ".encode() + sums.tobytes())
    return digest.hexdigest()


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    """Returns four sums of an array's bits, each number times an odd one of its place, modulo 2³²: they are exact in
    any order."""
    width = jnp.dtype(x.dtype).itemsize
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        at = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = place * jnp.uint32(size) + at
    found = []
    for factor in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F):
        mixed = (place + jnp.uint32(1)) * jnp.uint32(factor)
        mixed = mixed ^ (mixed >> jnp.uint32(15))
        found.append(((bits ^ (bits >> jnp.uint32(16))) * (mixed | jnp.uint32(1))).sum(dtype=jnp.uint32))
    return jnp.stack(found)
