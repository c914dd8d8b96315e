"""Two entities in a text and how they are related: SemEval 2010 task 8 as published, tables, TACRED's JSON.

Tables hold texts with `<e1>`, `</e1>`, `<e2>`, `</e2>` around the entities, or texts and the characters of each entity
([first, after the last]), or lists of words and the words of each.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxlm.data.labelled import Related, Split, split, tables

MARK = re.compile(r"(</?e[12]>)")
SENTENCE = re.compile(r'\d+\t"?(.*?)"?')
Span = tuple[int, int]


class Names(NamedTuple):
    """Columns of tables."""

    text: str = "text"
    head: str = "head"
    tail: str = "tail"
    label: str = "label"


def read(source: str, names: Names | None = None, columns: Sequence[str] = ()) -> Split:
    """`columns` names the cells of a CSV or TSV file whose first line is no header."""
    if source.lower().endswith(".txt"):
        return split(source, _semeval(source))
    return split(source, (_related(row, names or Names()) for row in tables.read(source, columns)))


def _semeval(source: str) -> Iterator[Related]:
    """A numbered sentence in quotes, below it its label and a comment."""
    path = tables.existing(source)
    lines = path.read_text("utf-8-sig").split("\n")
    for number, (line, label) in enumerate(itertools.zip_longest(lines, lines[1:], fillvalue=""), 1):
        if not (found := SENTENCE.fullmatch(line.strip())):
            continue
        where = f"{path}:{number}"
        if not label.strip() or SENTENCE.fullmatch(label.strip()):
            raise ValueError(f"{where}: no label below the sentence; give the file that has them")
        yield Related(where, *unmarked(where, found[1]), label.strip())


def _related(row: tables.Row, names: Names) -> Related:
    cells, where = row.cells, row.where
    if "subj_start" in cells and "token" in cells:  # TACRED's own names; its last words are part of the entities
        text, head, tail = _of_words(where, row.words("token", "objective.text"), *(
            (cells[f"{side}_start"], cells[f"{side}_end"] + 1) for side in ("subj", "obj")))  # fmt: skip
        return Related(where, text, head, tail, row.text("relation", "objective.label"))
    label, there = row.text(names.label, "objective.label"), cells.get(names.text)
    if not isinstance(cells.get(names.head), list):
        text, head, tail = unmarked(where, row.text(names.text, "objective.text"))
    elif isinstance(there, list):
        given = _span(row, names.head, "head"), _span(row, names.tail, "tail")
        text, head, tail = _of_words(where, row.words(names.text, "objective.text"), *given)
    else:
        row.text(names.text, "objective.text")
        text, head, tail = str(there), _span(row, names.head, "head"), _span(row, names.tail, "tail")
    for a, z in (head, tail):
        if not 0 <= a < z <= len(text) or not text[a:z].strip():
            raise ValueError(f"{where}: entity [{a}, {z}] is not within the text's {len(text)} characters; correct it")
    return Related(where, text, head, tail, label)


def _span(row: tables.Row, name: str, field: str) -> Span:
    value: Any = row.cells.get(name)
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(v, int) for v in value):
        raise ValueError(
            f"{row.where}: {name} is {value!r}, where [first, after the last] is due; set objective.{field}"
        )
    return value[0], value[1]


def _of_words(where: str, words: Sequence[str], *spans: Span) -> tuple[str, Span, Span]:
    """The text of words, and the characters of stretches of them."""
    begins = list(itertools.accumulate((len(word) + 1 for word in words), initial=0))
    for a, z in spans:
        if not 0 <= a < z <= len(words):
            raise ValueError(f"{where}: entity [{a}, {z}] is not within the text's {len(words)} words; correct it")
    head, tail = ((begins[a], begins[z] - 1) for a, z in spans)
    return " ".join(words), head, tail


def unmarked(where: str, text: str) -> tuple[str, Span, Span]:
    """(text without marks, head, tail). Marks may have white space around them that isn't the text's: one is kept."""
    plain, at = "", {}
    for part in MARK.split(text):
        if not MARK.fullmatch(part):
            plain += part.lstrip() if not plain or plain[-1].isspace() else part
        elif part in at:
            raise ValueError(f"{where}: {part} stands there twice; mark each entity once")
        else:
            at[part] = len(plain)
    if len(at) < 4:
        gone = next(mark for mark in ("<e1>", "</e1>", "<e2>", "</e2>") if mark not in at)
        raise ValueError(f"{where}: no {gone}; mark both entities in the text, or give their places as head and tail")
    spans = []
    for i in "12":
        a, z = at[f"<e{i}>"], at[f"</e{i}>"]
        inner = plain[a:z]
        if not inner.strip():
            raise ValueError(f"{where}: nothing stands between <e{i}> and </e{i}>; correct it")
        spans.append((a + len(inner) - len(inner.lstrip()), a + len(inner.rstrip())))
    return plain.rstrip(), spans[0], spans[1]
