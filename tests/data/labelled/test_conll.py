"""CoNLL files: sentences, documents, and every way to mark spans as one."""

import re

import pytest

from jaxlm.data.labelled import check_labels, conll
from jaxlm.data.labelled.conll import to_iob2


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("I-PER I-PER O I-LOC B-LOC I-LOC", "B-PER I-PER O B-LOC B-LOC I-LOC"),  # IOB1
        ("I-PER I-ORG O", "B-PER B-ORG O"),
        ("B-PER I-PER O B-LOC", "B-PER I-PER O B-LOC"),  # IOB2 stays
        ("B-PER I-PER E-PER O S-LOC S-LOC", "B-PER I-PER I-PER O B-LOC B-LOC"),  # BIOES
        ("B-PER L-PER U-LOC O I-LOC", "B-PER I-PER B-LOC O B-LOC"),
        ("NN VB NN", "NN VB NN"),
        ("O O", "O O"),
    ],
)
def test_spans_are_marked_one_way(tags, expected):
    assert to_iob2(tags.split()) == tuple(expected.split())


def test_sentences_and_documents(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("-DOCSTART- -X- O\n\nEU NNP I-ORG\nsays VB O\n\n\nIt PR O\n-DOCSTART- -X- O\n\nPeter NN I-PER")
    found = conll.read(str(file)).examples
    assert [(e.words, e.tags, e.document) for e in found] == [
        (("EU", "says"), ("B-ORG", "O"), 1), (("It",), ("O",), 1), (("Peter",), ("B-PER",), 2),
    ]  # fmt: skip
    assert found[2].where == f"{file}:10"
    assert conll.read(str(file), tag=1).examples[0].tags == ("NNP", "VB")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a b O\nc O\n", "a.txt:2: 2 columns, where the first line has 3"),
        ("\n\n", "is empty: it holds no labelled example"),
        ("a I-X\nb Y\nc O\n", "tag 'Y' among tags of spans"),
    ],
)
def test_what_is_no_such_file(tmp_path, text, why):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=re.escape(why)):
        conll.read(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="does not exist"):
        conll.read(str(tmp_path / "b.txt"))
    with pytest.raises(ValueError, match="names one beyond"):
        (tmp_path / "a.txt").write_text("a O\n")
        conll.read(str(tmp_path / "a.txt"), tag=5)


def test_unknown_labels():
    with pytest.raises(ValueError, match=r"x:3: unknown label 'B-PRE'; did you mean 'B-PER'\? Correct the file"):
        check_labels([("x:1", "O"), ("x:3", "B-PRE")], ["O", "B-PER"], "objective.labels")
