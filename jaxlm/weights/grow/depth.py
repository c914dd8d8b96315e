"""Grows a model by layers: copies that add nothing at first (Wu et al. 2024, LLaMA-Pro), or whole stacks again (Gong et
al. 2019)."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.core import tree
from jaxlm.core.spec import Spec, sequences, stacks
from jaxlm.nn import block_stack


@dataclass(frozen=True)
class Layers:
    """A Layers says which old layer each layer of a grown stack is a copy of."""

    source: tuple[int, ...]
    new: tuple[bool, ...]
    """Whether the copy is to add nothing to the residual stream."""


Plan = dict[str, Layers]
"""The layers of every stack, by its path."""


def expansion(specs: Any, blocks: int) -> Plan:
    """Returns the plan that adds `blocks` layers, each a copy of the last layer of one of as many equal groups.

    An encoder and a decoder are each given so many. ValueError: the layers don't divide into these groups.
    """
    out: Plan = {}
    for side in sequences(specs):
        total = sum(n for _, n in side)
        if total % blocks:
            raise ValueError(f"blocks: {total} layers do not divide into {blocks} equal groups; choose a divisor")
        at, size = 0, total // blocks
        for path, n in side:
            source: list[int] = []
            new: list[bool] = []
            for i in range(n):
                at += 1
                source += [i, i] if at % size == 0 else [i]
                new += [False, True] if at % size == 0 else [False]
            out[path] = Layers(tuple(source), tuple(new))
    return out


def repetition(specs: Any, times: int) -> Plan:
    """Returns the plan that repeats the whole stack so many times. ValueError: layers of different shapes follow each
    other, which can't be repeated in their order."""
    out: Plan = {}
    for side in sequences(specs):
        if len(side) > 1:
            names = " and ".join(path for path, _ in side)
            raise ValueError(f"stack: layers of different shapes follow each other here ({names}); use blocks")
        ((path, n),) = side
        out[path] = Layers(tuple(range(n)) * times, (False,) * n * times)
    return out


def selection(specs: Any, layers: Sequence[int]) -> Plan:
    """Returns the plan of a smaller model that has these layers alone, numbered from 0 and in this order, of an encoder
    and a decoder each. ValueError: there is no such layer, or no model of them."""
    out: Plan = {}
    if not (sides := sequences(specs)):
        raise ValueError("start_layers: this family doesn't say which of its weights are layers; leave it out")
    for side in sides:
        total, first = sum(n for _, n in side), 0
        if any(i >= total for i in layers):
            raise ValueError(f"start_layers: the model has layers 0 to {total - 1}, and no {max(layers)}")
        if len(side) > 1 and list(layers) != sorted(layers):
            raise ValueError(
                "start_layers: layers of different shapes follow each other here; give them in their order"
            )
        for path, n in side:
            source = tuple(i - first for i in layers if first <= i < first + n)
            if not source:
                raise ValueError(f"start_layers: names none of layers {first} to {first + n - 1}, which are {path}")
            out[path] = Layers(source, (False,) * len(source))
            first += n
    return out


def chosen_layers(path: str, plan: Plan) -> tuple[int, ...] | None:
    """Returns which layers of a stacked weight a plan takes, in their order; None: it is no layer's."""
    return None if (stack := _stack_of(path, plan)) is None else plan[stack].source


def config(c: Any, specs: Any, plan: Plan) -> Any:
    """Returns the config of the grown model: with the counts of its layers, and each copy of the same kind as what it
    is a copy of. ValueError: the config doesn't count its layers."""
    fields = {f.name for f in dataclasses.fields(c)}
    if not plan or "layers" not in fields:
        raise ValueError("model: this family doesn't say which of its weights are layers; it can't grow by layers")
    changes: dict[str, Any] = {}
    order: list[int] = []
    for side in sequences(specs):
        start = 0
        for path, n in side:
            layers = plan[path]
            counts = c.layer_counts.get(path, ("layers",))
            for name in counts:
                before = changes.get(name, getattr(c, name))
                changes[name] = (n if before is None else before) + len(layers.source) - n
            if "layers" in counts:
                order += [start + i for i in layers.source]
            start += n
    for name in fields.intersection(c.layer_patterns):
        kinds = block_stack.repeated(getattr(c, name), c.layers)
        changes[name] = block_stack.pattern([kinds[i] for i in order])
    return dataclasses.replace(c, **changes)


def silent(stack: dict[str, Spec]) -> dict[str, float]:
    """Returns the weights of a stack, by path, that decide what its layers add to the residual stream, with the value
    at which they add nothing. ValueError: the specs don't say it."""
    stated = {path: s.silent for path, s in stack.items() if s.silent is not None}
    if stated:
        return stated
    ends = [path for path, s in stack.items() if s.is_matrix and s.role == "matrix" and s.axes[-1] == "embed"]
    if not ends:
        raise ValueError("blocks: the specs of this family don't say what its layers add to; no weight ends in `embed`")
    return dict.fromkeys([*ends, *(f"{path}_bias" for path in ends if f"{path}_bias" in stack)], 0.0)


def weights(specs: Any, old: Any, plan: Plan) -> Any:
    """Returns the weights of the grown model from those of `specs`."""

    def one(path: str, w: np.ndarray) -> np.ndarray:
        if (stack := _stack_of(path, plan)) is None:
            return w
        layers, inner = plan[stack], path.removeprefix(f"{stack}/")
        w = w[list(layers.source)]
        if any(layers.new) and inner in silences[stack]:
            w[list(layers.new)] = silences[stack][inner]
        return w

    found = stacks(specs)
    silences = {name: silent(found[name]) for name, layers in plan.items() if any(layers.new)}
    return tree.map_named(one, old)


def _stack_of(path: str, plan: Plan) -> str | None:
    return next((name for name in plan if path.startswith(f"{name}/")), None)


def moments(averages: Mapping[str, np.ndarray], plan: Plan) -> dict[str, np.ndarray]:
    """Returns averages of gradients, or of their squares, by path, as those of the grown model.

    Old layers keep theirs. Layers that add nothing have 0: no gradient comes to what lies behind their silent ends,
    while the gradients of these ends themselves have no counterpart in the old model. Layers of a repeated stack have
    copies, which are a guess, as the function changes.
    """

    def one(path: str, w: np.ndarray) -> np.ndarray:
        if (stack := _stack_of(path, plan)) is None:
            return w
        w = w[list(plan[stack].source)]
        w[list(plan[stack].new)] = 0
        return w

    return {path: one(path, w) for path, w in averages.items()}


def new_layers(specs: Any, plan: Plan) -> dict[str, list[int]]:
    """Returns the numbers, from 0, of the layers that add nothing at first, by the side they are on: `encoder`,
    `decoder`, or empty where there is one sequence."""

    def numbers(flags: Sequence[bool]) -> list[int]:
        return [i for i, new in enumerate(flags) if new]

    sides = {
        side[0][0].rpartition("/")[0]: [f for path, _ in side for f in plan[path].new] for side in sequences(specs)
    }
    return {side: numbers(flags) for side, flags in sides.items()}
