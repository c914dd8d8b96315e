"""Where adapters go: the matrices of a model's layers, found by the family's table of names in published files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.core import tree
from jaxlm.core.spec import Spec, is_spec
from jaxlm.core.weight_names import Name
from jaxlm.nn.family import Family


@dataclass(frozen=True)
class Site:
    """A matrix of a stack of layers: its inputs are its first dimensions, outputs the others."""

    path: str
    spec: Spec
    """Stacked: layers first."""
    ins: int
    name: Name
    """In published files."""

    @property
    def outs(self) -> int:
        return len(self.spec.shape) - self.lead - self.ins

    @property
    def lead(self) -> int:
        """Dimensions before the inputs: layers, and experts."""
        return 2 if self.experts else 1

    @property
    def layers(self) -> int:
        return self.spec.shape[0]

    @property
    def experts(self) -> bool:
        return "experts" in self.spec.axes

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.spec.shape[self.lead : self.lead + self.ins]

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.spec.shape[self.lead + self.ins :]

    @property
    def in_axes(self) -> tuple[str | None, ...]:
        return self.spec.axes[self.lead : self.lead + self.ins]

    @property
    def out_axes(self) -> tuple[str | None, ...]:
        return self.spec.axes[self.lead + self.ins :]


def matrices(family: Family, c: Any) -> dict[str, Site]:
    """Returns every matrix of the layers but routers, which stay exact."""
    names = family.names(c)
    return {
        path: Site(path, s, ins, names[path])
        for path, s in tree.flatten(family.specs(c), is_spec).items()
        if s.axes[:1] == ("layers",) and (ins := names[path].ins) is not None and s.role in ("matrix", "absorbed")
    }


def chosen(every: Mapping[str, Site], patterns: Sequence[str]) -> dict[str, Site]:
    """Returns those that a pattern is found in (`all`: every one). Left out are experts, which go through no `einsum`,
    and absorbed matrices, which decoding multiplies in another order."""
    may = {path: s for path, s in every.items() if not s.experts and s.spec.role != "absorbed"}
    if tuple(patterns) == ("all",):
        return may
    wanted = tree.matcher(patterns, may, "adapter.targets")
    return {path: s for path, s in may.items() if wanted(path)}
