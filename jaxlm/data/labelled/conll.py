"""CoNLL columns: a word and its tags a line, a blank line after each sentence, `-DOCSTART-` between documents."""

from collections.abc import Sequence
from pathlib import Path

from jaxlm.data.labelled import Split, Tagged, split

DOCUMENT = "-DOCSTART-"


def read(source: str, word: int = 0, tag: int = -1) -> Split:
    """`word`, `tag`: numbers of their columns. Tags that mark spans (IOB1, IOB2, BIOES) become IOB2."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"data source {source!r} does not exist: give a file of CoNLL columns")
    found: list[Tagged] = []
    words: list[str] = []
    tags: list[str] = []
    document, first, width = 0, 1, 0

    def end() -> None:
        if words:
            found.append(Tagged(f"{path}:{first}", tuple(words), tuple(tags), document))
            words.clear()
            tags.clear()

    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        cells = line.split()
        if not cells or cells[0].startswith(DOCUMENT):
            end()
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
    end()
    schemes = [to_iob2(example.tags, example.where) for example in found]
    return split(source, [Tagged(e.where, e.words, t, e.document) for e, t in zip(found, schemes, strict=True)])


def to_iob2(tags: Sequence[str], where: str = "") -> tuple[str, ...]:
    """Spans begin with B- and go on with I-. IOB1 has B- only where spans of one kind touch; BIOES also S- and E-.

    Tags without such marks (parts of speech) stay as they are.
    """
    marks = {tag[:2] for tag in tags if tag != "O"}
    if not marks <= {"B-", "I-", "E-", "S-", "L-", "U-"}:
        if marks & {"B-", "I-"} and "O" in tags:
            odd = next(t for t in tags if t != "O" and t[:2] not in ("B-", "I-", "E-", "S-", "L-", "U-"))
            raise ValueError(f"{where}: tag {odd!r} among tags of spans; correct the file")
        return tuple(tags)
    out, before = [], "O"
    for tag in tags:
        mark, kind = tag[:2], tag[2:]
        if tag != "O":
            begins = mark in ("B-", "S-", "U-") or before[2:] != kind or before[:2] in ("E-", "S-", "L-", "U-")
            out.append(f"{'B' if begins else 'I'}-{kind}")
        else:
            out.append("O")
        before = tag
    return tuple(out)
