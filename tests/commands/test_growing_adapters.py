"""Runs whose adapter grows: each adds directions of its own to those of the run that it starts from."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from support.tiny_models import published

import jaxlm
from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.assembly import stream as streams
from jaxlm.assembly.run_source import growing_from
from jaxlm.core import config, tree
from jaxlm.core.continual import Continual
from jaxlm.core.stream import Stage, Stream
from jaxlm.models import llama
from jaxlm.objectives import causal
from jaxlm.weights.adapters import Lora, OrthogonalLora


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("growing")
    for name, words in (("one", "the {}th line of a text"), ("two", "{} other words"), ("three", "and {} more")):
        (folder / f"{name}.txt").write_text("\n".join(words.format(i) for i in range(300)))
    published(folder / "llama")
    return folder


def first_run(home) -> config.Run:
    data = Data(train=(str(home / "one.txt"),), valid=(str(home / "one.txt"),), tokenizer="bytes",
                cache=str(home / "cache"), tokenize_workers=0)  # fmt: skip
    return Run(
        "task", llama.Config(), causal.Config(), data=data, optim=Optim(lr=1e-2, warmup=1),
        execution=Execution("float32"), out=str(home / "runs"), adapter=OrthogonalLora(rank=2, base="nf4"),
        train=Train(steps=3, batch_size=8, seq_len=32, eval_every=3, save_every=1, log_every=1, prompts=()),
    )  # fmt: skip


@pytest.mark.usefixtures("one_device")
def test_each_run_adds_directions_to_those_of_the_run_before(home, tmp_path, capsys):
    """Over NF4: stopped in its middle and gone on with, and written for PEFT as one LoRA of all ranks."""
    first = jaxlm.train(jaxlm.load(first_run(home), start=str(home / "llama")))
    assert first.config.adapter.previous == 0
    changes = {"data.train": (str(home / "two.txt"),), "adapter.alpha": 8.0}
    run = jaxlm.load(first.path, **changes)
    assert (run.name, run.adapter.previous, run.adapter.base) == ("task-2", 2, "nf4")

    def stop(step: int, metrics: dict) -> None:
        if step == 2:
            raise Stopped

    with pytest.raises(Stopped):
        jaxlm.train(run, on_step=stop)
    assert "may forget" not in capsys.readouterr().out, "its adapter keeps the old"
    second = jaxlm.train(jaxlm.load(first.path, **changes))
    assert second.path == run.folder and second.finished
    whole = jaxlm.train(jaxlm.load(first.path, name="whole", **changes))
    figures = [[line["loss"] for line in one.log if line["kind"] in ("train", "valid")] for one in (second, whole)]
    assert figures[0] == figures[1]
    before, after, other = (jax.device_get(one.open().pretrained.params["adapter"]) for one in (first, second, whole))
    jax.tree.map(np.testing.assert_array_equal, after, other)
    start = next(line["loss"] for line in second.log if line["kind"] == "valid")
    assert start == pytest.approx(first.validation["loss"], rel=1e-5), "it begins as the model before"
    for path, target in tree.flatten(before, is_leaf=lambda x: "a" in x).items():
        grown = tree.at(after, path)
        np.testing.assert_array_equal(grown["previous_a"], target["a"])
        np.testing.assert_allclose(grown["previous_b"], target["b"] * 2, rtol=1e-6)  # its scale is half as large now
        assert np.abs(grown["b"]).max() > 0
    assert any(line.get("adapter_penalty", 0) > 0 for line in second.log if line["kind"] == "train")

    assert jaxlm.load(second.path, **{"data.train": (str(home / "three.txt"),)}).adapter.previous == 4
    assert jaxlm.load(first_run(home), start=str(second.path)).adapter.previous == 4
    second.open().save(tmp_path / "peft", format="peft")
    told = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (told["r"], told["base_model_name_or_path"]) == (4, str(home / "llama"))
    halves = safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {4 in x.shape for x in halves.values()} == {True}
    with pytest.raises(ValueError, match=r"continual\.methods: ewc holds the weights .* orthogonal_lora"):
        jaxlm.train(jaxlm.load(first.path, **changes, **{"continual.methods": ("ewc",)}))
    first.path.rename(tmp_path / "gone")
    assert jaxlm.load(second.path).adapter.previous == 2, "a run directory goes on without what it started from"


def test_stages_of_a_stream_grow_one_after_another(home):
    run = first_run(home)
    stages = tuple(Stage(name, {"adapter.rank": rank}) for name, rank in (("one", 2), ("two", 3), ("three", 4)))
    made = streams._runs(Stream(run, stages), 0)
    assert [one.adapter.previous for one in made] == [0, 2, 5]
    plain = growing_from(made[2], Lora(rank=7))
    assert plain.adapter.previous == 7 and growing_from(made[2], config.Adapter()).adapter.previous == 0
    assert made[2].continual == Continual(heads=True)
