"""Special tokens that a user's text spells stay text when a chat template puts it among special tokens of its own.

What in a user's text could be read as a special token, by itself or together with what a template writes beside it, is
replaced by digits that nobody can guess before the template runs, and stands there again afterwards, sealed.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from jaxlm.data.tokenizer.interface import Part

DIGITS, COUNT = 30, 6  # of a seal: those that can't be guessed, and those that count
# Templates look these up and compare with them, so they stay as they are even where they are a part of a special token.
WORDS = {
    "anyOf", "arguments", "array", "assistant", "boolean", "const", "content", "default", "description", "developer",
    "documents", "enum", "false", "format", "function", "id", "integer", "items", "name", "null", "number", "object",
    "parameters", "properties", "reasoning_content", "required", "role", "string", "strict", "system", "text", "title",
    "tool", "tool_call_id", "tool_calls", "true", "type", "user",
}  # fmt: skip


@dataclass
class Sealed:
    """A Sealed holds what was taken out of a user's texts, to be put back into what a template made of them.

    `pieces` are the tokenizer's special tokens as they are spelt.
    """

    pieces: Sequence[str]
    kept: list[str] = field(default_factory=list)
    secret: str = field(default_factory=lambda: f"{secrets.randbelow(10**DIGITS):0{DIGITS}d}")

    def __post_init__(self) -> None:
        self._spelling = _spelling(tuple(self.pieces))

    def seal(self, value: Any) -> Any:
        """Returns a value of JSON in whose texts nothing is left that could become a special token."""
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, Mapping):
            return {self._text(k): self.seal(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.seal(v) for v in value]
        return value

    def open(self, text: str) -> list[Part]:
        """Returns a template's text in parts: what the template wrote, and what was sealed."""
        parts: list[Part] = []
        for i, part in enumerate(re.split(rf"{self.secret}(\d{{{COUNT}}})", text)):
            if part:
                parts.append(Part(self.kept[int(part)], False) if i % 2 else Part(part, True))
        return parts

    def _text(self, text: str) -> str:
        inner, by = text.strip(), self._spelling  # templates often strip texts
        if not inner or inner in WORDS:
            return text
        if len(inner) < by.longest and any(inner in piece for piece in self.pieces):
            return text.replace(inner, self._keep(inner), 1)
        sealed = by.whole.sub(lambda m: self._keep(m[0]), inner)
        sizes = range(min(len(inner), by.longest) - 1, 0, -1)
        if (end := next((n for n in sizes if inner[-n:] in by.beginnings), 0)) and sealed.endswith(inner[-end:]):
            sealed = sealed[: len(sealed) - end] + self._keep(inner[-end:])
        if (start := next((n for n in sizes if inner[:n] in by.ends), 0)) and sealed.startswith(inner[:start]):
            sealed = self._keep(inner[:start]) + sealed[start:]
        before = text[: len(text) - len(text.lstrip())]
        return before + sealed + text[len(before) + len(inner) :]

    def _keep(self, text: str) -> str:
        self.kept.append(text)
        return f"{self.secret}{len(self.kept) - 1:0{COUNT}d}"


class _Spelling(NamedTuple):
    """The special tokens of a vocabulary: a pattern of them, and what they begin and end with."""

    whole: re.Pattern[str]
    beginnings: frozenset[str]
    ends: frozenset[str]
    longest: int


@cache
def _spelling(pieces: tuple[str, ...]) -> _Spelling:
    named = sorted(filter(None, pieces), key=len, reverse=True)
    cuts = [(piece[:n], piece[n:]) for piece in named for n in range(1, len(piece))]
    whole = re.compile("|".join(map(re.escape, named)) if named else r"(?!)")
    longest = max(map(len, named), default=0)
    return _Spelling(whole, frozenset(a for a, _ in cuts), frozenset(z for _, z in cuts), longest)
