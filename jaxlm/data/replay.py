"""Rows of earlier tasks that a run keeps, and which of them stand in the batch of an update.

Every example has a priority, a number that is drawn from the seed, its task and its index alone; those with the lowest
are kept. That is reservoir sampling (each example is kept with the same probability, however many there are), gives the
same rows on any number of hosts, and the rows of a smaller memory are among those of a larger one.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxlm.data import loader
from jaxlm.data.mixture import shuffled
from jaxlm.data.packing import Records

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Kept:
    """A Kept holds the rows that are kept of one task, in the order of their priorities."""

    task: str
    arrays: Arrays
    """Leaves `[n, …]`, as the task's objective makes them."""
    priorities: np.ndarray
    """float64 `[n]`, ascending."""

    def __len__(self) -> int:
        return len(self.priorities)

    def take(self, indices: np.ndarray) -> "Kept":
        """Returns some of the rows."""
        return Kept(self.task, {name: leaf[indices] for name, leaf in self.arrays.items()}, self.priorities[indices])


def priorities(seed: int, task: str, n: int) -> np.ndarray:
    """Returns the priorities of a task's examples, float64 `[n]` in [0, 1)."""
    digest = hashlib.blake2b(f"{seed} {task}".encode(), digest_size=8).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big"))).random(n)


def first(seed: int, task: str, n: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the `count` examples of `n` with the lowest priorities, and these, ascending."""
    each = priorities(seed, task, n)
    order = np.argsort(each, kind="stable")[:count]
    return order, each[order]


class Chosen:
    """Some records of several parts, in a given order."""

    def __init__(self, parts: Sequence[Records], indices: np.ndarray) -> None:
        self.parts, self.indices = parts, indices
        self.edges = np.cumsum([0, *map(len, parts)])

    @classmethod
    def first(cls, parts: Sequence[Records], seed: int, name: str, count: int) -> "Chosen":
        """Returns the records with the lowest priorities."""
        return cls(parts, first(seed, name, sum(map(len, parts)), count)[0])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Any:
        return self.draw(i, np.random.default_rng(i))

    def draw(self, i: int, rng: np.random.Generator) -> Any:
        """Returns record i."""
        part = int(np.searchsorted(self.edges, self.indices[i], side="right")) - 1
        return loader.record(self.parts[part], int(self.indices[i] - self.edges[part]), rng)


def chosen(
    tasks: Sequence[Kept], *, examples: int, tokens: int, balance: Literal["none", "task", "class"]
) -> list[Kept]:
    """Returns the rows of each task that a memory of `examples` rows (0: any number) and `tokens` tokens (0: any
    number) keeps. ValueError: not a single one."""
    groups = [_groups(task, balance) for task in tasks]
    flat = [(i, rows) for i, parts in enumerate(groups) for rows in parts]
    if balance == "none":
        every = [(tasks[i].priorities[row], i, row) for i, rows in flat for row in rows.tolist()]
        order = [(i, row) for _, i, row in sorted(every)]
    else:  # the groups take turns, so that whatever the memory holds is balanced
        queues = [[(i, row) for row in rows.tolist()] for i, rows in flat]
        longest = max(map(len, queues), default=0)
        order = [queue[k] for k in range(longest) for queue in queues if k < len(queue)]
    order = order[: examples or None]
    if tokens:
        sizes = np.cumsum([_tokens(tasks[i], row) for i, row in order])
        order = order[: int(np.searchsorted(sizes, tokens, side="right"))]
    if not order:
        raise ValueError("continual.replay: keeps not a single row; raise examples, or tokens, or leave replay out")
    return [task.take(np.sort([row for j, row in order if j == i]).astype(int)) for i, task in enumerate(tasks)]


def _groups(task: Kept, balance: str) -> list[np.ndarray]:
    """Returns the rows of a task by their class, or all of them as one group."""
    target = task.arrays.get("target")
    if balance != "class" or target is None or target.ndim != 2 or not np.issubdtype(target.dtype, np.floating):
        return [np.arange(len(task))]
    classes = target.argmax(-1)
    return [np.flatnonzero(classes == label) for label in np.unique(classes)]


def _tokens(task: Kept, row: int) -> int:
    """Counts the tokens of a row without padding."""
    return sum(int(np.count_nonzero(task.arrays[name][row])) for name in ("segments", "source_segments")
               if name in task.arrays)  # fmt: skip


PREFIX = "replay/"


def key(task: int, name: str) -> str:
    """Returns the name that a leaf of a task's rows has in a batch."""
    return f"{PREFIX}{task}/{name}"


def task_of(name: str) -> int:
    """Returns the number of the task that a leaf named by `key` belongs to."""
    return int(name.split("/")[1])


def parted(batch: Mapping[str, Any]) -> tuple[Any, dict[int, Any]]:
    """Returns a batch's own leaves, and those of each earlier task by its number, under their plain names."""
    own = {name: leaf for name, leaf in batch.items() if not name.startswith(PREFIX)}
    earlier: dict[int, dict] = {}
    for name, leaf in batch.items():
        if name.startswith(PREFIX):
            earlier.setdefault(task_of(name), {})[name.split("/", 2)[2]] = leaf
    return own, earlier


@dataclass(frozen=True)
class Replayed:
    """A Replayed gives the earlier rows of each update's batch, a pure function of the seed and the update."""

    tasks: tuple[Kept, ...]
    micro_batches: int
    rows: int
    """Rows of a micro-batch that are of one earlier task."""
    seed: int
    every_task: bool
    """Rows of every task stand in each batch; else those of one task, in proportion to the rows kept of it."""
    mine: tuple[int, ...] | None = None
    """Of those, the rows that this process makes; None: all."""

    @property
    def rows_per_batch(self) -> int:
        """Returns how many earlier rows stand in a batch."""
        return self.micro_batches * self.rows * (len(self.tasks) if self.every_task else 1)

    def __call__(self, step: int) -> Arrays:
        """Returns the leaves `[micro, rows, …]` that are added to the batch of an update."""
        present = [i for i, task in enumerate(self.tasks) if len(task)]
        numbers = present if self.every_task else [self._task(step, present)]
        out: Arrays = {}
        for i in numbers:
            out |= {key(i, name): leaf for name, leaf in self._rows(i, step).items()}
        return out

    def _task(self, step: int, present: list[int]) -> int:
        """Returns the task of an update, evenly in proportion to the rows kept of each."""
        sizes = np.array([len(self.tasks[i]) for i in present], float)
        edges = np.cumsum(sizes / sizes.sum())
        return present[int(np.searchsorted(edges, (step * GOLDEN) % 1.0, side="right").clip(0, len(present) - 1))]

    def _rows(self, task: int, step: int) -> Arrays:
        kept, per_step = self.tasks[task], self.micro_batches * self.rows
        rows = range(self.rows) if self.mine is None else self.mine
        indices = []
        for micro in range(self.micro_batches):
            for row in rows:
                epoch, at = divmod(step * per_step + micro * self.rows + row, len(kept))
                indices.append(shuffled(at, len(kept), self.seed << 8 | task, epoch) if len(kept) > 1 else 0)
        chosen = np.array(indices)
        return {name: leaf[chosen].reshape(self.micro_batches, len(rows), *leaf.shape[1:])
                for name, leaf in kept.arrays.items()}  # fmt: skip


GOLDEN = 0.6180339887498949  # multiples of it fill the unit interval evenly (a Kronecker sequence)
