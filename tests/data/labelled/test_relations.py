"""Entities in texts: marks in every spelling, spans of characters and words, and what is wrong with them."""

import json
from pathlib import Path

import pytest

from jaxlm.data.labelled import relations

OFFICIAL = """1	"The <e1>child</e1>'s <e2>cradle</e2>."
Other
Comment: none

2	"A <e1>key</e1> of <e2>it</e2>"
X(e2,e1)
"""


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def shown(source: str, **more) -> list[tuple[str, str, str, str]]:
    return [(e.text, e.text[slice(*e.head)], e.text[slice(*e.tail)], e.label)
            for e in relations.read(source, **more).examples]  # fmt: skip


def test_the_published_files(tmp_path):
    file = write(tmp_path, "TRAIN_FILE.TXT", OFFICIAL)
    assert shown(file) == [
        ("The child's cradle.", "child", "cradle", "Other"),
        ("A key of it", "key", "it", "X(e2,e1)"),
    ]
    assert relations.read(file).examples[1].where == f"{file}:5"


def test_marks_with_and_without_white_space(tmp_path):
    rows = ["The <e1> child </e1> was in the <e2> old cradle </e2> .\ta", "<e2>b</e2><e1>c</e1>\tb",
            "<e1>in <e2>May</e2></e1>\tc"]  # fmt: skip
    file = write(tmp_path, "a.tsv", "\n".join(rows))
    assert shown(file, columns=("text", "label")) == [
        ("The child was in the old cradle .", "child", "old cradle", "a"), ("bc", "c", "b", "b"),
        ("in May", "in May", "May", "c"),
    ]  # fmt: skip


def test_spans_of_characters_and_words(tmp_path):
    rows = [dict(text="Ann saw Oslo", head=[0, 3], tail=[8, 12], label="x"),
            dict(text=["Ann", "saw", "Oslo"], head=[2, 3], tail=[0, 1], label="y"),
            dict(token=["Ann", "Lee", "saw", "Bo"], subj_start=0, subj_end=1, obj_start=3, obj_end=3,
                 relation="z")]  # fmt: skip
    file = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert shown(file) == [("Ann saw Oslo", "Ann", "Oslo", "x"), ("Ann saw Oslo", "Oslo", "Ann", "y"),
                           ("Ann Lee saw Bo", "Ann Lee", "Bo", "z")]  # fmt: skip
    renamed = dict(t="Ann saw Oslo", h=[0, 3], o=[8, 12], r="x")
    file = write(tmp_path, "b.json", json.dumps([renamed]))
    assert shown(file, names=relations.Names("t", "h", "o", "r")) == [("Ann saw Oslo", "Ann", "Oslo", "x")]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (dict(text="<e1>a</e1> b"), r"a\.jsonl:1: no <e2>; mark both entities"),
        (dict(text="<e1>a</e1> <e2>b</e2> <e1>c</e1>"), r"a\.jsonl:1: <e1> stands there twice"),
        (dict(text="<e1> </e1> <e2>b</e2>"), r"a\.jsonl:1: nothing stands between <e1> and </e1>"),
        (
            dict(text="a b", head=[0, 1], tail=[2, 9]),
            r"a\.jsonl:1: entity \[2, 9\] is not within the text's 3 characters",
        ),
        (
            dict(text=["a", "b"], head=[0, 1], tail=[1, 1]),
            r"a\.jsonl:1: entity \[1, 1\] is not within the text's 2 words",
        ),
        (dict(text="a b", head=[0, 1]), r"a\.jsonl:1: tail is None, where \[first, after the last\] is due"),
        (dict(sentence="x"), r"a\.jsonl:1: no text 'text'; columns there: sentence, label\. Set objective\.text"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path, row, why):
    file = write(tmp_path, "a.jsonl", json.dumps(row | dict(label="x")))
    with pytest.raises(ValueError, match=why):
        relations.read(file)


def test_sentences_without_labels_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt:1: no label below the sentence"):
        relations.read(write(tmp_path, "a.txt", '1\t"<e1>a</e1> <e2>b</e2>"\n2\t"<e1>a</e1> <e2>b</e2>"\n'))
    with pytest.raises(ValueError, match="is empty: it holds no labelled example"):
        relations.read(write(tmp_path, "b.txt", "nothing\n"))
