"""A mixture says which record comes i-th: parts are interleaved by weight, each in its own shuffled order.

No table in memory is needed, whatever the number of examples.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence

from jaxlm.data.packing import Records

BITS = 48  # weights become fractions of 2**48, so that integer arithmetic is exact for any i


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture has parts, their shares, and a tree of two-way splits that finds an example's part; see `mixture`."""

    parts: tuple[Records, ...]
    shares: tuple[float, ...]
    tree: "int | tuple[int, object, object]"  # part, or (left share in 2**-BITS, left, right)

    def locate(self, i: int) -> tuple[int, int]:
        """Returns the part of the i-th example and how many examples of that part came before, in log2(parts) steps."""
        node: object = self.tree
        while isinstance(node, tuple):
            share, left, right = node
            before, after = _count_left(i, share), _count_left(i + 1, share)
            node, i = (left, before) if after > before else (right, i - before)
        assert isinstance(node, int)
        return node, i


def mixture(parts: Sequence[Records], weights: Sequence[float]) -> Mixture:
    """Interleaves parts so that in every prefix each has had its share of the examples, give or take two.

    Raises ValueError if weights are negative, all 0, or given to an empty part.
    """
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


def _tree(parts: list[int], weights: Sequence[float]) -> "int | tuple[int, object, object]":
    """Splits the parts in two halves until one is left."""
    if len(parts) == 1:
        return parts[0]
    left, right = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    a, b = math.fsum(weights[p] for p in left), math.fsum(weights[p] for p in right)
    share = round(a / (a + b) * 2**BITS) if a + b > 0 else 0
    return share, _tree(left, weights), _tree(right, weights)


def _count_left(i: int, share: int) -> int:
    """Returns how many of the first i examples go left: i * share, rounded."""
    return (i * share + (1 << (BITS - 1))) >> BITS


def shuffled(counter: int, n: int, seed: int, epoch: int) -> int:
    """Returns the index of record number `counter` of an epoch; each (seed, epoch) permutes 0 to n - 1 differently."""
    # Imported here, since Grain imports jax if it's installed, and this module must load without jax.
    from grain.experimental import index_shuffle

    return index_shuffle(counter, max_index=n - 1, seed=_epoch_seed(seed, epoch), rounds=4)


@functools.lru_cache(maxsize=1024)
def _epoch_seed(seed: int, epoch: int) -> int:
    """Returns a seed of 32 bits, as the permutation takes it."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=4).digest(), "big")
