"""Reads CoNLL columns: a line is a word and its tags, sentences end with a blank line, documents with `-DOCSTART-`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from jaxlm.data.labelled import Split, Tagged, make_split
from jaxlm.data.text_input import read_lines

DOCUMENT = "-DOCSTART-"
MARKS = ("B-", "I-", "E-", "S-", "L-", "U-")
ODD_MARK = re.compile(r"[BIESLU][_:./|].+|.+[-_:./|][BIESLU]|[biesul][-_].+")
"""Tags that mark spans in ways that scorers don't read: B_PER, PER-B, b-per."""


def lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the numbered lines of a file, each as its cells, of which an empty line has none.

    Tabs divide a line that has any; else blanks do, but no other white space: 10\u00a0000 is one word.
    """
    for number, line in read_lines(path):
        line = line.strip(" \t\r")
        cells = re.split("\t" if "\t" in line else " +", line) if line else []
        yield number, [cell.strip(" ") for cell in cells]


def read(source: str, word: int = 0, tag: int | None = -1) -> Split:
    """Reads the sentences of a file; `word` and `tag` are the numbers of their columns; None: words have no tags.

    Tags that mark spans (IOB1, IOB2, BIOES) become IOB2. Raises ValueError, which names file and line, if lines differ
    in their count of columns or tags mix spans with others.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"data source {source!r} does not exist: give a file of CoNLL columns")
    sentences: list[Tagged] = []
    words: list[str] = []
    tags: list[str] = []
    document, first, width = 0, 1, 0

    def end_sentence() -> None:
        if words:
            sentences.append(Tagged(f"{path}:{first}", tuple(words), tuple(tags), document))
            words.clear()
            tags.clear()

    for number, cells in lines(path):
        if not cells or cells[0].startswith(DOCUMENT):
            end_sentence()
            document += bool(cells)
            continue
        width = width or len(cells)
        if len(cells) != width:
            raise ValueError(f"{path}:{number}: {len(cells)} columns, where the first line has {width}; correct it")
        if not all(-width <= column < width for column in (word, 0 if tag is None else tag)):
            raise ValueError(f"{path}:{number}: {width} columns; objective.word or objective.tag names one beyond them")
        if not words:
            first = number
        label = "-" if tag is None else cells[tag]
        if not cells[word] or not label or " " in label:
            raise ValueError(f"{path}:{number}: word {cells[word]!r} with tag {label!r}; divide columns by tabs "
                             "throughout, or by blanks throughout, and leave none empty")  # fmt: skip
        words.append(cells[word])
        tags += [] if tag is None else [label]
    end_sentence()
    _check_marks(sentences)
    converted = [replace(s, tags=to_iob2(s.tags)) for s in sentences]
    return make_split(source, converted)


def _check_marks(sentences: Sequence[Tagged]) -> None:
    """Raises ValueError for tags that mark spans in a way that isn't read, or in some sentences alone."""
    known = {tag for s in sentences for tag in s.tags} - {"O", "o"}
    outside = any(tag in ("O", "o") for s in sentences for tag in s.tags)
    marked = {tag for tag in known if tag[:2] in MARKS and len(tag) > 2}
    unread = known - marked if outside and (marked or all(map(ODD_MARK.fullmatch, known))) else set()
    for sentence in sentences if unread else ():
        if odd := next((tag for tag in sentence.tags if tag in unread), None):
            raise ValueError(f"{sentence.where}: tag {odd!r} among tags of spans, which are O, or B- or I- and a name "
                             "(B-PER, I-PER; also E-, S-, L-, U-); correct the file")  # fmt: skip


def to_iob2(tags: Sequence[str]) -> tuple[str, ...]:
    """Returns tags in IOB2, where each span begins with B- and goes on with I-.

    IOB1 has B- only where spans of one kind touch; BIOES also has S- and E-, BILOU L- and U-. Tags without such marks
    (parts of speech) stay as they are.
    """
    if not {tag[:2] for tag in tags if tag != "O"} <= set(MARKS):
        return tuple(tags)
    out, previous = [], "O"
    for tag in tags:
        mark, kind = tag[:2], tag[2:]
        if tag != "O":
            begins = mark in ("B-", "S-", "U-") or previous[2:] != kind or previous[:2] in ("E-", "S-", "L-", "U-")
            out.append(f"{'B' if begins else 'I'}-{kind}")
        else:
            out.append("O")
        previous = tag
    return tuple(out)
