"""Finds what can be divided in a layer instead of the inputs of its matrices: the norm, or the matrix, that makes them.

AWQ and SmoothQuant multiply the rows of matrices by factors and divide their inputs. Where a norm's scale or a matrix's
outputs make these inputs, they are divided once and for all, and the model computes the same with no vector more. No
family says what makes what: a layer of random weights is run, as its `forward` has it, with one weight after another
multiplied by random factors. Matrices whose inputs are multiplied by just these factors read what it makes; if their
rows are divided by them, and the layer then gives what it gave, nothing else reads it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly import compress_journal
from jaxlm.assembly.layer_walk import LayerWalk, Stack
from jaxlm.core import spec, tree
from jaxlm.nn.layout import Layout
from jaxlm.weights.matrices import Matrix

POWERS = (0.25, 0.5, 2.0, 4.0)  # exact in floating point, and no square of them is 1
NEAR = 1e-4


@dataclass(frozen=True)
class Fold:
    """A Fold is a weight of a layer that makes the inputs of some of its matrices, and of nothing else."""

    source: str
    """The path in the layer of a norm's scale, or of a matrix, whose outputs they are; with its bias, if it has one."""
    readers: tuple[str, ...]
    """The paths in the layer of the matrices."""
    offset: float = 0.0
    """What a norm's scale is added to before it multiplies."""

    def with_bias(self, layer: Any) -> tuple[str, ...]:
        """Returns the paths of what is divided, in a layer's weights or their specs."""
        return tuple(p for p in (self.source, f"{self.source}_bias") if tree.at(layer, p) is not None)

    def divided(self, layer: Any, factors: jax.Array) -> Any:
        """Returns a layer's weights with the outputs of the source divided by factors, flat as the readers' inputs."""
        for path in self.with_bias(layer):
            w, offset = tree.at(layer, path), self.offset if path == self.source else 0.0
            layer = tree.put(layer, path, _times(w, 1 / factors, offset=offset))
        return layer


@jax.jit
def _times(w: jax.Array, factors: jax.Array, offset: float) -> jax.Array:
    """Multiplies the last dimensions of an array, as many as hold all factors, once an offset is added."""
    return ((w + offset).reshape(-1, factors.size) * factors[None] - offset).reshape(w.shape).astype(w.dtype)


@jax.jit
def multiplied_rows(w: jax.Array, factors: jax.Array) -> jax.Array:
    """Multiplies the first dimensions of a matrix, as many as hold all factors."""
    return (w.reshape(factors.size, -1) * factors[:, None]).reshape(w.shape).astype(w.dtype)


def find(walk: LayerWalk, stack: Stack, own: Mapping[str, Matrix], layout: Layout, mesh: Any) -> tuple[Fold, ...]:
    """Returns the folds of a stack, which hold in every kind of its layers; a matrix reads for one at most. `own` are
    all matrices of a layer by their paths in it. Experts, of which each reads other tokens, have none."""
    own = {path: m for path, m in own.items() if not m.experts}
    walk.begin(stack)
    layer = _random(stack, own, layout, mesh)
    found: list[Fold] | None = None
    for i in sorted(set(stack.alike)):
        probe = walk.probe(stack, i, own)
        held = _held(probe, layer, stack, own)
        found = held if found is None else [fold for fold in found if fold in held]
    taken: set[str] = set()
    out = []
    for fold in found or []:
        if not taken & set(fold.readers):
            out.append(fold)
            taken |= set(fold.readers)
    return tuple(out)


def _random(stack: Stack, own: Mapping[str, Matrix], layout: Layout, mesh: Any) -> Any:
    """Returns random weights of a layer, so that zeros and copies in a model's own weights hide nothing."""
    rng = np.random.default_rng(0)
    arrays, homes = {}, {}
    for path, s in sorted(stack.specs.items()):
        shape = s.shape[1:]
        drawn = rng.standard_normal(shape)
        if s.is_vector:
            drawn = drawn * 0.3 + (s.role in ("norm", "scale"))
        else:
            drawn /= math.sqrt(math.prod(own[path].in_shape) if path in own else shape[-2])
        arrays[path] = drawn.astype(s.dtype)
        homes[path] = s._replace(shape=shape, axes=s.axes[1:])
    return compress_journal.on_devices(arrays, layout.shardings(homes, mesh))


def _sources(stack: Stack, own: Mapping[str, Matrix]) -> dict[str, tuple[int, float]]:
    """Returns what may make inputs, norms first, with how many numbers it makes and what these are added to."""
    norms = {path: (math.prod(s.shape[1:]), spec.counts_from(s))
             for path, s in sorted(stack.specs.items()) if s.role in ("norm", "scale")}  # fmt: skip
    made = {path: (math.prod(m.out_shape), 0.0) for path, m in sorted(own.items()) if m.spec.role == "matrix"}
    return norms | made


def _held(probe: Any, layer: Any, stack: Stack, own: Mapping[str, Matrix]) -> list[Fold]:
    """Returns the folds of one kind of layers."""
    rng = np.random.default_rng(1)
    before, inputs = _read(probe, layer)
    found = []
    for source, (width, offset) in _sources(stack, own).items():
        factors = rng.choice(POWERS, width).astype(np.float32)
        tried = Fold(source, (), offset).divided(layer, 1 / jnp.asarray(factors))
        _, now = _read(probe, tried)
        wanted = {path: x * factors**2 for path, x in inputs.items() if x.size == width}
        readers = tuple(path for path in wanted if _near(now[path], wanted[path]))
        for path in readers:
            tried = tree.put(tried, path, multiplied_rows(tree.at(tried, path), 1 / jnp.asarray(factors)))
        after, now = _read(probe, tried)
        same = inputs | {path: wanted[path] for path in readers}
        if readers and _near(after, before) and all(_near(now[path], x) for path, x in same.items()):
            found.append(Fold(source, readers, offset))
    return found


def _read(probe: Any, layer: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the states behind a layer, and the mean square of each input of its matrices."""
    after, records = probe(layer)
    return np.asarray(after), {path: np.asarray(record.mean_square) for path, record in records.items()}


def _near(a: np.ndarray, b: np.ndarray) -> bool:
    """Says whether arrays are finite and the same but for rounding."""
    return bool(np.isfinite(b).all() and b.any() and np.allclose(a, b, rtol=NEAR * 10, atol=NEAR * np.abs(b).max()))
