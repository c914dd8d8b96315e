"""What is wrong with labelled data is said before training, in a line that names the file: refused, or counted."""

import json
from pathlib import Path

import pytest

from jaxlm.commands import cli

CONFIG = """
from jaxlm import Data, Execution, Run, Train
from jaxlm.models import bert, llama
from jaxlm.objectives import answer, classify, relate, seq2seq, sft, tag

def config():
    small = dict(vocab=264, layers=1, width=32, heads=2, ffn=64, positions=48)
    decoder = llama.Config(**small, kv_heads=2, head_width=16)
    objective = {objective}
    model = decoder if isinstance(objective, sft.Config | seq2seq.Config) else bert.Config(**small)
    return Run("r", model, objective, data=Data(train=("train",), tokenizer="bytes", cache="cache"),
               train=Train(steps=1, batch_size=2, seq_len=48, prompts=()), execution=Execution("float32"))
"""
SPEAKS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
SPEAKS += "{% if add_generation_prompt %}[assistant]{% endif %}"
SILENT = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
TEXTS = "text\tlabel\ngood\tyes\nbad\tno\n"
RELATED = "text\tlabel\n<e1>Di</e1> saw <e2>Ed</e2>\tsaw(e1,e2)\n<e1>Di</e1> and <e2>Ed</e2>\tother\n"
TAGGED = "Ann B-PER\nsaw O\n"


def asked(*questions: tuple[str, int, str]) -> str:
    context = "Ann saw Oslo."
    qas = [dict(id=id, question="what?", answers=[dict(text=text, answer_start=at)]) for id, at, text in questions]
    return json.dumps(dict(data=[dict(title="t", paragraphs=[dict(context=context, qas=qas)])]))


def chats(*pairs: tuple[str, str]) -> str:
    return "\n".join(json.dumps(dict(question=q, answer=a)) for q, a in pairs)


KINDS = {
    "classify.Config()": ("tsv", TEXTS),
    "relate.Config()": ("tsv", RELATED),
    "tag.Config()": ("txt", TAGGED),
    "answer.Config()": ("json", asked(("a", 0, "Ann"))),
    "sft.Config()": ("jsonl", chats(("2+2?", "4"))),
    "seq2seq.Config()": ("jsonl", json.dumps(dict(source="a", target="b"))),
}


def said(tmp_path: Path, monkeypatch, capsys, objective: str, valid: str, train: str = "") -> tuple[int, str]:
    """(exit status, all that is printed) of preparing the data."""
    monkeypatch.chdir(tmp_path)
    kind = next(name for name in KINDS if objective.startswith(name.split("(")[0]))
    end, usual = KINDS[kind]
    Path(f"train.{end}").write_text(train or usual)
    Path(f"valid.{end}").write_text(valid)
    Path("c.py").write_text(CONFIG.format(objective=objective))
    status = cli.main(["data", "prepare", "c.py", "--data.train", f"train.{end}", "--data.valid", f"valid.{end}"])
    shown = capsys.readouterr()
    if status:
        assert shown.err.startswith("jaxlm: ") and shown.err.count("\n") == 1, "one line"
    return status, shown.out + shown.err


@pytest.mark.parametrize(
    ("objective", "valid", "why"),
    [
        ("classify.Config()", "text\tlabel\nx\tyess\n", "valid.tsv:2: unknown label 'yess'; did you mean 'yes'?"),
        ("classify.Config()", "text\tlabel\nx\tMAYBE\n", "valid.tsv:2: unknown label 'MAYBE'; known: no, yes."),
        (
            "relate.Config()",
            RELATED.replace("saw(", "seen("),
            "unknown label 'seen(e1,e2)'; did you mean 'saw(e1,e2)'?",
        ),
        ("tag.Config()", "Ann B-LOC\n", "valid.txt:1: unknown label 'B-LOC'"),
    ],
)
def test_wrong_label_names(tmp_path, monkeypatch, capsys, objective, valid, why):
    status, shown = said(tmp_path, monkeypatch, capsys, objective, valid)
    assert status == 2 and why in shown and "Correct the file or name it in objective.labels" in shown


