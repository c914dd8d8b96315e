"""Choices in lists and columns, and the right one by number, letter and name."""

import json
from pathlib import Path

import pytest

from jaxlm.data.labelled import choices


def write(folder: Path, *rows: dict) -> str:
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "a.jsonl")


def test_lists_columns_and_named_choices(tmp_path):
    named = dict(text=["x", "y"], label=["1", "2"])
    file = write(tmp_path, *(dict(context="c", choices=v, answer=a) for v, a in (
        (["x", "y"], 1), (["x", "y"], "B"), (["x", "y"], "b"), (named, "2"),
        ([dict(label="Q", text="x"), dict(label="A", text="y")], "A"))))  # fmt: skip
    found = choices.read(file).examples
    assert [(e.choices, e.answer) for e in found] == [(("x", "y"), 1)] * 5 and found[1].where == f"{file}:2"
    (tmp_path / "b.csv").write_text("s1,s2,e1,e2,label\nI ran,so,I fell,I won,2\n")
    names = choices.Names(("s1", "s2"), ("e1", "e2"), "label")
    [one] = choices.read(str(tmp_path / "b.csv"), names, first=1).examples
    assert (one.context, one.choices, one.answer) == ("I ran so", ("I fell", "I won"), 1)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (dict(answer=2), r"a\.jsonl:1: answer '2' is none of the 2 choices \(0 to 1, or A to B\); .*objective\.first"),
        (dict(answer="C"), r"a\.jsonl:1: answer 'C' is none of the 2"),
        (dict(answer="-1"), r"a\.jsonl:1: answer '-1' is none of the 2"),
        (dict(answer="both"), r"a\.jsonl:1: answer 'both' is none of the 2"),
        (dict(answer=0, choices=["x"]), r"a\.jsonl:1: 1 choices leave nothing to choose"),
        (dict(answer=0, choices="x"), r"a\.jsonl:1: no list 'choices'.* Set objective\.choices"),
        (dict(answer=0, context=None), r"a\.jsonl:1: no text 'context'.* Set objective\.context"),
        (dict(), r"a\.jsonl:1: no text 'answer'.* Set objective\.answer"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path, row, why):
    file = write(tmp_path, dict(context="c", choices=["x", "y"]) | row)
    with pytest.raises(ValueError, match=why):
        choices.read(file)
