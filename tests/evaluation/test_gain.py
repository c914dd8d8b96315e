"""What training changed: the validation before the first step beside those that follow, in the log and the report."""

import json
import re
import shutil

import pytest
from support.tiny_models import published

from jaxlm.assembly import corpus
from jaxlm.commands import cli
from jaxlm.training.log import read_lines

pytest.importorskip("sklearn")

CONFIG = """
from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import bert
from jaxlm.objectives import classify

def config():
    return Run("r", bert.Config(vocab=264, layers=1, width=16, heads=2, ffn=32, positions=64), classify.Config(),
               data=Data(train=({file!r},), valid=({file!r},), tokenizer="bytes"), optim=Optim(lr=1e-2, warmup=1),
               train=Train(steps=30, batch_size=8, seq_len=32, eval_every=15, save_every=15, prompts=(),
                           metric="accuracy", use="best"),
               execution=Execution("float32"), out={out!r})
"""


def gains(folder) -> list[dict]:
    lines = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in x.items() if k != "time"} for x in lines if x.get("name") == "gain"]


@pytest.mark.usefixtures("one_device")
def test_a_run_says_what_it_changed_and_a_continued_run_says_the_same(tmp_path, capsys):
    file = tmp_path / "t.tsv"
    rows = [f"{'yes' if i % 3 else 'no'} {i}\t{'pos' if i % 3 else 'neg'}" for i in range(60)]
    file.write_text("\n".join(["text\tlabel", *rows]))
    (tmp_path / "c.py").write_text(CONFIG.format(file=str(file), out=str(tmp_path)))
    start = published(tmp_path / "bert", "bert")
    command = ["train", str(tmp_path / "c.py"), "--start", str(start)]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    found = gains(tmp_path / "r")
    assert [line["step"] for line in found] == [15, 30]
    before = next(x for x in read_lines(tmp_path / "r" / "metrics.jsonl") if x["kind"] == "valid" and x["step"] == 0)
    accuracy = found[-1]["figures"]["accuracy"]
    assert accuracy["against"] == pytest.approx(before["accuracy"]) and accuracy["over"] == "60 examples"
    assert accuracy["value"] == 1 and accuracy["difference_interval"][0] > 0 and accuracy["p"] < 0.05
    assert found[-1]["figures"]["loss"]["over"] == "8 batches"
    assert list(found[-1]["figures"]) == ["accuracy", "f1_macro", "f1_weighted", "mcc", "loss"], "its own scores first"
    used = [line["step"] for line in found if line["best"]][-1]
    page = re.sub(r"<[^>]*>", " ", (tmp_path / "r" / "report.html").read_text())
    assert "Before and after" in page and f"and step {used};" in page
    assert f"step {used} beside the model it starts from, 10,000 resamples" in shown
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "checkpoint-30")
    file = tmp_path / "r" / "metrics.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in read_lines(file) if x.get("name") != "end"))
    assert cli.main(["train", str(tmp_path / "r")]) == 0
    assert gains(tmp_path / "r") == found


def test_a_run_from_nothing_says_nothing_of_it(tmp_path, monkeypatch):
    predict, counts = corpus.predictions, []
    monkeypatch.setattr(corpus, "predictions", lambda p, w, part: counts.append(len(part)) or predict(p, w, part))
    file = tmp_path / "t.tsv"
    file.write_text("text\tlabel\n" + "a\tx\nb\ty\n" * 8)
    (tmp_path / "c.py").write_text(CONFIG.format(file=str(file), out=str(tmp_path)))
    assert cli.main(["train", str(tmp_path / "c.py"), "--train.steps", "2", "--train.eval-batches", "1"]) == 0
    assert counts == [8, 8], "the limit is for predictions too"
    assert not gains(tmp_path / "r") and not (tmp_path / "r" / "start.npz").exists()
    assert "Before and after" not in (tmp_path / "r" / "report.html").read_text()
