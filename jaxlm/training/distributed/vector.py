"""Lays the trained weights out as one float32 vector in the host's memory, in the order of their paths; compresses
deltas of it piece by piece, so that no second vector is needed; and cuts it for servers that each hold a part.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxlm.training.distributed import compression

CHUNK = 1 << 20
"""Numbers that are worked on at one time; a multiple of the blocks that share a scale."""
Packed = dict[str, np.ndarray]
"""A compressed vector as `compression` has it, in the host's memory."""


def places(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Returns where each weight begins and ends in the vector, by its path."""
    out, at = {}, 0
    for path in sorted(shapes):
        out[path] = (at, at + math.prod(shapes[path]))
        at = out[path][1]
    return out


def to_vector(leaves: Mapping[str, Any], where: Mapping[str, tuple[int, int]]) -> np.ndarray:
    """Returns the vector of weights that are arrays of numpy or jax; each comes to the host by itself."""
    out = np.empty(max((last for _, last in where.values()), default=0), np.float32)
    for path, (first, last) in where.items():
        out[first:last] = np.asarray(leaves[path], np.float32).reshape(-1)
    return out


def parts(count: int, number: int) -> list[tuple[int, int]]:
    """Returns where each of several like parts of a vector begins and ends; blocks that share a scale stay whole."""
    size = math.ceil(math.ceil(count / number) / compression.BLOCK) * compression.BLOCK
    return [(min(count, i * size), min(count, (i + 1) * size)) for i in range(number)]


def chunks(count: int) -> Iterator[slice]:
    """Yields the pieces of a vector that are worked on at one time."""
    yield from (slice(at, min(count, at + CHUNK)) for at in range(0, count, CHUNK))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _with_feedback(kind: str, x_N: jax.Array, error_N: jax.Array, decay: float) -> Any:
    return compression.with_feedback(kind, x_N, error_N, decay)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _decompress(kind: str, packed: Any, count: int) -> jax.Array:
    return compression.decompress(kind, packed, count)


def pack(kind: str, delta_N: np.ndarray, error_N: np.ndarray | None, decay: float) -> Packed:
    """Returns a compressed delta; the errors of earlier ones are added to it, and `error_N` becomes what is left."""
    if kind == "none":
        return {"values": delta_N}
    pieces: list[Packed] = []
    for at in chunks(delta_N.size):
        before = np.zeros_like(delta_N[at]) if error_N is None else error_N[at]
        packed, left = _with_feedback(kind, delta_N[at], before, decay)
        pieces.append({name: np.asarray(x) for name, x in packed.items()})
        if error_N is not None:
            error_N[at] = np.asarray(left)
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def cut(kind: str, packed: Mapping[str, np.ndarray], first: int, last: int) -> Packed:
    """Returns the compressed numbers `first` to `last`, of which `first` begins a block."""
    if kind in ("none", "bfloat16"):
        return {"values": packed["values"][first:last]}
    blocks = slice(first // compression.BLOCK, math.ceil(last / compression.BLOCK))
    return {name: x[blocks] for name, x in packed.items()}


def unpack(kind: str, packed: Mapping[str, np.ndarray], at: slice) -> np.ndarray:
    """Returns the numbers of a piece of a compressed vector, float32."""
    if kind == "none":
        return packed["values"][at]
    piece = cut(kind, packed, at.start, at.stop)
    return np.asarray(_decompress(kind, piece, at.stop - at.start))


def fault(kind: str, packed: Mapping[str, np.ndarray], count: int) -> str:
    """Returns what is wrong with a compressed vector that should have `count` numbers; empty: nothing."""
    like = jax.eval_shape(lambda x: compression.compress(kind, x), jax.ShapeDtypeStruct((count,), np.float32))
    if packed.keys() != like.keys():
        return f"its parts are {sorted(packed)} instead of {sorted(like)}"
    for name, x in packed.items():
        if x.shape != like[name].shape or x.dtype != like[name].dtype:
            return f"{name} is {x.dtype}{list(x.shape)} instead of {like[name].dtype}{list(like[name].shape)}"
    numbers = packed.get("scales", packed["values"])
    if not all(np.isfinite(numbers[at]).all() for at in chunks(len(numbers))):
        return "it holds numbers that are not finite"
    return ""


def size(packed: Mapping[str, np.ndarray]) -> int:
    """Returns the bytes of a compressed vector."""
    return sum(x.nbytes for x in packed.values())
