"""Labelled examples from files: each reader is a function `(source, …) -> Split`, one kind of file a module.

A source is a file, or `tfds:NAME/CONFIG[:split]` where the kind has a table form. Every example knows its file and
line (`where`), so that what is wrong with it can be said, and `inputs`, what a model is shown of it.
"""

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Text:
    """One text or two, with one label, several, none, or a score."""

    where: str
    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    score: float | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.texts


@dataclass(frozen=True)
class Tagged:
    """A sentence of words with one tag each, in IOB2 where tags mark spans."""

    where: str
    words: tuple[str, ...]
    tags: tuple[str, ...]
    document: int = 0

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.words


@dataclass(frozen=True)
class Question:
    """A question on a text; `answers` are (first character, text) and empty where the text holds none."""

    where: str
    id: str
    question: str
    context: str
    answers: tuple[tuple[int, str], ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.question, self.context


@dataclass(frozen=True)
class Related:
    """Two stretches of characters of a text, `head` and `tail`, and how they are related."""

    where: str
    text: str
    head: tuple[int, int]
    tail: tuple[int, int]
    label: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.text, str(self.head), str(self.tail)


@dataclass(frozen=True)
class Choice:
    """A beginning and several ways to go on, of which number `answer` is right."""

    where: str
    context: str
    choices: tuple[str, ...]
    answer: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.context, *self.choices


@dataclass(frozen=True)
class Pair:
    """A text and what is to be made of it."""

    where: str
    source: str
    target: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)


@dataclass(frozen=True)
class Split:
    """What one source held."""

    source: str
    examples: Sequence[Any]
    problems: Sequence[str] = ()
    """What was left out and why, a line each, with file and line."""


def split(source: str, examples: Iterable[Any], problems: Sequence[str] = ()) -> Split:
    """Refuses a source without a single example."""
    found = list(examples)
    if not found:
        lost = f"; {len(problems)} were left out, the first: {problems[0]}" if problems else "; name one that has some"
        raise ValueError(f"data source {source!r} is empty: it holds no labelled example{lost}")
    return Split(source, found, problems)


def check_labels(found: Iterable[tuple[str, str]], known: Collection[str], field: str) -> None:
    """Refuse a label (given as `where` and its name) that isn't `known`; `field` names the list of those that are."""
    for where, label in found:
        if label not in known:
            close = difflib.get_close_matches(label, list(known), 1, 0.5)
            shown = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known)) or 'none'}."
            raise ValueError(f"{where}: unknown label {label!r}; {shown} Correct the file or name it in {field}")


def told(part: Split) -> list[str]:
    """What was left out of a source, in a line or none."""
    if not part.problems:
        return []
    shown = "; ".join(part.problems[:5]) + ("; …" if len(part.problems) > 5 else "")
    return [f"{part.source}: {len(part.problems):,} left out: {shown}"]
