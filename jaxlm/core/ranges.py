"""A field's type says which of its values are allowed: `steps: Count` is an int of at least 1, `lr: NonNegative` a
float of 0 or more. `config_io.check` holds a configuration to what its fields declare."""

import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; NaN is in no range, and infinity in none without `below=False`."""

    low: float
    high: float = math.inf
    above: bool = False
    """`low` itself is left out."""
    below: bool = True
    """`high` itself is left out."""

    def __contains__(self, value: float) -> bool:
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        """Returns what follows "it must be"."""
        if self.high == math.inf:
            if self.low == -math.inf:
                return "finite"
            return f"above {self.low:g}" if self.above else f"at least {self.low:g}" if self.low else "0 or more"
        if not (self.above or self.below):
            return f"from {self.low:g} to {self.high:g}"
        low = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        return f"{low} and {'below' if self.below else 'at most'} {self.high:g}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Finite = Annotated[float, Range(-math.inf, above=True)]
Share = Annotated[float, Range(0, 1, below=False)]
PositiveShare = Annotated[float, Range(0, 1, above=True, below=False)]
BelowOne = Annotated[float, Range(0, 1)]


def ranges(kind: Any) -> list[Range]:
    """Returns the ranges that a type names, at its top or within (`Count | None`, `tuple[NonNegative, ...]`)."""
    if typing.get_origin(kind) is Annotated:
        return [m for m in kind.__metadata__ if isinstance(m, Range)]
    return [found for inner in typing.get_args(kind) for found in ranges(inner)]


def outside(value: Any, kind: Any) -> str | None:
    """Returns how a value, or one of several, is out of the range that its type names; None: it isn't."""
    for allowed in ranges(kind):
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number not in allowed:
                return f"{number} is out of range; it must be {allowed}"
    return None
