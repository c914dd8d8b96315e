"""Models on disk are merged: whatever lies there gives what the formulas give in memory, in little memory, or one line
that says why not, with nothing left behind."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support import tiny_published
from support.tiny_models import published

import jaxlm
from jaxlm.assembly import open_model
from jaxlm.commands import cli
from jaxlm.formats import huggingface, safetensors
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.models import MODELS, bert
from jaxlm.objectives import classify
from jaxlm.weights import merging
from jaxlm.weights.merging import METHODS

ROOT = Path(__file__).parents[2]
USUAL = {"dare_linear": 0.5, "dare_ties": 0.5, "breadcrumbs": 0.5}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Makes a folder with a base, two models of its shape, a run of one of them, and models of other shapes."""
    folder = tmp_path_factory.mktemp("merge")
    for seed, name in enumerate(("base", "one", "two")):
        published(folder / name, seed=seed)
    jaxlm.import_model(folder / "one", folder / "run")
    for kind, changed in {
        "wide": {"ffn": 32}, "longer": {"positions": 128}, "words": {"vocab": 265}, "tied": {"tied": True},
        "qwen": {"model_type": "qwen3", "qk_norm": True}, "phi": {"model_type": "phi3"},
    }.items():  # fmt: skip
        published(folder / kind, **changed)
    published(folder / "encoder", "bert")
    published(folder / "bare", "bert", head=False)
    return folder


def read(folder: Path) -> dict[str, np.ndarray]:
    files = safetensors.open_files(folder)
    return {name: files.read(name) for name in files.entries}


