"""Whatever a file's bytes are, every reader gives the same text or one line that names file and place."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxlm.data import conversations, sources
from jaxlm.data.labelled import choices, conll, relations, squad, tables
from jaxlm.data.text_input import decode

CHAT = '{"question":"café","answer":"b"}\n'
SQUAD = '{"data":[{"paragraphs":[{"context":"é Oslo","qas":[{"id":"1","question":"w?","answers":[]}]}]}]}'


def cells(path) -> list:
    return [list(row.cells.values()) for row in tables.read(str(path))]


def texts(path, **more) -> list:
    return [document.texts for document in sources.documents(str(path), **more)]


READERS = {
    "a.jsonl": (CHAT, lambda p: [c.messages[0]["content"] for c in conversations.read(p)], ["café"]),
    "b.jsonl": (CHAT, cells, [["café", "b"]]),
    "c.jsonl": (CHAT, lambda p: texts(p, field="question"), [("café",)]),
    "a.csv": ("text,label\ncafé,b\n", cells, [["café", "b"]]),
    "a.tsv": ("text\tlabel\ncafé\tb\n", cells, [["café", "b"]]),
    "a.json": (f"[{CHAT}]", cells, [["café", "b"]]),
    "b.json": (SQUAD, lambda p: [q.context for q in squad.read(str(p)).examples], ["é Oslo"]),
    "a.txt": ("café B-LOC\nis O\n", lambda p: [e.words for e in conll.read(str(p)).examples], [("café", "is")]),
    "b.txt": ('1\t"é <e1>A</e1> <e2>B</e2>"\nsaw\n', lambda p: [e.text for e in relations.read(str(p)).examples],
              ["é A B"]),
    "c.txt": ("café\n", texts, [("café\n",)]),
    "p.en": ("café\n", lambda p: texts(p.with_name("p"), field=("en", "de")), [("café", "b")]),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_every_reader_takes_utf8_with_or_without_a_mark_and_refuses_the_rest(tmp_path, name):
    content, read, expected = READERS[name]
    path = tmp_path / name
    (tmp_path / "p.de").write_bytes(b"b\n")
    for mark in ("", "\ufeff"):
        path.write_text(mark + content, "utf-8")
        assert read(path) == expected
    for encoding in ("latin1", "utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        path.write_bytes(content.encode(encoding))
        why = ":[123]: not UTF-8 at byte" if encoding == "latin1" else r".*: UTF-(16|32)"
        with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(str(path))}{why}[^\n]* convert it \(iconv[^\n]*$"):
            read(path)


def test_marks_in_front_of_later_lines_and_at_the_end(tmp_path):
    """Files joined end to end have them; the published WNUT-17 ends with a line of one alone."""
    (tmp_path / "a.txt").write_text("\ufeffOslo B-LOC\nis O\n\n\ufeffAnn B-PER\n\n\ufeff", "utf-8")
    assert [e.words for e in conll.read(str(tmp_path / "a.txt")).examples] == [("Oslo", "is"), ("Ann",)]
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("\ufeff" + CHAT + "\ufeff" + CHAT + "\ufeff\n", "utf-8")
    assert len(conversations.read(tmp_path / "a.jsonl")) == len(cells(tmp_path / "b.jsonl")) == 2
    assert texts(tmp_path / "b.jsonl", field="question") == [("café",)] * 2
    assert decode("a\ufeffb".encode(), "x") == "a\ufeffb", "within a text it is the text's"


VALUES = {
    "1": "a number",
    "null": "null",
    "true": "true or false",
    "NaN": "a number",
    "[1]": "a list",
    '{"a": 1}': "an object",
}


@pytest.mark.parametrize("value", [*VALUES, "[" * 100_000, '"odd \\ud83d end"', "9" * 5000])
def test_values_that_are_no_text(tmp_path, value):
    path = tmp_path / "a.jsonl"
    why = VALUES.get(value, "half a surrogate|nested too deeply|digits")
    line = f'{{"text": "fine", "label": "x"}}\n{{"text": {value}, "label": "x"}}\n'
    chat = f'{{"question": "q", "answer": {value}}}\n'
    message = f'{{"messages": [{{"role": "user", "content": {value}}}, {{"role": "assistant", "content": "b"}}]}}\n'
    say = rf"^[^\n]*a\.jsonl:{{}}: [^\n]*({why})[^\n]*$"
    path.write_text(line)
    for read in (lambda: [row.text("text", "objective.text") for row in tables.read(str(path))], lambda: texts(path)):
        with pytest.raises(ValueError, match=say.format(2)):
            read()
    for text in (chat, message, chat.replace("question", "instruction").replace("answer", "output")):
        path.write_text(text)
        if value != "[1]" or text is message:
            with pytest.raises(ValueError, match=say.format(1)):
                conversations.read(path)


@pytest.mark.parametrize("start", ["null", '"0"', "0.5", "true"])
def test_answers_at_no_character(tmp_path, start):
    answers = f'{{"text":["Oslo"],"answer_start":[{start}]}}'
    (tmp_path / "a.jsonl").write_text(f'{{"question":"w?","context":"Oslo","answers":{answers}}}')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: an answer is a text at .*, where a text and the number"):
        squad.read(str(tmp_path / "a.jsonl"))


def test_labels_may_be_numbers_but_not_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"context": "a", "choices": ["b", "c"], "answer": 1}\n')
    assert choices.read(str(path)).examples[0].answer == 1
    for value in ("NaN", "null", "[0]", "Infinity"):
        path.write_text(f'{{"context": "a", "choices": ["b", "c"], "answer": {value}}}\n')
        with pytest.raises(ValueError, match=r"a\.jsonl:1: no text 'answer' but .* Set objective\.answer"):
            choices.read(str(path))
    path.write_text('{"context": "a", "choices": ["b", null], "answer": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: 'choices' holds null"):
        choices.read(str(path))


def test_tables_of_long_cells_lone_returns_and_names_that_stand_twice(tmp_path):
    long, path = "x" * 200_000, tmp_path / "a.csv"
    path.write_text(f'text,label\n"{long}",yes\n')
    assert cells(path) == [[long, "yes"]]
    (tmp_path / "cr.tsv").write_bytes(b"text\tlabel\none\rtwo\tyes\r\nbad\xc2\x85day\tno\n")
    assert cells(tmp_path / "cr.tsv") == [["one\rtwo", "yes"], ["bad\x85day", "no"]]
    path.write_bytes(b'text,label\n"one\rtwo",yes\n')
    assert cells(path) == [["one\rtwo", "yes"]]
    for name, content, why in (
        ("a.csv", "text,text,label\na,b,c\n", "a.csv:1: two columns are called 'text'; rename"),
        ("a.tsv", "text\ttext \ta\n", "a.tsv:1: two columns are called 'text'"),
        ("a.jsonl", '{"text": "a", "text": "b"}', "a.jsonl:1: two fields are called 'text'"),
        ("a.json", '[{"text": "a", "text": "b"}]', "two fields are called 'text'"),
        ("a.csv", 'text,label\n"open,yes\nb,no\n', "a.csv:3: not CSV: unexpected end of data"),
        ("a.tsv", "text\tlabel\ra\tb\r", "a.tsv: carriage returns alone end its lines"),
    ):
        (tmp_path / name).write_text(content, newline="")
        with pytest.raises(ValueError, match=re.escape(why)):
            cells(tmp_path / name)
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: two columns are called 'text'"):
        texts(tmp_path / "a.parquet")


def test_lines_that_end_in_carriage_returns_alone_are_no_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"Oslo B-LOC\ris O\r")
    with pytest.raises(ValueError, match=r"a\.txt: carriage returns alone end its lines: convert them"):
        conll.read(str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_bytes(b"Oslo B-LOC\r\nis O\r\n")
    assert conll.read(str(tmp_path / "a.txt")).examples[0].tags == ("B-LOC", "O")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Ann B_PER\nsaw O\n", ":1: tag 'B_PER' among tags of spans"),
        ("Ann PER-B\nsaw O\n", ":1: tag 'PER-B' among tags of spans"),
        ("Ann b-per\nsaw o\n", ":1: tag 'b-per' among tags of spans"),
        ("Ann B-PER\n\nBob PER\nsaw O\n", ":3: tag 'PER' among tags of spans"),
        ("EU NNP\tB-NP I-ORG\n", ":1: word 'EU NNP' with tag 'B-NP I-ORG'; divide columns by tabs throughout"),
    ],
)
def test_tags_that_mark_spans_in_other_ways_are_told(tmp_path, text, why):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match="a.txt" + re.escape(why)):
        conll.read(str(tmp_path / "a.txt"))


def test_words_may_hold_any_blank_that_divides_no_columns(tmp_path):
    """No-break, ideographic and next-line spaces in words, and blanks where tabs divide."""
    text = "10\u00a0000 B-NUM\nx\u3000y  O\na\x85b\tO\nNew York\tB-LOC\n\u00a0 O\n"
    (tmp_path / "a.txt").write_text(text, "utf-8", newline="")
    [found] = conll.read(str(tmp_path / "a.txt")).examples
    assert found.words == ("10\u00a0000", "x\u3000y", "a\x85b", "New York", "\u00a0")
    assert found.tags == ("B-NUM", "O", "O", "B-LOC", "O")


def test_relations_of_words_that_are_no_numbers(tmp_path):
    row = dict(token=["a", "b"], subj_start=0, subj_end=None, obj_start=1, obj_end=1, relation="r")
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: an entity's start and end are \[0, None\]"):
        relations.read(str(tmp_path / "a.jsonl"))
