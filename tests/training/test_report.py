"""The report is made from logs alone, needs nothing from outside, and shows other people's text as text."""

import json
import re
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


def text(page):
    """What a reader sees, tags away."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.read_text().split("</style></head>")[1]))


def test_the_summary_comes_first_and_tells_best_and_final(page):
    seen = text(page)
    for words in (
        "tiny &amp; small llama · causal · 8 × cpu Best bits per byte 0.7500 step 30 Final bits per byte 1.7500",
        "Best validation loss 1.0000 step 30 Final validation loss 2.0000",
        "Steps 40 Tokens 4 K",
        "Time 39.0 s",  # 24 s in the first sitting, 15 s in the second
        "MFU, causal attention 25.0%",
        "Parameters 1.23 M Trainable parameters 4.1 K",
        "gzip 2.500 xz 2.125 this model 0.750",
    ):
        assert words in seen
    assert "MFU, full" not in seen  # unknown is left out, not shown as 0


def test_the_chart_of_compressors_has_bits_per_byte_alone(page):
    bars = page.read_text().partition("<table class=bars>")[2].partition("</table>")[0]
    assert re.findall(r"<th>(\w+(?: \w+)?)</th>", bars) == ["gzip", "xz", "this model"] and "516157" not in bars


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


def test_samples_stand_side_by_side_first_and_last_as_text(page):
    page = page.read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    pair = page[page.index("<div class=pair>") :]
    assert pair.index("step 0") < pair.index("step 40") and "cat &amp; dog" in pair and "middle" not in pair


def test_the_page_asks_nothing_of_the_network(page):
    page = page.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)""", page)
    assert "@import" not in page and "url(http" not in page
    assert "default-src 'none'" in page
    assert page.count("<svg") == 6 and "var(--line)" in page


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
    assert page.read_text().count("<svg") == 4
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
    assert "Before and after" not in page.read_text()

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
    assert "f1&lt;b&gt; 0.5 0.4 … 0.6 0.7 0.6 … 0.8 +0.2 NaN … +0.3 0.0040 9 examples" in seen
    config = CONFIG | {"start": "models/<x>", "train": CONFIG["train"] | {"use": "best"}}
    (folder / "config.json").write_text(json.dumps(config))
    seen = text(build(folder))
    assert "models/&lt;x&gt; and step 30" in seen and "which flatters it" in seen and "+0.25" in seen
