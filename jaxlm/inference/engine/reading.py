"""A prompt while it is read, chunk by chunk, into a row of its own."""

from dataclasses import dataclass, field
from typing import Any

from jaxlm.inference.engine.answer import Answer


@dataclass
class Reading:
    """A prompt that is being read, for answers that begin alike."""

    answers: list[Answer]
    number: int
    tokens: tuple[int, ...]
    row: Any
    end: int
    """Tokens read so far."""
    first: int
    """Tokens of the first chunk at least: a prompt that is read both ways is read at once."""
    state: Any = None
    """States of the last chunk, and its tokens."""
    scores: list[tuple[float | None, dict[int, float] | None]] = field(default_factory=lambda: [(None, None)])
