"""Runs any family's model one layer at a time over batches: states stay on the devices between layers, so that memory
holds one layer's weights, and a layer can be looked at and changed before the next one sees what it gives.

A family's `forward` is called as it is, with `block_stack.Window` in place of its stacks: what stands before and after
the layer is computed by nobody, as nothing depends on it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import spec, tree
from jaxlm.nn.block_stack import Window
from jaxlm.nn.family import Family, RunsItself
from jaxlm.nn.layout import Layout
from jaxlm.weights.compress.recording import observe
from jaxlm.weights.compress.statistics import Statistics
from jaxlm.weights.matrices import Matrix

ENCODER, CROSS = "encoder", ("cross_k", "cross_v")


@dataclass(frozen=True)
class Stack:
    """A Stack is a stack of layers that follow each other."""

    path: str
    layers: int
    alike: tuple[int, ...]
    """The number of the first layer of each layer's kind, so that one program serves all of a kind."""
    specs: Mapping[str, spec.Spec]
    """By path in the stack."""

    @classmethod
    def of(cls, path: str, specs: Mapping[str, spec.Spec], kinds: Sequence[Any] = ()) -> "Stack":
        """Returns the stack of these specs, whose layers differ by `kinds`; none: they are all of one."""
        n = next(iter(specs.values())).shape[0]
        kinds = list(kinds) or [None] * n
        return cls(path, n, tuple(kinds.index(kind) for kind in kinds), specs)

    @property
    def side(self) -> str:
        """Says which sequence of stacks it belongs to: an encoder's, a decoder's, or the only one."""
        return self.path.rpartition("/")[0]


