"""The report is made from logs alone, needs nothing from outside, and shows other people's text as text."""

import base64
import hashlib
import json
import re
import shlex
import sys

import pytest

from jaxlm.training.log import RunLog
from jaxlm.training.report import build, smoothed

pytest.importorskip("matplotlib")

CONFIG = {
    "name": "tiny & small",
    "model": {"family": "llama", "width": 64},
    "objective": {"family": "causal"},
    "train": {"batch_size": 4, "seq_len": 32},
    "seed": 0,
}


def run(folder, *, valid=True):
    with RunLog(folder, tensorboard=False) as out:
        out.event(0, "model", parameters=1_234_567, trainable=4_096)
        out.event(0, "compression", bytes=516157, gzip=2.5, xz=2.125)
        out.sample(0, "The ", "<script>alert(1)</script>")
        for step in range(1, 41):
            loss = float("nan") if step == 7 else 4 / step
            time = {"tokens_per_s": 1000.0 + step, "mfu_causal": 0.25, "mfu_full": None, "elapsed_s": float(step % 25)}
            out.train(step, {"loss": loss, "lr": 1e-3, "grad_norm": 0.5, "tokens": 100 * step}, time)
            if valid and step % 10 == 0:
                out.valid(step, {"loss": abs(step - 30) / 10 + 1, "bits_per_byte": abs(step - 30) / 10 + 0.75}, {})
        out.sample(20, "The ", "middle")
        out.sample(40, "The ", "cat & dog")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "environment.json").write_text(json.dumps({"devices": {"kind": "cpu", "count": 8}}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with its report, which no test changes."""
    folder = run(tmp_path_factory.mktemp("run"))
    build(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return folder / "report.html"


def view(page):
    """What the page shows, as it holds it."""
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    [found] = json.loads(text)
    return found


def text(page):
    """What a reader sees beside the curves."""

    def words(value):
        if isinstance(value, dict):
            return [word for part in value.values() for word in words(part)]
        return [word for part in value for word in words(part)] if isinstance(value, list) else [str(value)]

    shown = view(page)
    brief = shown["brief"]
    seen = [brief["name"], brief["state"], brief["about"], *brief["alerts"]]
    blocks = lambda part: [list(b.values())[1:] for b in part["blocks"]]  # noqa: E731
    seen += words([[part["title"], part["note"], blocks(part)] for part in shown["sections"]])
    return re.sub(r"\s+", " ", " ".join(filter(None, seen)))


def block(page, name):
    return next(part for part in view(page)["sections"] if part["id"] == name)["blocks"][0]


def test_the_summary_comes_first_and_tells_best_and_final(page):
    seen = text(page)
    for words in (
        "tiny & small unfinished llama · causal",
        "Best bits per byte 0.7500 step 30 Final bits per byte 1.7500",
        "Best validation loss 1.0000 step 30 Final validation loss 2.0000",
        "Steps 40 Tokens 4 K",
        "Time 39.0 s",  # 24 s in the first sitting, 15 s in the second
        "MFU, causal attention 25.0%",
        "Parameters 1.23 M Trainable parameters 4.1 K",
    ):
        assert words in seen
    assert "MFU, full" not in seen  # unknown is left out, not shown as 0
    assert view(page)["order"][0] == "summary"


def test_the_chart_of_compressors_has_bits_per_byte_alone(page):
    bars = block(page, "compression")["rows"]
    assert [bar[:2] for bar in bars] == [["gzip", "2.500"], ["xz", "2.125"], ["this model", "0.750"]]
    assert [bar[2] for bar in bars] == [1, 0.85, 0.3] and [bar[3] for bar in bars] == [False, False, True]


def test_the_speed_is_tokens_over_time(page):
    """40 steps of 100 tokens in 128 positions took 24 + 15 seconds; the median of the steps is another figure."""
    assert f"Tokens per second {40 * 100 / 39:,.0f} a typical step 1,02" in text(page)


def test_a_smoothed_curve_does_not_lag():
    y = [4 / (1 + i / 10) for i in range(400)]
    noisy = [v + (0.3 if i % 2 else -0.3) for i, v in enumerate(y)]
    smooth = smoothed(noisy)
    late = range(40, 395)
    assert max(abs(smooth[i] - y[i]) for i in late) < 0.06
    assert abs(sum(smooth[i] - y[i] for i in late)) / len(late) < 0.01, "it lies neither above nor below"
    assert smoothed([float("nan") if i == 200 else 1.0 for i in range(400)]) == [1.0] * 400


def test_samples_are_told_from_first_to_last(page):
    [row] = block(page, "samples")["rows"]
    assert row["prompt"] == "The "
    assert row["texts"] == [[0, "<script>alert(1)</script>"], [20, "middle"], [40, "cat & dog"]]


def test_nothing_of_a_run_can_become_markup(page, tmp_path):
    written = page.read_text()
    assert "alert(1)" in written and "<script>alert" not in written and "</script>alert" not in written
    folder = run(tmp_path)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"name": "</title><script>x</script><!--SCRIPTS-->"}))
    written = build(folder).read_text()
    assert "<script>x" not in written and "&lt;/title&gt;" in written and "\\u003c!--SCRIPTS" in written
    assert view(folder / "report.html")["brief"]["name"] == "</title><script>x</script><!--SCRIPTS-->"


def test_the_page_asks_nothing_of_the_network_and_runs_its_own_scripts_alone(page):
    written = page.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//|page/)""", written)
    assert "@import" not in written and "url(http" not in written
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', written)
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for tag in ("script", "style"):
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", written, re.DOTALL)
        sums = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in texts]
        assert re.findall(r"sha256-([^']*)", policy.split(f"{tag}-src")[1].split(";")[0]) == sums and sums
    assert "Copyright (c) 2022 Leon Sorokin" in written, "the licence of what is in the page goes with it"


