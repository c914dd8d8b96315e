"""Keeps what waits for an engine in the order in which it is worked on."""

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxlm.inference.engine.answer import Answer


@dataclass
class Waiting:
    """Answers of one request whose prompt is to be read, once for all of them."""

    answers: list[Answer]
    number: int
    """The place of the request in the order in which they came."""

    @property
    def order(self) -> tuple[int, int]:
        return self.answers[0].request.priority, self.number


class Line:
    """A line of what waits: by priority, then in the order in which the requests came."""

    def __init__(self) -> None:
        self._items: list[Waiting] = []

    def __len__(self) -> int:
        """Counts the answers that wait."""
        return sum(len(item.answers) for item in self._items)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._items)

    @property
    def first(self) -> Waiting | None:
        return self._items[0] if self._items else None

    def add(self, item: Waiting) -> None:
        bisect.insort(self._items, item, key=lambda w: w.order)

    def take(self, count: int) -> Waiting:
        """Removes and returns the first `count` answers of the first request."""
        item = self._items[0]
        taken, item.answers = item.answers[:count], item.answers[count:]
        if not item.answers:
            self._items.pop(0)
        return Waiting(taken, item.number)

    def remove(self, unwanted: Callable[[Answer], bool]) -> list[Answer]:
        """Removes and returns the unwanted answers."""
        out = [a for item in self._items for a in item.answers if unwanted(a)]
        for item in self._items:
            item.answers = [a for a in item.answers if not unwanted(a)]
        self._items = [item for item in self._items if item.answers]
        return out
