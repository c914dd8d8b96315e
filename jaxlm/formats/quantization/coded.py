"""A matrix of few bits as published files need it: its codes, scales and zero points in the order of the file.

Our leaves hold [inputs, outputs] in the model's own dimensions, a stack of layers at a time; files hold [out, in] of
one layer, and of several of our weights where they are fused there.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.core.weight_names import Part, Tensor
from jaxlm.weights.few_bits import Fp8, Int4, Mxfp4, Scaled
from jaxlm.weights.quantized import Int8

KINDS: dict[type, str] = {Int4: "int4", Int8: "int8", Fp8: "fp8", Mxfp4: "mxfp4"}


class Planned(NamedTuple):
    """A tensor that will be written, and what makes it when its turn comes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


Tensors = dict[str, Planned]
"""The tensors of a matrix by their last names."""


class Form(NamedTuple):
    """Says how a matrix is stored. Matrices of one form have the same settings in a config.json."""

    kind: str
    """int4, int8, fp8 or mxfp4."""
    group: int
    """How many inputs share a scale; 0: all of them."""
    block: int = 0
    """The side of the square blocks that share a scale; 0: no blocks."""
    zero_points: bool = False
    dynamic: bool = False
    """Whether its inputs are rounded to eight bits too, each row by its largest magnitude."""


class Coded:
    """A Coded matrix is one tensor of a published file, [out, in], of which a part is made when it is asked for.

    ValueError: the weights that the file keeps in it aren't alike, or are of a kind that can't be laid out so.
    """

    def __init__(self, name: str, tensor: Tensor, leaves: Mapping[str, Any]) -> None:
        self.name, self.tensor, self._leaves = name, tensor, leaves
        own = [leaves[part.path] for part in tensor.parts]
        first = tensor.parts[0].path
        for part, leaf in zip(tensor.parts, own, strict=True):
            if isinstance(leaf, Scaled):
                raise ValueError(
                    f"{part.path}: multiplies its inputs by a vector first, for which {name} has no place; compress "
                    "without own_scales, or export as hf"
                )
            if type(leaf) not in KINDS:
                raise ValueError(
                    f"{part.path}: is stored as {type(leaf).__name__.lower()}, for which {name} has no place; export "
                    "as hf"
                )
        forms = {_form(leaf) for leaf in own}
        if len(forms) > 1 or tensor.lead:
            why = "experts in one tensor" if tensor.lead else "in one tensor weights that are stored in different ways"
            raise ValueError(f"{first}: files of this model keep {why} ({name}); export as hf, or compress them alike")
        (self.form,) = forms
        *_, a, b = tensor.shape
        self.outs, self.ins = (a, b) if tensor.entry.order == "out_in" else (b, a)
        self.is_conv1d = tensor.entry.order == "in_out"
        if self.form.block and any(np.prod(p.shape[self._ins :]) % self.form.block for p in tensor.parts[:-1]):
            raise ValueError(f"{first}: its blocks end amid those of {name}; export as hf")

    @property
    def _ins(self) -> int:
        assert self.tensor.entry.ins is not None
        return self.tensor.entry.ins

    @property
    def module(self) -> str:
        """Returns the name of the module whose weight it is."""
        return self.name.removesuffix(".weight")

    @property
    def groups(self) -> int:
        """Returns how many scales an output has, or a row of blocks."""
        size = self.form.block or self.form.group or self.ins
        return -(-self.ins // size)

    def codes(self) -> np.ndarray:
        """Returns the codes [out, in]: int4 from 0 to 15 with 8 in the middle, int8, fp8, or codes of e2m1."""
        return self._joined(_codes, self.ins)

    def scales(self) -> np.ndarray:
        """Returns the scales [out, groups], of blocks [out blocks, in blocks]; MXFP4's as exponents."""
        if self.form.block:
            found = [np.asarray(_of(self._leaves, part).scale).T for part in self.tensor.parts]
            return np.ascontiguousarray(np.concatenate(found))
        return self._joined(lambda leaf: np.asarray(leaf.scale), self.groups)

    def zeros(self) -> np.ndarray:
        """Returns the codes that stand for 0, [out, groups] uint8; without zero points the middle one."""
        if not self.form.zero_points:
            return np.full((self.outs, self.groups), 8, np.uint8)
        return self._joined(lambda leaf: np.asarray(leaf.zero), self.groups)

    def _joined(self, take: Callable[[Any], np.ndarray], rows: int) -> np.ndarray:
        """Returns what is taken of each part's leaf, [rows, outputs of ours], as the file has it: [out, rows]."""
        parts, arrays = [], []
        for part in self.tensor.parts:
            shape = (rows, *part.shape[self._ins :])
            parts.append(Part(part.path, part.index, shape))
            arrays.append(take(_of(self._leaves, part)).reshape(shape))
        entry = dataclasses.replace(self.tensor.entry, ins=1, order="out_in")
        return Tensor((self.outs, rows), tuple(parts), entry).join(arrays)


def _of(leaves: Mapping[str, Any], part: Part) -> Any:
    """Returns the leaf of one layer, and expert."""
    return jax.tree.map(lambda x: x[part.index], leaves[part.path])


def _form(leaf: Any) -> Form:
    kind = KINDS[type(leaf)]
    if isinstance(leaf, Int4):
        return Form(kind, leaf.group if leaf.group <= leaf.inputs else 0, zero_points=leaf.zero is not None)
    if isinstance(leaf, Fp8):
        return Form(kind, 0, leaf.block, dynamic=leaf.dynamic)
    if isinstance(leaf, Int8):
        return Form(kind, 0, dynamic=leaf.dynamic)
    return Form(kind, leaf.group)


def _codes(leaf: Any) -> np.ndarray:
    if isinstance(leaf, Int4 | Mxfp4):
        packed = np.asarray(leaf.int4 if isinstance(leaf, Int4) else leaf.mxfp4)
        return np.stack([packed >> 4, packed & 15], 1).reshape(-1, packed.shape[1])[: leaf.inputs]
    return np.asarray(leaf.int8 if isinstance(leaf, Int8) else leaf.fp8)


def coded(table: Mapping[str, Tensor], leaves: Mapping[str, Any], is_few: Callable[[Any], bool]) -> dict[str, Coded]:
    """Returns the matrices of few bits by their tensors' names in files. ValueError: one can't be laid out there."""
    found = {}
    for name, tensor in table.items():
        few = [is_few(leaves[part.path]) for part in tensor.parts]
        if any(few) and not all(few):
            paths = ", ".join(sorted({part.path for part in tensor.parts}))
            raise ValueError(f"{paths}: are one tensor in files ({name}), but only some are in few bits; export as hf")
        if all(few):
            found[name] = Coded(name, tensor, leaves)
    return found
