"""A stream of two tasks with heads of their own: trained, stopped, gone on with, scored and shown."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import Data, Execution, MergeBack, Optim, Run, Stage, Stream, Train
from jaxlm.assembly import merge_back, task_index, training_run
from jaxlm.assembly import stream as streams
from jaxlm.assembly.open_model import open_model
from jaxlm.commands import cli
from jaxlm.core import tree
from jaxlm.core.continual import Continual, Ewc, Replay
from jaxlm.models import bert
from jaxlm.objectives import classify
from jaxlm.weights.merging import METHODS


def table(file, words: dict[str, str], seed: int) -> str:
    rng = np.random.default_rng(seed)
    rows = [(label, " ".join(rng.choice(several.split(), 6))) for label, several in words.items() for _ in range(24)]
    file.write_text("text,label\n" + "".join(f"{text},{label}\n" for label, text in rows))
    return str(file)


@pytest.fixture
def made(tmp_path, one_device) -> Stream:
    tasks = {
        "fruit": {"fruit": "apple pear plum", "car": "bus train tram"},
        "size": {"big": "huge vast", "tiny": "wee small"},
    }
    stages = tuple(
        Stage(name, {
            "data.train": (table(tmp_path / f"{name}.csv", words, 0),),
            "data.valid": (table(tmp_path / f"{name}-valid.csv", words, 1),),
            "objective": classify.Config(dropout=0.0),
        }) for name, words in tasks.items()
    )  # fmt: skip
    run = Run(
        "stream", out=str(tmp_path), objective=classify.Config(labels=("a", "b")),
        model=bert.Config(vocab=384, layers=1, width=16, heads=2, ffn=32, positions=32, dropout=0.0),
        data=Data(tokenizer="bytes", cache=str(tmp_path / "cache"), tokenize_workers=0), optim=Optim(lr=5e-3, warmup=1),
        train=Train(steps=6, batch_size=8, seq_len=32, eval_every=0, save_every=4, prompts=()),
        execution=Execution(dtype="float32"), continual=Continual(("replay",), replay=Replay(examples=8)),
    )  # fmt: skip
    return Stream(run, stages, references=("joint",))


def test_a_stream_is_scored_resumed_and_shown(made, monkeypatch, tmp_path, capsys):
    folder, train = made.run.folder, training_run.train

    def dies(run, *arguments):
        if run.name == "2-size":
            raise KeyboardInterrupt
        return train(run, *arguments)

    monkeypatch.setattr(training_run, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        jaxlm.train_stream(made)
    rows = json.loads((folder / "seed-0" / "scores.json").read_text())["rows"]
    assert set(rows) == {"before", "after fruit"} and set(rows["after fruit"]) == {"fruit"}

    trained = []
    monkeypatch.setattr(training_run, "train", lambda run, *a: trained.append(run.name) or train(run, *a))
    results = jaxlm.train_stream(made)
    assert trained == ["2-size", "joint"], "the first stage isn't trained again"
    matrix = np.array(results["matrices"][0], float)
    assert matrix.shape == (3, 2) and np.isnan(matrix[:2, 1]).all() and not np.isnan(matrix[2]).any()
    assert results["metrics"] == ["accuracy", "accuracy"] and results["figures"]["average"][0] == matrix[2].mean()
    cost = results["costs"]
    assert set(cost) == {"after fruit", "after size", "joint"} and results["warnings"] == []
    second = cost["after size"]
    assert (second["examples"], cost["after fruit"]["examples"]) == (8, 0) and 8 * 20 < second["tokens"] < 8 * 32
    assert second["added"] == 2 * (2 * 16 + 2) and second["added_bytes"] == 4 * second["added"], "two heads in float32"
    assert second["memory_disk_bytes"] > 8 * 32 * 4 and second["memory_device_bytes"] == 0, "rows, and no trees"
    assert second["bytes_per_device"] > 4 * second["parameters"] and second["kl_before"] > 0
    # What stands there is what `eval` says of the stage's own run, and the first task's head came along.
    own = jaxlm.evaluate(folder / "seed-0" / "2-size")
    assert own["accuracy"] == pytest.approx(matrix[2, 1])
    weights = jaxlm.open(folder / "seed-0" / "2-size").pretrained.params
    assert set(weights["tasks"]) == {"1-fruit"}

    config = tmp_path / "c.py"
    config.write_text("import conf\n\n\ndef config():\n    return conf.MADE\n")
    conf = tmp_path / "conf.py"
    conf.write_text("MADE = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    import conf as module

    module.MADE = made
    capsys.readouterr()
    assert cli.main(["continual", str(config), "--json"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["stages"] == ["fruit", "size"] and "forgetting" in out.err
    page = (folder / "report.html").read_text()
    assert f"{matrix[2, 0]:.4f}" in page and "after size" in page
    for shown in (page, out.err):
        assert "KL from before" in shown and f"{second['kl_before']:.4f}" in shown and "rows kept" in shown
    assert trained == ["2-size", "joint"]

    other = dataclasses.replace(made, run=dataclasses.replace(made.run, optim=Optim(lr=1e-3)))
    with pytest.raises(ValueError, match=r"another stream: stages\[0\]\.run\.optim\.lr is 0\.005 there and 0\.001"):
        jaxlm.train_stream(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: dataclasses.replace(s, stages=s.stages[:1]), "stages: 1 stages are no stream"),
        (lambda s: dataclasses.replace(s, stages=(s.stages[0], s.stages[0])), "'fruit' is the name of two stages"),
        (lambda s: dataclasses.replace(s, stages=(Stage("a/b"), s.stages[0])), "'a/b' is no name of a folder"),
        (lambda s: dataclasses.replace(s, stages=(Stage("a", {"optim.lrr": 1}), s.stages[0])), "optim.lrr; did you"),
        (lambda s: dataclasses.replace(s, stages=(Stage("a", {"seed": 1}), s.stages[0])), "seed is the stream's own"),
        (
            lambda s: dataclasses.replace(s, stages=(dataclasses.replace(s.stages[0], metric="bleu"), s.stages[1])),
            "stage fruit: metric: 'bleu' is no figure of its objective; it has loss, accuracy, f1_macro",
        ),
        (lambda s: dataclasses.replace(s, seeds=(1, 1)), "seeds: give at least one, and each once"),
        (lambda s: dataclasses.replace(s, seeds=(-1,)), "seeds: -1 is out of range"),
    ],
)
def test_a_stream_that_can_not_be_trained_is_one_line_and_leaves_nothing(made, change, message, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message) as raised:
        jaxlm.train_stream(change(made))
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.fixture
def merging(made) -> Stream:
    """Two tasks that are trained without any method and merged back."""
    run = dataclasses.replace(made.run, continual=Continual(), optim=Optim(lr=5e-2, warmup=1))
    return dataclasses.replace(made, run=run, references=(), merge_back=MergeBack(weight=0.25))


def test_a_stream_goes_on_from_the_merge_of_a_stage_with_the_model_before(merging, monkeypatch):
    folder, merged = merging.run.folder / "seed-0", merge_back.merged

    def dies(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_back, "merged", dies)
    with pytest.raises(KeyboardInterrupt):  # between training and merging
        jaxlm.train_stream(merging)
    monkeypatch.setattr(merge_back, "merged", merged)
    monkeypatch.setattr(training_run, "train", dies)
    results = jaxlm.train_stream(merging)
    matrix = np.array(results["matrices"][0], float)
    places = (folder / "1-fruit", folder / "2-size", folder / "merged" / "2-size")
    before, after, new = (open_model(place).params for place in places)
    assert jaxlm.evaluate(places[2])["accuracy"] == pytest.approx(matrix[2, 1])
    for path, w in tree.flatten(new).items():
        own, head = tree.at(after, path), path.startswith("classify")
        old = before[path.rpartition("/")[2]] if path.startswith("tasks/1-fruit") else tree.at(before, path)
        wanted = own if head else 0.75 * np.asarray(old, float) + 0.25 * np.asarray(own, float)
        np.testing.assert_array_equal(w, np.asarray(wanted, np.float32), err_msg=path)
    assert (np.asarray(after["blocks"]["q"]) != np.asarray(before["blocks"]["q"])).any()

    one = open_model(places[1])
    seen = merge_back._seen_by(streams._runs(merging, 0)[1], open_model(places[0]))
    density = {"dare_linear": 0.5, "dare_ties": 0.5, "breadcrumbs": 0.5}
    for method in METHODS:
        if method == "model_stock":
            continue
        how = MergeBack(method, density=density.get(method))
        none, all_of, half = (merge_back.merged(dataclasses.replace(how, weight=w), one, seen) for w in (0.0, 1.0, 0.5))
        np.testing.assert_array_equal(none["embed"], before["embed"])
        assert (np.asarray(half["embed"]) != np.asarray(before["embed"])).any()
        if method in merge_back.EXACT:
            jax.tree.map(np.testing.assert_array_equal, all_of, after)
    q = [np.asarray(t["blocks"]["q"][0], float).ravel() for t in (before, after, half)]
    stock = merge_back.merged(MergeBack("model_stock"), one, seen, jax.tree.map(jnp.zeros_like, seen))
    cosine = q[0] @ q[1] / np.linalg.norm(q[0]) / np.linalg.norm(q[1])
    wanted = 2 * cosine / (1 + cosine) * (q[0] + q[1]) / 2  # the base is zero
    np.testing.assert_allclose(np.asarray(stock["blocks"]["q"][0]).ravel(), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"models: id2label is .* in \S+2-size and .* in \S+1-fruit"):
        jaxlm.merge(places[:2], folder / "both")
    with pytest.raises(ValueError, match="holds a model without an optimizer's state"):
        monkeypatch.undo()
        jaxlm.train(jaxlm.load(places[2], **{"train.steps": 8}))


@pytest.mark.slow
def test_a_third_stage_knows_the_tasks_before_the_merge(merging, tmp_path):
    words = {"wet": "rain sea", "dry": "sand sun"}
    changes = {
        "data.train": (table(tmp_path / "wet.csv", words, 0),),
        "data.valid": (table(tmp_path / "v.csv", words, 1),),
    }
    third = Stage("wet", changes | {"objective": classify.Config(dropout=0.0)})
    methods = Continual(("ewc", "replay"), replay=Replay(examples=8), ewc=Ewc(examples=4))
    made = dataclasses.replace(
        merging, stages=(*merging.stages, third), run=dataclasses.replace(merging.run, continual=methods)
    )
    matrix = np.array(jaxlm.train_stream(made)["matrices"][0], float)
    assert not np.isnan(matrix[3]).any()
    last = made.run.folder / "seed-0" / "merged" / "3-wet"
    assert [task.name for task in task_index.read_index(last)] == ["1-fruit", "2-size"]
    assert json.loads((last / "config.json").read_text())["start"].endswith("merged/2-size")


@pytest.mark.parametrize(
    ("how", "changes", "message"),
    [
        (MergeBack("slurp"), {}, r"merge_back\.method: 'slurp' is not one of linear, slerp"),
        (MergeBack(weight=1.5), {}, r"merge_back\.weight: 1\.5 is out of range"),
        (MergeBack("linear", density=0.5), {}, r"merge_back\.density: linear has no such setting"),
        (MergeBack("dare_ties"), {}, r"merge_back\.density: dare_ties has no usual value"),
        (MergeBack("model_stock"), {}, "model_stock needs a model that both began from"),
        (MergeBack(), {"continual.methods": ("si",)}, "merge_back: si measures the path"),
        (MergeBack(), {"continual.methods": ("packnet",)}, "merge_back: packnet owns weights"),
        (MergeBack(), {"adapter": "lora"}, "merge_back: merges whole weights"),
    ],
)
def test_a_merge_that_can_not_be_made_is_one_line_before_training(merging, how, changes, message):
    run = jaxlm.load(merging.run, **changes)
    with pytest.raises(ValueError, match=message) as raised:
        jaxlm.train_stream(dataclasses.replace(merging, run=run, merge_back=how))
    assert "\n" not in str(raised.value) and not merging.run.folder.exists()
