"""Labelled examples are read from files; each module reads one kind of file by a function `(source, …) -> Split`.

A source is a file, or `tfds:NAME/CONFIG[:split]` where the kind has a table form. Every example has `where`, its file
and line for error messages, and `inputs`, the parts of it that a model is shown.
"""

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Text:
    """A text example has one text or two, and one label, several, none, or a score."""

    where: str
    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    score: float | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Returns what a model is shown of the example: its texts."""
        return self.texts


@dataclass(frozen=True)
class Tagged:
    """A tagged sentence has one tag for each word, in IOB2 where tags mark spans."""

    where: str
    words: tuple[str, ...]
    tags: tuple[str, ...]
    document: int = 0

    @property
    def inputs(self) -> tuple[str, ...]:
        """Returns what a model is shown of the example: its words."""
        return self.words


@dataclass(frozen=True)
class Question:
    """A question is asked about a text; `answers` are (first character, text), empty if the text holds none."""

    where: str
    id: str
    question: str
    context: str
    answers: tuple[tuple[int, str], ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Returns what a model is shown of the example: the question and the text."""
        return self.question, self.context


@dataclass(frozen=True)
class Related:
    """A relation holds between two spans of characters of a text, `head` and `tail`, and has a label."""

    where: str
    text: str
    head: tuple[int, int]
    tail: tuple[int, int]
    label: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """Returns what a model is shown of the example: the text and the two spans."""
        return self.text, str(self.head), str(self.tail)


@dataclass(frozen=True)
class Choice:
    """A choice has a beginning and several ways to go on, of which number `answer` is right, counted from 0."""

    where: str
    context: str
    choices: tuple[str, ...]
    answer: int

    @property
    def inputs(self) -> tuple[str, ...]:
        """Returns what a model is shown of the example: the beginning and the choices."""
        return self.context, *self.choices


@dataclass(frozen=True)
class Pair:
    """A pair holds a source text and the target text that is to be made of it."""

    where: str
    source: str
    target: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """Returns what a model is shown of the example: the source text."""
        return (self.source,)


@dataclass(frozen=True)
class Split:
    """A split holds the labelled examples of one source."""

    source: str
    examples: Sequence[Any]
    problems: Sequence[str] = ()
    """One line for each example that was left out: file, line and reason."""


def make_split(source: str, examples: Iterable[Any], problems: Sequence[str] = ()) -> Split:
    """Returns a source's split. Raises ValueError if the source holds not a single example."""
    examples = list(examples)
    if not examples:
        hint = f"; {len(problems)} were left out, the first: {problems[0]}" if problems else "; name one that has some"
        raise ValueError(f"data source {source!r} is empty: it holds no labelled example{hint}")
    return Split(source, examples, problems)


def check_labels(labels: Iterable[tuple[str, str]], known: Collection[str], field: str) -> None:
    """Checks (where, label) pairs. Raises ValueError for a label that isn't `known`; `field` is the setting to mend."""
    for where, label in labels:
        if label not in known:
            close = difflib.get_close_matches(label, list(known), 1, 0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known)) or 'none'}."
            raise ValueError(f"{where}: unknown label {label!r}; {hint} Correct the file or name it in {field}")


def summarize_problems(part: Split) -> list[str]:
    """Returns a one-line summary of what was left out of a source, or no line if nothing was."""
    if not part.problems:
        return []
    first = "; ".join(part.problems[:5]) + ("; …" if len(part.problems) > 5 else "")
    return [f"{part.source}: {len(part.problems):,} left out: {first}"]
