"""Reads two entities of a text and their relation, from SemEval 2010 task 8 as published, tables, or TACRED's JSON.

Tables hold texts with `<e1>`, `</e1>`, `<e2>`, `</e2>` around the entities, or texts and the characters of each entity
([first, after the last]), or lists of words and the words of each.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxlm.data.labelled import Related, Split, make_split, tables
from jaxlm.data.text_input import read_lines

MARK = re.compile(r"(</?e[12]>)")
SENTENCE = re.compile(r'\d+\t"?(.*?)"?')
Span = tuple[int, int]
"""A span is (first character, the one after the last)."""


class Names(NamedTuple):
    """Names of the columns that are read."""

    text: str = "text"
    head: str = "head"
    tail: str = "tail"
    label: str = "label"


def read(source: str, names: Names | None = None, columns: Sequence[str] = ()) -> Split:
    """Reads the relations of a source; a .txt file is in SemEval's format, every other one a table.

    `columns` names the cells of a CSV or TSV file whose first line is no header. Raises ValueError, which names file
    and line, if an entity isn't marked or lies outside its text.
    """
    if source.lower().endswith(".txt"):
        return make_split(source, _semeval(source))
    return make_split(source, (related(row, names or Names()) for row in tables.read(source, columns)))


def _semeval(source: str) -> Iterator[Related]:
    """Reads numbered sentences in quotes; the line below each is its label, followed by a comment."""
    path = tables.existing_file(source)
    lines = [line for _, line in read_lines(path)]
    for number, (line, label) in enumerate(itertools.zip_longest(lines, lines[1:], fillvalue=""), 1):
        if not (match := SENTENCE.fullmatch(line.strip())):
            continue
        where = f"{path}:{number}"
        if not label.strip() or SENTENCE.fullmatch(label.strip()):
            raise ValueError(f"{where}: no label below the sentence; give the file that has them")
        yield Related(where, *remove_marks(where, match[1]), label.strip())


def related(row: tables.Row, names: Names, labelled: bool = True) -> Related:
    """Returns the relation of a row; its label is empty where it isn't `labelled`. ValueError: says what is missing."""
    cells, where = row.cells, row.where
    if "subj_start" in cells and "token" in cells:  # TACRED's own names; its last words are part of the entities
        places: list[list[Any]] = [[cells.get(f"{s}_{end}") for end in ("start", "end")] for s in ("subj", "obj")]
        if odd := [p for p in places if not all(type(v) is int for v in p)]:
            raise ValueError(f"{where}: an entity's start and end are {odd[0]}, where numbers of words are due")
        words = ((start, end + 1) for start, end in places)
        text, head, tail = _join_words(where, row.words("token", "objective.text"), *words)
        return Related(where, text, head, tail, row.text("relation", "objective.label") if labelled else "")
    label, cell = row.label(names.label, "objective.label") if labelled else "", cells.get(names.text)
    if not isinstance(cells.get(names.head), list):
        text, head, tail = remove_marks(where, row.text(names.text, "objective.text"))
    elif isinstance(cell, list):
        spans = _span(row, names.head, "head"), _span(row, names.tail, "tail")
        text, head, tail = _join_words(where, row.words(names.text, "objective.text"), *spans)
    else:
        row.text(names.text, "objective.text")
        text, head, tail = str(cell), _span(row, names.head, "head"), _span(row, names.tail, "tail")
    for a, z in (head, tail):
        if not 0 <= a < z <= len(text) or not text[a:z].strip():
            raise ValueError(f"{where}: entity [{a}, {z}] is not within the text's {len(text)} characters; correct it")
    return Related(where, text, head, tail, label)


def _span(row: tables.Row, name: str, field: str) -> Span:
    value: Any = row.cells.get(name)
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int for v in value):
        raise ValueError(
            f"{row.where}: {name} is {value!r}, where [first, after the last] is due; set objective.{field}"
        )
    return value[0], value[1]


def _join_words(where: str, words: Sequence[str], *spans: Span) -> tuple[str, Span, Span]:
    """Returns the text of words, and the characters of two spans of words."""
    begins = list(itertools.accumulate((len(word) + 1 for word in words), initial=0))
    for a, z in spans:
        if not 0 <= a < z <= len(words):
            raise ValueError(f"{where}: entity [{a}, {z}] is not within the text's {len(words)} words; correct it")
    head, tail = ((begins[a], begins[z] - 1) for a, z in spans)
    return " ".join(words), head, tail


def remove_marks(where: str, text: str) -> tuple[str, Span, Span]:
    """Returns (text without `<e1>`, `</e1>`, `<e2>`, `</e2>`, head, tail).

    White space on both sides of a mark isn't all the text's: that before it is kept.
    """
    plain, positions = "", {}
    for part in MARK.split(text):
        if not MARK.fullmatch(part):
            plain += part.lstrip() if not plain or plain[-1].isspace() else part
        elif part in positions:
            raise ValueError(f"{where}: {part} stands there twice; mark each entity once")
        else:
            positions[part] = len(plain)
    if len(positions) < 4:
        missing = next(mark for mark in ("<e1>", "</e1>", "<e2>", "</e2>") if mark not in positions)
        raise ValueError(
            f"{where}: no {missing}; mark both entities in the text, or give their places as head and tail"
        )
    spans = []
    for i in "12":
        a, z = positions[f"<e{i}>"], positions[f"</e{i}>"]
        inner = plain[a:z]
        if not inner.strip():
            raise ValueError(f"{where}: nothing stands between <e{i}> and </e{i}>; correct it")
        spans.append((a + len(inner) - len(inner.lstrip()), a + len(inner.rstrip())))
    return plain.rstrip(), spans[0], spans[1]
