"""Which record comes i-th: parts interleaved by weight, each in its own shuffled order, without a table in memory."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence

from jaxlm.data.packing import Records

BITS = 48  # weights become fractions of 2**48, so that integer arithmetic is exact for any i


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Parts and their shares, as a chain of two-way splits; see `mixture`."""

    parts: tuple[Records, ...]
    shares: tuple[float, ...]
    tree: "int | tuple[int, object, object]"  # part, or (left share in 2**-BITS, left, right)

    def locate(self, i: int) -> tuple[int, int]:
        """Part of the i-th example and how many examples of that part came before; log2(parts) steps."""
        node: object = self.tree
        while isinstance(node, tuple):
            share, left, right = node
            before, after = _left(i, share), _left(i + 1, share)
            node, i = (left, before) if after > before else (right, i - before)
        assert isinstance(node, int)
        return node, i


def mixture(parts: Sequence[Records], weights: Sequence[float]) -> Mixture:
    """Interleave parts so that at every prefix each has had its share of the examples, give or take two."""
    if len(parts) != len(weights) or not parts:
        raise ValueError(f"a mixture needs one weight for each part: {len(parts)} parts, {len(weights)} weights")
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"mixture weight {number} is {weight}: it must be a number of at least 0")
        if weight > 0 and not len(part):
            raise ValueError(f"mixture part {number} has no records: give it text, or weight 0")
    total = math.fsum(weights)
    if total <= 0:
        raise ValueError("mixture weights are all 0: at least one part must count")
    return Mixture(tuple(parts), tuple(w / total for w in weights), _tree(list(range(len(parts))), weights))


def _tree(which: list[int], weights: Sequence[float]) -> "int | tuple[int, object, object]":
    """Split the parts in two halves until one is left."""
    if len(which) == 1:
        return which[0]
    left, right = which[: len(which) // 2], which[len(which) // 2 :]
    a, b = math.fsum(weights[w] for w in left), math.fsum(weights[w] for w in right)
    share = round(a / (a + b) * 2**BITS) if a + b > 0 else 0
    return share, _tree(left, weights), _tree(right, weights)


def _left(i: int, share: int) -> int:
    """How many of the first i examples go left: i * share, rounded."""
    return (i * share + (1 << (BITS - 1))) >> BITS


def shuffled(counter: int, n: int, seed: int, epoch: int) -> int:
    """Where record `counter` of an epoch lies: a pseudo-random permutation of 0..n-1 for each (seed, epoch)."""
    # Grain imports jax when it's there, and this floor must load without.
    from grain.experimental import index_shuffle

    return index_shuffle(counter, max_index=n - 1, seed=_epoch_seed(seed, epoch), rounds=4)


@functools.lru_cache(maxsize=1024)
def _epoch_seed(seed: int, epoch: int) -> int:
    """32 bits, for that is what the permutation takes."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=4).digest(), "big")
