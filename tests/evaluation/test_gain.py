"""What training changed: the validation before the first step beside those that follow, in the log and the report."""

import json
import re
import shutil

import pytest
from support.tiny_models import published

from jaxlm.assembly import convert, model_source, read_rows
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
    file, test = tmp_path / "t.tsv", tmp_path / "test.tsv"
    rows = [f"{'yes' if i % 3 else 'no'} {i}\t{'pos' if i % 3 else 'neg'}" for i in range(90)]
    file.write_text("\n".join(["text\tlabel", *rows[:60]]))
    test.write_text("\n".join(["text\tlabel", *rows[60:80], "yes 90\tneg", "no 91\tpos"]))
    (tmp_path / "c.py").write_text(CONFIG.format(file=str(file), out=str(tmp_path)))
    start = published(tmp_path / "bert", "bert")
    command = ["train", str(tmp_path / "c.py"), "--start", str(start), "--data.test", str(test)]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    found = gains(tmp_path / "r")
    assert [line["step"] for line in found] == [15, 30]
    before = next(x for x in read_lines(tmp_path / "r" / "metrics.jsonl") if x["kind"] == "valid" and x["step"] == 0)
    accuracy = found[-1]["figures"]["accuracy"]
    assert accuracy["against"] == pytest.approx(before["accuracy"]) and accuracy["over"] == "60 examples"
    assert accuracy["value"] == 1 and accuracy["difference_interval"][0] > 0 and accuracy["p"] < 0.05
    assert found[-1]["figures"]["loss"]["over"] == "60 examples"
    assert list(found[-1]["figures"]) == ["accuracy", "f1_macro", "f1_weighted", "mcc", "loss"], "its own scores first"
    classes = found[-1]["classes"]
    assert classes["neg"]["support"] == 20 and classes["pos"]["support"] == 40 and classes["neg"]["f1"]["value"] == 1
    chosen = "pos" if before["accuracy"] > 0.5 else "neg"  # by the head at the start, which knows nothing
    recalls = [classes[name]["recall"]["against"] for name in ("neg", "pos")]
    assert (20 * recalls[0] + 40 * recalls[1]) / 60 == pytest.approx(before["accuracy"])
    assert classes[chosen]["recall"]["against"] > 0.5 and len(classes[chosen]["precision"]["against_interval"]) == 2
    used = 30  # as good as step 15, and newer
    page = re.sub(r"<[^>]*>", " ", (tmp_path / "r" / "report.html").read_text())
    assert "Before and after" in page and f"and step {used};" in page
    assert "bert with a new head and step" in page and "f1 before (new head)" in page and "Classes" in page
    assert f"step {used} beside the model it starts from, whose head is new, 10,000 resamples" in shown
    _check_test_data(tmp_path, file, test, shown, page, capsys)
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "checkpoint-30")
    file = tmp_path / "r" / "metrics.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in read_lines(file) if x.get("name") != "end"))
    assert cli.main(["train", str(tmp_path / "r")]) == 0
    assert gains(tmp_path / "r") == found


def _check_test_data(folder, file, test, shown, page, capsys) -> None:
    """The run says everywhere which rows chose its checkpoint and which were never seen, and keeps their scores apart;
    scoring the latter reads no other data."""
    [told] = [line for line in read_lines(folder / "r" / "metrics.jsonl") if line.get("name") == "test"]
    assert told["used"] == 30 and told["figures"]["accuracy"] < 1 and told["over"] == "22 examples"
    low, high = told["intervals"]["accuracy"]
    assert low < told["figures"]["accuracy"] <= high
    chose = "chose the checkpoint: step 30 by the best accuracy of 2 validations"
    assert f"valid ({chose}, 60 examples): accuracy 1 [1, 1]" in shown
    assert f"test (never seen, 22 examples): accuracy {told['figures']['accuracy']:.4g} [" in shown
    assert f'"text":"valid","small":"{chose}"' in page and '"text":"test","small":"never seen"' in page
    assert "flatter it" not in shown
    assert "60 of 60 validation examples stand in the training data too" in shown
    assert "20 of 22 test examples" not in shown, "none of them was seen"
    file.rename(folder / "away")
    assert cli.main(["eval", str(folder / "r"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["rows"], record["role"]) == ("test", "never seen")
    assert {name: record[name] for name in told["figures"]} == pytest.approx(told["figures"], rel=1e-5)
    assert cli.main(["eval", str(folder / "r"), "--data", str(test), "--rows", "valid"]) == 2
    (folder / "away").rename(file)
    card = convert._about(model_source.describe(folder / "r")).origin
    assert chose in card and f"test (never seen, 22 examples): accuracy {told['figures']['accuracy']:.4g}" in card


def test_a_run_from_nothing_says_nothing_of_it_and_tests_the_step_that_it_uses(tmp_path, monkeypatch, capsys):
    gather, counts = read_rows.by_record, []

    def counted(p, found):
        out = gather(p, found)
        counts.append(len(out))
        return out

    monkeypatch.setattr(read_rows, "by_record", counted)
    file, test = tmp_path / "t.tsv", tmp_path / "test.tsv"
    file.write_text("text\tlabel\n" + "a\tx\nb\ty\n" * 8)
    test.write_text("text\tlabel\n" + "a\tx\nb\ty\n" * 4)  # the rows that are validated
    (tmp_path / "c.py").write_text(CONFIG.format(file=str(file), out=str(tmp_path)))
    options = ["--train.steps", "2", "--train.eval-batches", "1", "--train.eval-every", "1", "--data.test", str(test)]
    assert cli.main(["train", str(tmp_path / "c.py"), *options, "--train.metric", "max:loss"]) == 0
    assert counts == [8, 8, 8, 8], "the limit is for predictions too"
    assert "test (never seen, 8 examples): accuracy" in capsys.readouterr().out
    lines = read_lines(tmp_path / "r" / "metrics.jsonl")
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "valid" and line["step"]}
    [told] = [line for line in lines if line.get("name") == "test"]
    worst = max(losses, key=losses.__getitem__)
    assert worst == 1 == told["used"] and told["figures"]["loss"] == pytest.approx(losses[1], rel=1e-6)
    assert losses[1] > losses[2] + 1e-4
    assert not gains(tmp_path / "r") and not (tmp_path / "r" / "start.npz").exists()
    assert "Before and after" not in (tmp_path / "r" / "report.html").read_text()