class LayerWalk:
    """A LayerWalk holds the states of batches between two layers of a model."""

    def __init__(self, family: Family, c: Any, rest: Any, batches: Sequence[Any], shard: Layout) -> None:
        """`rest`: the weights that belong to no stack. ValueError: the family loops over its layers itself."""
        if isinstance(family, RunsItself):
            raise ValueError("model: its modules loop over their layers themselves, so none can be run alone")
        self.family, self.c, self.shard, self.rest, self.batches = family, c, shard, rest, batches
        self.specs = family.specs(c)
        self._stacks = spec.stacks(self.specs)
        self.stacks = self._in_order()
        self.states: list[Any] = []
        self._finished: dict[str, list[Any]] = {}
        self._run = jax.jit(self._left, static_argnames=("stack", "first"))
        self._observe = jax.jit(self._observed, static_argnames=("stack", "first", "hessian"))
        self._enter = jax.jit(partial(self._left, layer=None), static_argnames=("stack", "first"))

    def begin(self, stack: Stack) -> None:
        """Computes the states that reach a stack; those before it must have been gone through."""
        self.states = [
            self._enter(self.rest, batch, self._others(i), None, stack=stack.path, first=0)
            for i, batch in enumerate(self.batches)
        ]
        for path in [p for p in self._finished if p.rpartition("/")[0] == stack.side]:
            del self._finished[path]  # what follows it has been reached

    def observe(
        self, stack: Stack, layer: int, weights: Any, recorded: Mapping[str, Matrix], hessian: bool
    ) -> dict[str, Statistics]:
        """Returns a record of what the matrices of a layer, by their paths in it, read on the present states."""
        found: dict[str, Statistics] = {}
        self._recorded = recorded
        for i, (batch, x) in enumerate(zip(self.batches, self.states, strict=True)):
            now = self._observe(
                self.rest, batch, self._others(i), x, weights, stack=stack.path, first=stack.alike[layer],
                hessian=hessian,
            )  # fmt: skip
            found = now if not found else _merged(found, now)
        return found

    def probe(
        self, stack: Stack, layer: int, recorded: Mapping[str, Matrix]
    ) -> Callable[[Any], tuple[jax.Array, dict[str, Statistics]]]:
        """Returns the function of a layer's weights that gives the states behind it, and a record of what its matrices
        read, on the first batch; `begin` must have been called."""

        def run(rest: Any, batch: Any, others: Any, x: Any, weights: Any) -> tuple[jax.Array, dict[str, Statistics]]:
            def forward(weights: Any) -> jax.Array:
                left = self._left(rest, batch, others, x, weights, stack=stack.path, first=stack.alike[layer])
                return jax.tree.leaves(left)[0]

            counted = {path: self._counted(batch, stack.path, path) for path in recorded}
            return observe(forward, weights, recorded, counted, hessian=False, stacked=False)

        return partial(jax.jit(run), self.rest, self.batches[0], self._others(0), self.states[0])

    def run(self, stack: Stack, layer: int, weights: Any) -> None:
        """Takes the states through a layer of these weights."""
        for i, batch in enumerate(self.batches):
            self.states[i] = self._run(
                self.rest, batch, self._others(i), self.states[i], weights, stack=stack.path, first=stack.alike[layer]
            )

    def end(self, stack: Stack) -> None:
        """Keeps the states that a stack gives, which another may read."""
        self._finished[stack.path] = self.states

    def _others(self, i: int) -> dict[str, Any]:
        return {path: states[i] for path, states in self._finished.items()}

    def _in_order(self) -> list[Stack]:
        """Returns the stacks in the order in which `forward` comes to them."""
        windows: dict[str, Window] = {}

        def trace(rest: Any, batch: Any) -> jax.Array:
            met: list[Window] = []
            windows.update({path: Window(met=met) for path in self._stacks})
            return self._forward(rest, batch, windows)

        jax.eval_shape(trace, self.rest, self.batches[0])
        met = next(iter(windows.values())).met
        paths = {id(window): path for path, window in windows.items()}
        found = []
        for window in met:
            path = paths[id(window)]
            found.append(Stack.of(path, self._stacks[path], window.kinds))
        assert len(found) == len(self._stacks)
        return found

    def _forward(self, rest: Any, batch: Any, windows: Mapping[str, Window]) -> jax.Array:
        params = rest
        for path, window in windows.items():
            params = tree.put(params, path, window)
        return self.family.forward(self.c, self.specs, params, batch, shard=self.shard).x_BTD

    def _left(self, rest: Any, batch: Any, others: Any, x: Any, layer: Any, *, stack: str, first: int) -> Any:
        """Returns the states behind a layer, or those that reach the stack."""
        windows = {path: Window(x=others.get(path)) for path in self._stacks}
        windows[stack] = Window(() if layer is None else (layer,), first, x)
        self._forward(rest, batch, windows)
        return windows[stack].left

    def _observed(
        self, rest: Any, batch: Any, others: Any, x: Any, layer: Any, *, stack: str, first: int, hessian: bool
    ) -> dict[str, Statistics]:
        def forward(layer: Any) -> jax.Array:
            left = self._left(rest, batch, others, x, layer, stack=stack, first=first)
            return jax.tree.leaves(left)[0]

        weights = {path: self._counted(batch, stack, path) for path in self._recorded}
        return observe(forward, layer, self._recorded, weights, hessian=hessian, stacked=False)[1]

    def _counted(self, batch: Any, stack: str, path: str) -> jax.Array:
        """Returns how much each token counts of those that a matrix reads: 0 is padding."""
        of_source = self.family.kind == "encoder_decoder" and (stack.split("/")[0] == ENCODER or path in CROSS)
        tokens, segments = ("source", "source_segments") if of_source else ("tokens", "segments")
        if segments not in batch:
            return jnp.ones(batch[tokens].shape, jnp.float32)
        return (batch[segments] > 0).astype(jnp.float32)


_merged: Callable[..., dict[str, Statistics]] = jax.jit(
    lambda a, b: {path: record.merge(b[path]) for path, record in a.items()}, donate_argnums=0
)