def test_the_page_has_every_curve_and_says_where_it_is_best(page):
    shown = view(page)
    panels = {panel["key"]: panel for panel in shown["panels"]}
    assert list(panels)[:3] == ["valid/loss", "train/loss", "valid/bits_per_byte"], (
        "what chooses the checkpoint is first"
    )
    assert {"train/lr", "train/grad_norm", "train/time/tokens_per_s"} < panels.keys()
    assert not {"train/tokens", "train/time/elapsed_s"} & panels.keys()
    best = panels["valid/loss"]["best"]
    assert (best["step"], best["value"], best["word"], best["tokens"]) == (30, 1.0, "lowest", 3000)
    loss = shown["train"]["columns"]["loss"]
    assert len(loss["mean"]) == 40 and loss["mean"][6] is None and loss["gaps"] == [6], "NaN is a gap"
    assert shown["train"]["seconds"][22:27] == [23.0, 24.0, 24.0, 25.0, 26.0], "sittings add up"


def test_the_picture_is_a_picture(folder):
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_logs_give_the_same_page(page, tmp_path):
    assert build(run(tmp_path)).read_text() == page.read_text()


def test_a_run_cut_off_early_has_a_report_of_what_there_is(tmp_path):
    run(tmp_path, valid=False)
    (tmp_path / "config.json").unlink()
    (tmp_path / "environment.json").unlink()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    page = build(tmp_path)
    assert {panel["key"][:5] for panel in view(page)["panels"]} == {"train"}
    assert "Steps 40" in text(page) and "validation loss" not in text(page)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no metrics\.jsonl: name the directory of a run"),
        ("", "no training or validation line yet"),
        ("nonsense\n", "line 1 is not a line of this log"),
    ],
)
def test_nothing_to_show_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        build(tmp_path)


def test_missing_matplotlib_names_the_remedy(tmp_path, monkeypatch):
    run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'pip install "jaxlm\[report\]"'):
        build(tmp_path)


def test_before_and_after_of_a_run_that_starts_from_a_model(page, tmp_path):
    folder = run(tmp_path)
    assert "Before and after" not in text(page)

    def figures(value):
        found = dict(value=value, interval=[value - 0.1, value + 0.1], against=0.5, against_interval=[0.4, 0.6])
        return {
            "f1<b>": found | dict(difference=value - 0.5, difference_interval=["NaN", 0.3], p=0.004, over="9 examples")
        }

    with RunLog(folder, tensorboard=False) as out:
        out.event(30, "gain", figures=figures(0.75), resamples=10_000, best=True)
        out.event(40, "gain", figures=figures(0.7), resamples=10_000, best=False)
    seen = text(build(folder))
    assert "its start and step 40; 95 % intervals" in seen
    assert "f1<b> 0.5 0.4 … 0.6 0.7 0.6 … 0.8 +0.2 NaN … +0.3 0.0040 9 examples" in seen
    config = CONFIG | {"start": "models/<x>", "train": CONFIG["train"] | {"use": "best"}}
    (folder / "config.json").write_text(json.dumps(config))
    seen = text(build(folder))
    assert "models/<x> and step 30" in seen and "which flatters it" in seen and "+0.25" in seen


def answers(part, right):
    """What a validation says of predictions, `right` of 10 of which are right."""
    figures = {"precision": right / 10, "recall": 1.0, "f1": 0.5, "support": 6.0}
    worst = {"where": "t.tsv, line 3", "text": "<i>not</i> bad", "true": "pos", "found": "neg", "loss": 2.5}
    confused = {"labels": ["neg", "pos"], "counts": [[4, 0], [10 - right, right - 4]], "left_out": 0}
    return dict(part=part, over=10, wrong=10 - right, classes={"neg": figures, "pos": figures}, hardest=[worst],
                confusion=confused)  # fmt: skip


def test_a_task_has_its_classes_confusions_and_hardest_wrong_examples(tmp_path):
    folder = run(tmp_path)
    with RunLog(folder, tensorboard=False) as out:
        out.event(30, "answers", **answers("valid", 8))
        out.event(40, "answers", **answers("valid", 7))
    page = build(folder)
    seen = text(page)
    assert "validation at step 40; 3 of 10 wrong" in seen, "the last one, while nothing says which is used"
    assert "t.tsv, line 3 <i>not</i> bad pos neg 2.5" in seen
    matrix = block(page, "confusion")
    assert matrix["heads"][1:] == ["neg", "pos"]
    [_, wrong, _] = matrix["rows"][1]
    assert (wrong["text"], wrong["shade"], wrong["wrong"]) == ("3", 0.5, True)
    assert [cell["text"] for cell in block(page, "classes")["rows"][0][1:4]] == ["0.7000", "1.0000", "0.5000"]
    with RunLog(folder, tensorboard=False) as out:
        out.event(40, "end", reason="finished", used=30)
    assert "validation at step 30; 2 of 10 wrong" in text(build(folder))
    with RunLog(folder, tensorboard=False) as out:
        out.event(40, "answers", **answers("test", 5))
    assert "test rows; 5 of 10 wrong" in text(build(folder))


def test_it_says_by_which_command_the_run_is_made_again(tmp_path):
    folder = run(tmp_path)
    config = CONFIG | {"name": "it's mine", "out": "runs"}
    (folder / "config.json").write_text(json.dumps(config))
    command = block(build(folder), "command")["text"]
    assert shlex.split(command) == ["jaxlm", "train", "runs/it's mine/config.json", "--name", "it's mine-again"]
