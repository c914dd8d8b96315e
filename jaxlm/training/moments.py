"""Names what an optimizer remembers, so that the optimizer of another run, or of a larger model, can go on with it.

An optax chain nests its parts as a run's settings say: a group for each kind of weight, a scale for each layer. The
names here don't depend on that, so that runs whose settings nest differently understand each other.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import optax

ORDERS = {
    ("ScaleByAdamState", "mu"): 1, ("ScaleByAdamState", "nu"): 2, ("TraceState", "trace"): 1,
    ("ScaleByLionState", "mu"): 1, ("MuonState", "mu"): 1,
}  # fmt: skip
"""The power of the gradient that an average is of, by the class of the state and its field."""


class Slot(NamedTuple):
    """A slot is the place of an array that an optimizer remembers."""

    record: str
    """The class of the part of the state, such as `ScaleByAdamState`; a second one in a chain has a number too."""
    field: str
    weight: str
    """The path of the weight that it belongs to; empty: a counter, or what belongs to all."""

    @property
    def part(self) -> str:
        """Returns the slot's name without the weight."""
        return f"{self.record}/{self.field}"


def slots(state: Any) -> dict[Slot, tuple[str, Any]]:
    """Returns each slot of an optimizer's state with its path in a checkpoint, and its leaf.

    Counters of schedules are left out: they belong to a run's own learning rate.
    """
    return {slot: (path, leaf) for slot, path, leaf in _walk(state, (), Slot("", "", ""), {})}


def _walk(x: Any, at: tuple[str, ...], slot: Slot, seen: dict[str, int]) -> Iterator[tuple[Slot, str, Any]]:
    if x is None or isinstance(x, optax.ScaleByScheduleState):
        return
    if isinstance(x, dict):
        for name in sorted(x):
            inner = slot._replace(weight=f"{slot.weight}/{name}".lstrip("/"))
            yield from _walk(x[name], (*at, name), inner, seen)
    elif type(x) in (tuple, list):
        for i, part in enumerate(x):
            yield from _walk(part, (*at, str(i)), slot, seen)
    elif isinstance(x, tuple):  # a state of optax: a NamedTuple
        name = type(x).__name__
        seen[name] = seen.get(name, 0) + 1
        record = name if seen[name] == 1 else f"{name}{seen[name]}"
        for field, part in x._asdict().items():  # type: ignore[attr-defined]
            yield from _walk(part, (*at, field), Slot(record, field, ""), seen)
    else:
        yield slot, "/".join(at), x


def unmapped(slots: Iterable[Slot]) -> str | None:
    """Returns the class of a part of a state whose arrays aren't averages of a known power of each weight's gradient,
    and so can't become those of a larger model; None: there is none."""
    known = {record for record, _ in ORDERS}
    for slot in slots:
        if slot.record not in known or (slot.weight and (slot.record, slot.field) not in ORDERS):
            return slot.record
    return None
