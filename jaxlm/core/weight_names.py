"""Where each of our weights stands in a published file: the language that every family's name table is written in.

A family's `names(c)` maps our paths to entries: `{"blocks/q": linear("model.layers.{layer}.self_attn.q_proj.weight")}`.
`tensors` makes the list of a file's tensors of it and the specs, and both reading and writing follow that one list.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxlm.core import tree
from jaxlm.core.spec import Spec, is_spec


@dataclass(frozen=True)
class Name:
    """States how one of our weights stands in a file. `{layer}` and `{expert}` in the name stand for their numbers."""

    file: str
    ins: int | None = None
    """How many of our leading dimensions are inputs; None: the file has our order of dimensions."""
    order: Literal["out_in", "in_out"] = "out_in"
    """PyTorch's Linear stores [out, in], GPT-2's Conv1D [in, out]."""
    flat: bool = False
    """The file's tensor has one dimension."""
    group: tuple[str, ...] = ()
    """Our weights that share the file's tensor, in their order there; empty: this one alone."""
    axis: int = 0
    """Output dimension along which the group is laid end to end; -1: interleaved, one output of each in turn."""
    first: int = 0
    """Number in the file of the first layer of our stack."""


def same(file: str, **options: Any) -> Name:
    """Returns the entry of an embedding, or whatever has our own order of dimensions in the file."""
    return Name(file, **options)


def vector(file: str, **options: Any) -> Name:
    """Returns the entry of a bias or a norm's scale, which has one dimension in the file."""
    return Name(file, flat=True, **options)


def linear(file: str, ins: int = 1, **options: Any) -> Name:
    """Returns the entry of PyTorch's Linear, [out, in]; `ins` of our leading dimensions are its input."""
    return Name(file, ins=ins, **options)


@dataclass(frozen=True)
class Part:
    """Names one layer (and expert) of one of our weights."""

    path: str
    index: tuple[int, ...]
    """(), (layer,), (expert,) or (layer, expert): leading indices of our stacked weight."""
    shape: tuple[int, ...]
    """The shape of `weight[index]`."""


@dataclass(frozen=True)
class View:
    """States where a part stands in its file tensor: `array.reshape(shape)[index].transpose(order)` is the part."""

    shape: tuple[int, ...]
    index: tuple[slice | int, ...]
    order: tuple[int, ...]

    def at(self, where: Sequence[slice]) -> tuple[slice, ...]:
        """Returns the index into `array.reshape(shape)` of a stretch of each dimension, in the view's order."""
        rest = iter(where)
        return tuple(
            slice(i, i + 1) if isinstance(i, int) else slice(i.start + w.start, i.start + w.stop)
            for i in self.index
            for w in ([slice(0, 1)] if isinstance(i, int) else [next(rest)])
        )


@dataclass(frozen=True)
class Tensor:
    """Describes a tensor of a file and the parts of our weights that it holds."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    entry: Name
    lead: int = 0
    """Dimensions before outputs and inputs: 1 where the file holds all experts in one tensor."""

    @functools.cached_property
    def views(self) -> tuple[View, ...]:
        """Returns how each part is cut out of the file's tensor."""
        n, ins, axis = self.lead, self.entry.ins or 0, self.entry.axis
        turned = self.entry.order == "out_in"  # inputs come first in our weights, last in the file
        views, start = [], 0
        for i, part in enumerate(self.parts):
            dims: list[tuple[int, slice | int]] = [(size, slice(0, size)) for size in part.shape]
            lead, inputs, outs = dims[:n], dims[n : n + ins], dims[n + ins :]
            if len(self.parts) > 1 and axis == -1:
                outs.insert(1, (len(self.parts), i))
            elif len(self.parts) > 1:
                size = outs[axis][0]
                outs[axis] = (sum(p.shape[n + ins + axis] for p in self.parts), slice(start, start + size))
                start += size
            k, o = len(dims), len(dims) - ins
            order = (*range(n), *range(o, k), *range(n, o)) if turned else range(k)
            dims = lead + (outs + inputs if turned else inputs + outs)
            views.append(View(tuple(size for size, _ in dims), tuple(index for _, index in dims), tuple(order)))
        return tuple(views)

    def split(self, array: np.ndarray) -> list[np.ndarray]:
        """Returns the file's tensor in our layout, one array for each part, as views where possible."""
        return [array.reshape(v.shape)[v.index].transpose(v.order) for v in self.views]

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """Returns the file's tensor that holds these parts: the inverse of `split`."""
        out = np.empty(self.shape, parts[0].dtype)
        for view, part in zip(self.views, parts, strict=True):
            out.reshape(view.shape)[view.index].transpose(view.order)[...] = part
        return out


def tensors(names: Mapping[str, Name], specs: Any) -> dict[str, Tensor]:
    """Returns every tensor of a file, by its name there, in the order of the table.

    A weight of `specs` without an entry is our slip; entries of weights that `specs` lacks are left out, so one table
    serves a family with and without its optional parts.
    """
    flat: dict[str, Spec] = tree.flatten(specs, is_spec)
    missing = flat.keys() - names.keys()
    assert not missing, f"no entry in the name table for {sorted(missing)}"
    out: dict[str, Tensor] = {}
    for path, entry in names.items():
        if path not in flat or (entry.group and path != next(m for m in entry.group if m in flat)):
            continue
        members = [m for m in entry.group or (path,) if m in flat]
        spec = flat[path]
        layers = range(spec.shape[0]) if spec.axes[:1] == ("layers",) else [None]
        stacked = "experts" in spec.axes
        experts = range(spec.shape[spec.axes.index("experts")]) if stacked and "{expert}" in entry.file else [None]
        lead = int(stacked and "{expert}" not in entry.file)
        for layer in layers:
            for expert in experts:
                index = tuple(i for i in (layer, expert) if i is not None)
                parts = tuple(Part(m, index, flat[m].shape[len(index) :]) for m in members)
                file = entry.file.format(layer=(layer or 0) + entry.first, expert=expert)
                assert file not in out, f"two entries for {file}"
                out[file] = Tensor(_shape(entry, parts, lead), parts, entry, lead)
    return out


def _shape(entry: Name, parts: tuple[Part, ...], lead: int) -> tuple[int, ...]:
    ins = entry.ins or 0
    first = parts[0].shape
    outs = sum(math.prod(p.shape[lead + ins :]) for p in parts)
    if entry.flat:
        return (*first[:lead], outs)
    if entry.ins is None:
        assert len(parts) == 1, "a group needs `flat` or `ins`"
        return first
    inputs = math.prod(first[lead : lead + ins])
    return (*first[:lead], *((outs, inputs) if entry.order == "out_in" else (inputs, outs)))


def fused(kind: Callable[..., Name], file: str, *members: str, **options: Any) -> dict[str, Name]:
    """Returns the entries of weights that the file keeps in one tensor.

    For example `fused(linear, "…qkv_proj.weight", "blocks/q", "blocks/k", "blocks/v")`.
    """
    return dict.fromkeys(members, kind(file, group=members, **options))