@pytest.mark.parametrize("objective", KINDS)
@pytest.mark.parametrize("part", ["train", "valid"])
def test_empty_splits(tmp_path, monkeypatch, capsys, objective, part):
    nothing = {"classify.Config()": "text\tlabel\n", "answer.Config()": '{"data": []}'}.get(objective, "\n")
    valid, train = (KINDS[objective][1], nothing) if part == "train" else (nothing, "")
    status, shown = said(tmp_path, monkeypatch, capsys, objective, valid, train)
    assert status == 2 and "is empty" in shown
    assert f"{part}." in shown, "the file"
    assert "it holds no labelled example; name one that has some" in shown or objective[:3] in ("seq", "sft")


@pytest.mark.parametrize("objective", KINDS)
def test_examples_that_stand_in_two_splits(tmp_path, monkeypatch, capsys, objective):
    status, shown = said(tmp_path, monkeypatch, capsys, objective, KINDS[objective][1])
    end = KINDS[objective][0]
    assert status == 0 and "validation examples stand in the training data too" in shown
    assert "scores on them tell nothing: remove them from one of the two" in shown
    assert f"(first: valid.{end}" in shown or objective[:3] in ("seq", "sft")


@pytest.mark.parametrize("whole", [True, False])
def test_texts_that_are_learned_and_held_out_are_told(tmp_path, monkeypatch, capsys, whole):
    """Plain text and records of text, of which windows are cut, as well as labelled examples."""
    monkeypatch.chdir(tmp_path)
    texts = [f"text {i}" for i in range(4)]
    Path("a.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts))
    Path("b.jsonl").write_text(
        "".join(json.dumps(dict(text=t)) + "\n" for t in (texts if whole else [*texts[3:], "x y"]))
    )
    Path("c.py").write_text(CONFIG.format(objective="causal.Config()").replace("import answer", "import answer, causal")
                            .replace("sft.Config |", "causal.Config | sft.Config |"))  # fmt: skip
    assert cli.main(["data", "prepare", "c.py", "--data.train", "a.jsonl", "--data.valid", "b.jsonl"]) == 0
    n, total = (4, 4) if whole else (1, 2)
    assert f"{n} of {total} validation examples stand in the training data too" in capsys.readouterr().out


def test_spans_that_stand_elsewhere(tmp_path, monkeypatch, capsys):
    wrong = ("b", 4, "Ann"), ("c", 0, "Oslo")
    status, shown = said(tmp_path, monkeypatch, capsys, "answer.Config()", asked(("a", 8, "Oslo"), *wrong))
    assert status == 0 and "valid.json: 2 left out: valid.json: question b: the answer 'Ann' is not at character 4" in (
        shown
    )
    assert "question c: the answer 'Oslo' is not at character 0, where 'Ann ' stands" in shown
    assert "valid.json: 1 records" in shown
    status, shown = said(tmp_path, monkeypatch, capsys, "answer.Config()", asked(*wrong))
    assert status == 2 and "valid.json' is empty: it holds no labelled example; 2 were left out, the first:" in shown


@pytest.mark.parametrize(
    ("objective", "valid", "told"),
    [
        ("classify.Config()", f"text\tlabel\n{'x' * 99}\tyes\ny\tno\n", "1 of 2 texts lose their end"),
        ("relate.Config()", RELATED + f"<e1>Di</e1> saw <e2>Ed</e2>{' x' * 50}\tother\n", "1 of 3 texts lose an end"),
        ("tag.Config()", f"{'x' * 99} O\n\ny O\n", "1 of 2 sentences lose their end"),
        ("answer.Config(question_len=3)", asked(("a", 0, "Ann")), "1 questions lose their end"),
        ("sft.Config()", chats(("2+2?", "4" * 99), ("3?", "3")), "1 of 2 conversations lose their end"),
    ],
)
def test_what_is_too_long_is_counted(tmp_path, monkeypatch, capsys, objective, valid, told):
    status, shown = said(tmp_path, monkeypatch, capsys, objective, valid)
    assert status == 0 and f"valid.{KINDS[objective.split('(')[0] + '()'][0]}: {told}" in shown
    assert "; raise " in shown


def test_templates_without_the_assistants_part(tmp_path, monkeypatch, capsys):
    pytest.importorskip("jinja2")
    valid = KINDS["sft.Config()"][1]
    assert said(tmp_path, monkeypatch, capsys, f"sft.Config(template={SPEAKS!r})", valid)[0] == 0
    status, shown = said(tmp_path, monkeypatch, capsys, f"sft.Config(template={SILENT!r})", valid)
    assert status == 2 and "train.jsonl:1: the chat template" in shown and "use another template" in shown
