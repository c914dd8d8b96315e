"""Holds the global weights of a parameter server, or a part of them, and moves them as its book says.

A server has three vectors of the weights' size: the weights, the outer optimizer's momentum, and the sum of the round.
They are changed in place, a piece at a time, by the very functions of `outer`. Adam and delayed Nesterov have one more
vector, and without rounds there is no sum.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxlm.core.distributed import Distributed, Outer
from jaxlm.training.distributed import outer, vector
from jaxlm.training.distributed.book import Answer, Book, Op, Refused


@functools.partial(jax.jit, static_argnums=0)
def _moved(c: Outer, weights_N: jax.Array, state: Any, delta_N: jax.Array) -> tuple[jax.Array, Any]:
    return outer.update(c, weights_N, state, weights_N - delta_N)


class Part:
    """A Part holds the global weights, float32 [N], and what the outer optimizer and the round know of them."""

    def __init__(self, c: Distributed, weights_N: np.ndarray) -> None:
        self.c, self.weights = c, np.array(weights_N, np.float32)
        like = jax.eval_shape(lambda x: outer.init(c.outer, x), jax.ShapeDtypeStruct(self.weights.shape, np.float32))
        leaves, self._tree = jax.tree.flatten(like)
        self.state = [np.zeros(x.shape, x.dtype) for x in leaves]
        """The leaves of the outer optimizer's state, which all begin at 0."""
        self.sum = np.zeros_like(self.weights) if c.server.mode == "sync" else None

    def do(self, ops: Iterable[Op], packed: Mapping[str, np.ndarray] | None = None) -> None:
        """Does what the book decided; `packed` is the push that it decided about, as it arrived."""
        for op in ops:
            if op.do == "drop":
                continue
            if op.do == "update":
                self._move(None, 1 / op.value)
                continue
            assert packed is not None
            if op.do == "apply":
                self._move(packed, op.value)
                continue
            assert self.sum is not None
            for at in vector.chunks(self.sum.size):
                delta = vector.unpack(self.c.compress, packed, at)
                self.sum[at] += delta if op.value == 1 else np.float32(op.value) * delta

    def _move(self, packed: Mapping[str, np.ndarray] | None, scale: float) -> None:
        """Moves the weights by a push, or by the sum of the round, which is 0 then."""
        new = self.state
        for at in vector.chunks(self.weights.size):
            if packed is not None:
                delta = vector.unpack(self.c.compress, packed, at)
            else:
                assert self.sum is not None
                delta = self.sum[at]
            delta = delta if scale == 1 else np.float32(scale) * delta
            state = jax.tree.unflatten(self._tree, [x[at] if x.ndim else x for x in self.state])
            weights, state = _moved(self.c.outer, self.weights[at], state, delta)
            self.weights[at] = weights
            new = jax.tree.leaves(state)
            for mine, theirs in zip(self.state, new, strict=True):
                if mine.ndim:
                    mine[at] = theirs
        self.state = [x if x.ndim else np.array(y) for x, y in zip(self.state, new, strict=True)]
        if packed is None and self.sum is not None:
            self.sum.fill(0)

    @property
    def nbytes(self) -> int:
        """Returns the bytes of its vectors."""
        return self.weights.nbytes + sum(x.nbytes for x in self.state) + (0 if self.sum is None else self.sum.nbytes)

    def saved(self) -> dict[str, np.ndarray]:
        """Returns what a checkpoint holds, between two rounds."""
        return {"weights": self.weights} | {f"state{i}": x for i, x in enumerate(self.state)}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `saved` returned; the round is forgotten."""
        wanted = {name: (x.shape, x.dtype) for name, x in self.saved().items()}
        found = {name: (x.shape, x.dtype) for name, x in arrays.items()}
        if wanted != found:
            raise ValueError(
                "distributed: the server's checkpoint is of other weights, another outer optimizer or another number "
                "of shards; keep them, or start a run under another `name`"
            )
        self.weights = np.array(arrays["weights"])
        self.state = [np.array(arrays[f"state{i}"]) for i in range(len(self.state))]
        if self.sum is not None:
            self.sum.fill(0)


class Server:
    """A Server is a book with all of the weights, in one process."""

    def __init__(self, book: Book, part: Part) -> None:
        self.book, self.part = book, part

    def join(self, name: str, terms: Mapping[str, Any], now: float) -> Answer:
        """Takes a worker in (`Book.join`)."""
        self.tick(now)
        answer = self.book.join(name, terms, now)
        self.tick(now)
        return self.book.ask(name, answer.token, now)

    def ask(self, name: str, token: int, now: float) -> Answer:
        """Returns what a worker does next (`Book.ask`)."""
        self.tick(now)
        return self.book.ask(name, token, now)

    def push(
        self, name: str, token: int, version: int, packed: Mapping[str, np.ndarray], now: float, **more: Any
    ) -> None:
        """Takes a worker's delta (`Book.push`). Refused: it isn't one of these weights."""
        if wrong := vector.fault(self.book.c.compress, packed, self.part.weights.size):
            raise Refused(f"worker {name}: its push can't be used, for {wrong}")
        self.part.do(self.book.push(name, token, version, now=now, **more), packed)
        self.tick(now)

    def leave(self, name: str, token: int, now: float) -> None:
        """Lets a worker go (`Book.leave`)."""
        self.book.leave(name, token, now)
        self.tick(now)

    def tick(self, now: float) -> None:
        """Does what is due at a time (`Book.tick`)."""
        self.part.do(self.book.tick(now))
