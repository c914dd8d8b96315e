"""The matrices of a model's layers, by their roles and the table of names in published files: what adapters are put on,
and what is quantized."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.core import tree
from jaxlm.core.spec import Spec, is_spec
from jaxlm.core.weight_names import Name
from jaxlm.nn.family import Family, RunsItself

TABLE, HEAD = "embed", "head"
"""Paths of a decoder's table of embeddings and of its head, which has its own name here where it is tied too."""
TABLE_PATTERNS = {f"{before}{path}{after}": path for path in (TABLE, HEAD) for before, after in (("", ""), "^$")}
"""What of an adapter's targets means these two: their whole names alone."""


@dataclass(frozen=True)
class Matrix:
    """A `Matrix` describes one matrix of each layer of a stack: its first dimensions are inputs, the others outputs. Or
    a table, whose input is a row's number; or a head, whose input comes last."""

    path: str
    spec: Spec
    """The spec of the stack: layers come first."""
    ins: int
    """How many input dimensions there are."""
    name: Name
    """The entry of the family's table of names."""

    @property
    def is_table(self) -> bool:
        """Says whether it stands outside of the layers: a table, or a head, tied or of its own."""
        return self.spec.axes[:1] != ("layers",)

    @property
    def outs(self) -> int:
        return len(self.spec.shape) - self.lead - self.ins

    @property
    def lead(self) -> int:
        """How many dimensions stand before the inputs: layers, and experts."""
        return 0 if self.is_table else 2 if self.experts else 1

    @property
    def layers(self) -> int:
        return self.spec.shape[0]

    @property
    def experts(self) -> bool:
        return "experts" in self.spec.axes

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self._inputs(self.spec.shape)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self._outputs(self.spec.shape)

    @property
    def inputs(self) -> int:
        """Returns how many numbers it reads."""
        return math.prod(self.in_shape)

    @property
    def outputs(self) -> int:
        """Returns how many numbers it gives."""
        return math.prod(self.out_shape)

    @property
    def in_axes(self) -> tuple[str | None, ...]:
        return self._inputs(self.spec.axes)

    @property
    def out_axes(self) -> tuple[str | None, ...]:
        return self._outputs(self.spec.axes)

    def _inputs(self, dims: tuple[Any, ...]) -> tuple[Any, ...]:
        return dims[-1:] if self.path == HEAD else dims[self.lead : self.lead + self.ins]

    def _outputs(self, dims: tuple[Any, ...]) -> tuple[Any, ...]:
        return dims[:-1] if self.path == HEAD else dims[self.lead + self.ins :]


def matrices(family: Family, c: Any) -> dict[str, Matrix]:
    """Returns every matrix of the layers by its path, but routers, which stay exact."""
    names, found = family.names(c), {}
    for path, s in tree.flatten(family.specs(c), is_spec).items():
        if s.axes[:1] != ("layers",) or s.role not in ("matrix", "absorbed"):
            continue
        name = names.get(path) or Name(path, ins=_num_inputs(s))  # a family without published files has no names
        if name.ins is not None:
            found[path] = Matrix(path, s, name.ins, name)
    return found


def tables(family: Family, c: Any) -> dict[str, Matrix]:
    """Returns a decoder's table of embeddings and its head; of others, and of modules that run themselves, nothing."""
    specs, names = family.specs(c), family.names(c)
    if family.kind != "decoder" or isinstance(family, RunsItself) or not is_spec(specs.get(TABLE)):
        return {}
    own = {path: specs.get(path, specs[TABLE]) for path in (TABLE, HEAD)}
    return {path: Matrix(path, s, 1, names.get(path) or Name(path)) for path, s in own.items()}


def stored_at(path: str, specs: Mapping[str, Any]) -> str:
    """Returns where the weight lies: a tied head is the table."""
    return path if path in specs else TABLE


def _num_inputs(s: Spec) -> int | None:
    """Returns how many dimensions of a weight are inputs by its axes: all but the last where that is the width, else
    the first; None: it is no matrix."""
    dims = [axis for axis in s.axes if axis not in ("layers", "experts")]
    if len(dims) < 2:
        return None
    return len(dims) - 1 if dims[-1] == "embed" else 1


def select(matrices: Mapping[str, Matrix], patterns: Sequence[str]) -> dict[str, Matrix]:
    """Returns those that a pattern is found in (`all`: every one). Experts are left out, which go through no `einsum`,
    and so are absorbed matrices, which decoding multiplies in another order."""
    candidates = {path: m for path, m in matrices.items() if not m.experts and m.spec.role != "absorbed"}
    if tuple(patterns) == ("all",):
        return candidates
    wanted = tree.matcher(patterns, candidates, "adapter.targets")
    return {path: m for path, m in candidates.items() if wanted(path)}
