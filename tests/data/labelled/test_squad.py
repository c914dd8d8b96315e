"""Questions whose answers stand in a text: SQuAD's files, flat records, and what is wrong with them."""

import json
from pathlib import Path

import pytest

from jaxlm.data.labelled import squad

TEXT = "Ann saw Oslo in May."


def nested(*questions: dict) -> str:
    return json.dumps({"version": "1.1", "data": [{"paragraphs": [{"context": TEXT, "qas": list(questions)}]}]})


def asked(id: str, *answers: tuple[str, int], **more) -> dict:
    return dict(id=id, question=f"{id}?", answers=[dict(text=t, answer_start=s) for t, s in answers], **more)


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_squads_own_files(tmp_path):
    file = write(tmp_path, "a.json", nested(asked("a", ("Oslo", 8), ("saw Oslo", 4)), asked("b", is_impossible=True)))
    found = squad.read(file)
    assert [q.answers for q in found.examples] == [((8, "Oslo"), (4, "saw Oslo")), ()] and not found.problems
    assert found.examples[0].where == f"{file}: question a" and found.examples[0].context == TEXT
    plausible = asked("c", ("May", 16), is_impossible=True)
    assert squad.read(write(tmp_path, "b.json", nested(plausible))).examples[0].answers == ()


def test_flat_records(tmp_path):
    row = dict(id="a", question="who?", context=f" {TEXT}", answers=dict(text=["Ann"], answer_start=[1]))
    none = dict(question="why?", context=TEXT, answers=dict(text=[], answer_start=[]))
    file = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, (row, none))))
    first, second = squad.read(file).examples
    assert first.answers == ((1, "Ann"),) and first.context == f" {TEXT}", "characters are counted with the white space"
    assert second.answers == () and second.where == second.id == f"{file}:2"
    file = write(tmp_path, "b.json", json.dumps([dict(q="who?", c=TEXT, a=[dict(text=" saw", answer_start=3)])]))
    assert squad.read(file, squad.Names("q", "c", "a")).examples[0].answers == ((4, "saw"),)


def test_answers_that_stand_elsewhere_are_told(tmp_path):
    file = write(tmp_path, "a.json", nested(asked("a", ("Oslo", 7), ("Oslo", 8)), asked("b", ("Ann", 4))))
    found = squad.read(file)
    assert [q.id for q in found.examples] == ["a"] and found.examples[0].answers == ((8, "Oslo"),)
    assert found.problems[1] == f"{file}: question b: the answer 'Ann' is not at character 4, where 'saw' stands"
    with pytest.raises(
        ValueError, match=r"is empty: it holds no labelled example; 1 were left out, the first: .*'Ann'"
    ):
        squad.read(write(tmp_path, "b.json", nested(asked("b", ("Ann", 4)))))


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.json", nested(asked("a"), asked("a")), r"a\.json: question a stands there twice"),
        (
            "a.json",
            nested(dict(id="a", question="q")),
            r"a\.json: question a: no answers 'answers' .*id, question\. Set",
        ),
        ("a.json", nested(dict(id="a", answers=[])), r"question a: not as SQuAD's files are \(KeyError: 'question'\)"),
        ("a.json", '{"data": {}}', r"a\.json: an object without a list 'data'"),
        ("a.json", '{"data": [}', r"a\.json:1: not JSON"),
        ("a.jsonl", '{"context": "x", "answers": []}', r"a\.jsonl:1: no text 'question'.* Set objective\.question"),
        ("a.jsonl", '{"context": " ", "question": "x", "answers": []}', r"a\.jsonl:1: an empty context; remove it"),
        ("a.jsonl", '{"context": "x", "question": "x", "answers": "x"}', r"a\.jsonl:1: no answers 'answers' with text"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path, name, text, why):
    with pytest.raises(ValueError, match=why):
        squad.read(write(tmp_path, name, text))