def test_two_models_become_one_that_is_read_and_says_how_it_was_made(place, tmp_path):
    made = jaxlm.merge([place / "one", place / "two"], tmp_path / "new" / "mean", weights=(1, 3))
    one, two, mean = read(place / "one"), read(place / "two"), read(made)
    assert made == tmp_path / "new" / "mean" and one.keys() == mean.keys()
    for name in mean:
        expected = (one[name] + 3 * two[name].astype(np.float64)) / 4
        np.testing.assert_array_equal(mean[name], expected.astype(np.float32), strict=True)
    [logits] = jaxlm.open(made).logits("some text")
    assert np.isfinite(logits).all()
    for name in ("tokenizer.json", "generation_config.json", "config.json"):
        assert (made / name).read_bytes() == (place / "one" / name).read_bytes()
    card = (made / "README.md").read_text()
    assert "method linear:\n\n- one, weight 1, no licence stated\n- two, weight 3, no licence stated\n" in card
    about = json.loads((made / "merge.json").read_text())
    assert about["models"] == ["one", "two"] and about["weights"] == [1, 3]
    assert not [path for path in made.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("method", METHODS)
def test_a_model_merged_with_itself_is_the_same_file(method, place, tmp_path):
    base = place / "one" if METHODS[method].needs_base else None
    made = jaxlm.merge([place / "one"] * 2, tmp_path / "same", method=method, base=base, density=USUAL.get(method))
    assert (made / "model.safetensors").read_bytes() == (place / "one" / "model.safetensors").read_bytes()


def test_shards_dtypes_and_stretches_are_read_as_they_are(place, tmp_path, monkeypatch):
    """The base is written in shards as bfloat16, a model as float16: the result has the base's dtype."""
    family = MODELS["llama"]
    for name, dtype in {"base": "bfloat16", "one": "float16"}.items():
        p = open_model.open_model(place / name)
        huggingface.save(tmp_path / name, family, p.model.config, p.model.specs, p.params, dtype=dtype,
                         extra_files_from=place / name, max_bytes=20_000)  # fmt: skip
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    base, one, two = read(tmp_path / "base"), read(tmp_path / "one"), read(place / "two")
    monkeypatch.setattr("jaxlm.assembly.merge.HELD", 300)
    settings = dict(method="dare_ties", base=tmp_path / "base", density=0.5, seed=3)
    made = read(jaxlm.merge([tmp_path / "one", place / "two"], tmp_path / "out", **settings))
    monkeypatch.undo()
    wide = read(jaxlm.merge([tmp_path / "one", place / "two"], tmp_path / "wide", dtype="float32", **settings))
    for name, x in wide.items():
        tensors = [w[name].reshape(-1).astype(np.float32) for w in (base, one, two)]

        def whole(tensors=tensors):
            yield merging.Stretch(0, tensors[0], np.stack(tensors[1:]))

        s = merging.resolved(merging.Settings("dare_ties", density=0.5, seed=3), 2, True)
        [expected] = merging.merge(s, merging.Tensor(name, x.size, whole))
        np.testing.assert_allclose(x.reshape(-1), expected, rtol=0, atol=1e-6)
        assert made[name].dtype == base[name].dtype == "bfloat16"
        np.testing.assert_array_equal(made[name], x.astype(base[name].dtype))


def test_a_run_gives_what_its_published_files_give(place, tmp_path):
    a = jaxlm.merge([place / "run", place / "two"], tmp_path / "a")
    b = jaxlm.merge([place / "one", place / "two"], tmp_path / "b")
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert (a / "tokenizer.json").read_bytes() == (b / "tokenizer.json").read_bytes()
    jaxlm.import_model(place / "phi", tmp_path / "phi")  # its files keep several weights in one tensor
    same = jaxlm.merge([tmp_path / "phi"] * 2, tmp_path / "same")
    assert (same / "model.safetensors").read_bytes() == (place / "phi" / "model.safetensors").read_bytes()


def test_a_runs_averaged_weights_are_read_one_by_one(place, tmp_path):
    """Those that were frozen have no average: they are read from the weights."""
    shutil.copytree(place / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["optim"] |= {"ema": 0.5, "freeze": ["embed"]}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    weights = open_model.open_model(place / "run").params
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        averaged = {name: jax.tree.map(lambda w: w + 1, w) for name, w in weights.items() if name != "embed"}
        checkpoints.save(3, {"params": weights, "ema": averaged}, {"step": 3}, wait=True)
    made = read(jaxlm.merge([tmp_path / "run"] * 2, tmp_path / "out"))
    for name, x in read(place / "one").items():
        np.testing.assert_allclose(made[name], x + ("embed" not in name), rtol=0, atol=1e-6)
    opened = open_model.open_model(tmp_path / "run").params
    np.testing.assert_array_equal(opened["head"], weights["head"] + 1)
    np.testing.assert_array_equal(opened["embed"], weights["embed"])


def test_what_may_differ_is_said(place, tmp_path, capsys):
    (tmp_path / "chat").mkdir()
    shutil.copytree(place / "longer", tmp_path / "chat" / "model")
    (tmp_path / "chat" / "model" / "chat_template.jinja").write_text("{{ messages }}")
    models = [str(place / "one"), str(tmp_path / "chat" / "model")]
    assert cli.main(["merge", *models, "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    assert f"note: positions is 128 in {models[1]} and 64 in {models[0]}, which is kept" in printed.err
    assert f"note: {models[0]} has no chat template, so there is none" in printed.err
    assert re.search(r"out +linear +[\d,]+ bytes in [\d.]+ s", printed.err)
    told = json.loads(printed.out)
    assert told["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert [row["place"] for row in told["models"]] == models and told["models"][0]["part"] == "weight 1"


def test_the_card_states_the_licence_that_all_models_have(place, tmp_path):
    for name, licence in {"one": "mit", "two": "mit", "base": "apache-2.0"}.items():
        shutil.copytree(place / name, tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    same = jaxlm.merge([tmp_path / "one", tmp_path / "two"], tmp_path / "same")
    assert "\nlicense: mit\n" in (same / "README.md").read_text()
    both = jaxlm.merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both", method="ties", base=tmp_path / "base")
    card = (both / "README.md").read_text()
    assert "\nlicense:" not in card and "- base, base, licence apache-2.0\n- one, weight 1, licence mit\n" in card
    assert str(tmp_path) not in card + (both / "merge.json").read_text()


def test_the_heads_of_labelled_tasks_are_merged_too(tmp_path):
    c = bert.Config(vocab=tiny_published.VOCAB, layers=1, width=16, heads=2, ffn=24, positions=32, head=False)
    settings = {name: classify.Config(labels=labels, bias=True) for name, labels in
                {"one": ("bad", "good"), "other": ("no", "yes")}.items()}  # fmt: skip
    for name, own in settings.items():
        tiny_published.directory(tmp_path / name, c, own)
    bare = tiny_published.directory(tmp_path / "bare", c)
    changed(tmp_path / "one", tmp_path / "three", "classifier.weight", 9.0)
    jaxlm.import_model(tmp_path / "one", tmp_path / "run")
    made = jaxlm.merge([tmp_path / "run", tmp_path / "three"], tmp_path / "out")
    one, three, mean = read(tmp_path / "one"), read(tmp_path / "three"), read(made)
    assert mean.keys() == one.keys() and mean["classifier.weight"][-1, -1] == (one["classifier.weight"][-1, -1] + 9) / 2
    np.testing.assert_array_equal(mean["classifier.bias"], three["classifier.bias"])
    assert json.loads((made / "config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}
    for other, message in {tmp_path / "other": "id2label is .*'yes'.* in", bare: "architectures is"}.items():
        with pytest.raises(ValueError, match=rf"models: {message}.*; only models of one shape and meaning"):
            jaxlm.merge([tmp_path / "one", other], tmp_path / "new")


FAULTS = {
    "other sizes": (["one", "wide"], {}, r"models: ffn is 32 in \S+wide and 24 in \S+one; only models of one shape"),
    "other vocabularies": (["one", "words"], {}, r"models: vocab is 265 in \S+words .*resize_token_embeddings"),
    "no head of its own": (["one", "tied"], {}, r"models: tied is True in \S+tied and False in"),
    "another architecture": (["one", "encoder"], {}, r"models: \S+encoder and \S+one are of different architectures, "
                             "bert and llama"),
    "another kind of the family": (["one", "qwen"], {}, r"models: qk_norm is True in \S+qwen"),
    "a head alone": (["encoder", "bare"], {}, r"models: head is False in \S+bare and True in"),
    "no such model": (["one", "none"], {}, r"none: no such model"),
    "something there": (["one", "two"], {"out": "base"}, r"base: is there already"),
    "no base": (["one", "two"], {"method": "ties"}, r"base: ties merges what models changed"),
    "three on an arc": (["one", "two", "base"], {"method": "slerp"}, r"models: slerp merges 2, and here are 3"),
    "weights of others": (["one", "two"], {"weights": (1.0,)}, r"weights: 1 for 2 models"),
    "too dense": (["one", "two"], {"method": "ties", "density": 1.5}, r"density: 1\.5 is out of range"),
    "no number": (["one", "two"], {"weights": (1.0, float("nan"))}, r"weights: nan is out of range"),
    "no method": (["one", "two"], {"method": "lerp"}, r"method: 'lerp' is not "),
    "no dtype": (["one", "two"], {"dtype": "int8"}, r"dtype: 'int8' is not written; choose one of float32, bf"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_and_leaves_nothing(fault, place):
    models, settings, message = FAULTS[fault]
    before = sorted(place.rglob("*"))
    settings = {"out": "new/out"} | settings
    with pytest.raises(ValueError, match=message) as caught:
        jaxlm.merge([place / name for name in models], place / settings.pop("out"), **settings)
    assert "\n" not in str(caught.value) and sorted(place.rglob("*")) == before


def changed(source: Path, target: Path, name: str, value: float) -> Path:
    """Copies a model and changes the last number of a tensor."""
    shutil.copytree(source, target)
    room = safetensors.place(safetensors.open_files(target), name)
    room.reshape(-1)[-1] = value
    return target


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_told(value, place, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    bad = changed(place / "two", tmp_path / "bad", name, value)
    with pytest.raises(ValueError, match=rf"bad/model\.safetensors: {re.escape(name)} holds NaN or infinity"):
        jaxlm.merge([place / "one", bad], tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
    huge = changed(place / "two", tmp_path / "huge", name, 1e6)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: holds numbers beyond the range of float16; give bfloat"):
        jaxlm.merge([place / "one", huge], tmp_path / "new" / "out", dtype="float16")
    assert not (tmp_path / "new").exists()


def test_other_tokenizers_are_refused_unless_they_are_known_to_mean_the_same(place, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(place / "two", other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"<pad>"', '"<none>"'))
    with pytest.raises(
        ValueError, match=r"tokenizers of \S+other and \S+one differ: token \d+ is '<none>' and '<pad>'"
    ):
        jaxlm.merge([place / "one", other], tmp_path / "out")
    assert jaxlm.merge([place / "one", other], tmp_path / "out", any_tokenizer=True).is_dir()
    (other / "tokenizer.json").write_text(f" {text}")  # spelt otherwise, and the same
    assert jaxlm.merge([place / "one", other], tmp_path / "again").is_dir()


def test_an_adapter_and_a_gguf_file_are_told_what_to_do_first(place, tmp_path):
    config = json.loads((place / "run" / "config.json").read_text())
    shutil.copytree(place / "run", tmp_path / "lora")
    config["adapter"] = {"method": "lora"}
    (tmp_path / "lora" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lora: has an adapter; .* jaxlm export \S+lora MERGED"):
        jaxlm.merge([tmp_path / "lora", place / "one"], tmp_path / "out")
    (tmp_path / "lora" / "config.json").write_text(
        json.dumps({**config, "adapter": {"family": "none"}, "continual": {"methods": ["packnet"]}})
    )
    with pytest.raises(ValueError, match=r"lora: its tasks own weights \(packnet\)"):
        jaxlm.merge([tmp_path / "lora", place / "one"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"one\.gguf: GGUF files aren't merged; .* jaxlm import \S+one\.gguf RUN"):
        jaxlm.merge([tmp_path / "one.gguf", place / "one"], tmp_path / "out")
    shutil.copytree(place / "run", tmp_path / "new", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(ValueError, match="new: no checkpoint yet"):
        jaxlm.merge([tmp_path / "new", place / "one"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place_of_interrupt", ["run", "one"])
def test_an_interrupt_leaves_nothing(place_of_interrupt, place, tmp_path, monkeypatch, capsys):
    merge, began = merging.merge, []

    def interrupted(s, tensor):
        began.append(tensor.name)
        if len(began) == 5:
            raise KeyboardInterrupt
        return merge(s, tensor)

    monkeypatch.setattr(merging, "merge", interrupted)
    argv = ["merge", str(place / place_of_interrupt), str(place / "two"), "--out", str(tmp_path / "new" / "out")]
    assert cli.main(argv) == 1 and len(began) == 5
    assert "interrupted" in capsys.readouterr().err and not (tmp_path / "new").exists()


CHILD = """
import sys
from pathlib import Path
from jaxlm.assembly.merge import merge
from jaxlm.weights.merging import Settings


def peak():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


folder, method, density, *models = sys.argv[1:]
settings = Settings(method, density=float(density) if density else None)
base = None if method in ("linear", "slerp") else f"{folder}/big0"
merge([f"{folder}/small"] * 2, f"{folder}/warm-{method}", settings, base and f"{folder}/small")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
before = peak()
merge([f"{folder}/{name}" for name in models], f"{folder}/out-{method}", settings, base)
print(peak() - before)
"""


NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="tells peaks of memory by /proc")


def growth(folder: Path, method: str, models: list[str]) -> int:
    """Returns how many bytes a process of its own grows by while it merges."""
    command = [sys.executable, "-c", CHILD, str(folder), method, str(USUAL.get(method, "")), *models]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / f"out-{method}")
    return int(done.stdout.splitlines()[-1])


def big_models(folder: Path, rows: int, count: int) -> int:
    """Writes models with a table of 256 numbers in each of `rows` rows; returns the bytes of the table."""
    published(folder / "big0", vocab=rows, width=256, tied=True)
    published(folder / "small")
    for i in range(1, count):
        shutil.copytree(folder / "big0", folder / f"big{i}")
        room = safetensors.place(safetensors.open_files(folder / f"big{i}"), "model.embed_tokens.weight")
        room += np.random.default_rng(i).random(room.shape, np.float32)
    return rows * 256 * 4


@NEEDS_PROC
def test_memory_stays_below_two_tensors_of_many_models(tmp_path):
    largest = big_models(tmp_path, 1 << 14, 5)
    used = growth(tmp_path, "ties", [f"big{i}" for i in range(1, 5)])
    assert largest * 0.9 < used < 2 * largest, (used, largest)


@NEEDS_PROC
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_memory_stays_below_two_large_tensors_whatever_the_method(method, tmp_path):
    count = METHODS[method].most or 3
    largest = big_models(tmp_path, 1 << 17, count + 1)  # 128 MiB
    used = growth(tmp_path, method, [f"big{i}" for i in range(1, count + 1)])
    assert largest * 0.9 < used < 1.5 * largest, (used, largest)
