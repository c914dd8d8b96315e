"""Reads CoNLL columns: a line is a word and its tags, sentences end with a blank line, documents with `-DOCSTART-`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jaxlm.data.labelled import Split, Tagged, make_split

DOCUMENT = "-DOCSTART-"


def read(source: str, word: int = 0, tag: int = -1) -> Split:
    """Reads the sentences of a file; `word` and `tag` are the numbers of their columns.

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

    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        cells = line.split()
        if not cells or cells[0].startswith(DOCUMENT):
            end_sentence()
            document += bool(cells)
            continue
        width = width or len(cells)
        if len(cells) != width:
            raise ValueError(f"{path}:{number}: {len(cells)} columns, where the first line has {width}; correct it")
        if not (-width <= word < width and -width <= tag < width):
            raise ValueError(f"{path}:{number}: {width} columns; objective.word or objective.tag names one beyond them")
        if not words:
            first = number
        words.append(cells[word])
        tags.append(cells[tag])
    end_sentence()
    converted = [replace(s, tags=to_iob2(s.tags, s.where)) for s in sentences]
    return make_split(source, converted)


def to_iob2(tags: Sequence[str], where: str = "") -> tuple[str, ...]:
    """Returns tags in IOB2, where each span begins with B- and goes on with I-.

    IOB1 has B- only where spans of one kind touch; BIOES also has S- and E-, BILOU L- and U-. Tags without such marks
    (parts of speech) stay as they are.
    """
    marks = {tag[:2] for tag in tags if tag != "O"}
    if not marks <= {"B-", "I-", "E-", "S-", "L-", "U-"}:
        if marks & {"B-", "I-"} and "O" in tags:
            odd = next(t for t in tags if t != "O" and t[:2] not in ("B-", "I-", "E-", "S-", "L-", "U-"))
            raise ValueError(f"{where}: tag {odd!r} among tags of spans; correct the file")
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
