"""`jaxlm compress`: layer by layer from the small layers' own activations, resumed bit for bit, opened on few bits."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.killed_compressions import killed_in_layer
from support.tiny_models import published, random_weights

import jaxlm
from jaxlm.assembly import compress
from jaxlm.assembly.layer_walk import LayerWalk
from jaxlm.commands import cli
from jaxlm.core import config, tree
from jaxlm.core.compress_request import Calibration, Comparison, Settings
from jaxlm.models import MODELS
from jaxlm.nn import moe
from jaxlm.nn.layers import rms_norm
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import is_leaf
from jaxlm.weights.compress.statistics import Statistics
from jaxlm.weights.matrices import matrices

SLOW = pytest.mark.slow
SIZES = Comparison(compare="sizes")
SMALL = dict(vocab=40, layers=3, width=16, heads=2)
FAMILIES = {
    "llama": dict(kv_heads=1, head_width=8, ffn=24, window=4, windowed=(True, False)),
    "mixtral": dict(kv_heads=1, head_width=8, ffn=24, dense=1, model_type="qwen3_moe", qk_norm=True,
                    moe=moe.Moe(experts=4, top_k=2, ffn=12)),
    "bert": dict(ffn=24, positions=32),
    "t5": dict(head_width=8, ffn=24),
}  # fmt: skip


def walk_of(name: str) -> tuple[LayerWalk, dict]:
    family = MODELS[name]
    c = family.Config(**SMALL | FAMILIES[name])
    weights = jax.device_put(random_weights(family.specs(c)))
    rng = np.random.default_rng(0)
    ids = lambda: jnp.asarray(rng.integers(0, 40, (2, 12)), jnp.int32)  # noqa: E731
    segments = jnp.asarray([[1] * 12, [1] * 7 + [0] * 5], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
    batch = dict(tokens=ids(), segments=segments, positions=positions)
    if family.kind == "encoder_decoder":
        batch |= dict(source=ids(), source_segments=segments, source_positions=positions)
    return LayerWalk(family, c, weights, [batch], Layout(execution=config.Execution(dtype="float32"))), weights


def layer_of(weights: dict, stack, i: int) -> dict:
    return jax.tree.map(lambda w: w[i], tree.at(weights, stack.path))


@pytest.mark.parametrize(
    "name", ["llama", "t5", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "mixtral"))]
)
def test_a_walk_through_the_layers_gives_what_the_model_gives(one_device, name):
    walk, weights = walk_of(name)
    for stack in walk.stacks:
        walk.begin(stack)
        for i in range(stack.layers):
            walk.run(stack, i, layer_of(weights, stack, i))
        walk.end(stack)
    last = jax.tree.leaves(walk.states[0])[0]
    whole = walk.family.forward(walk.c, walk.specs, weights, walk.batches[0], shard=walk.shard).x_BTD
    if walk.family.kind != "encoder":  # the norm behind the last layer is part of `forward`
        last = rms_norm(last, tree.at(weights, "norm" if "norm" in weights else "decoder/norm"), eps=walk.c.eps)
    real = walk.batches[0]["segments"][..., None] > 0
    np.testing.assert_allclose(np.where(real, last, 0), np.where(real, whole, 0), atol=1e-4)


def test_experts_are_recorded_by_the_tokens_that_their_router_sends(one_device, monkeypatch):
    walk, weights = walk_of("mixtral")
    dense, blocks = walk.stacks
    walk.begin(dense)
    walk.run(dense, 0, layer_of(weights, dense, 0))
    walk.end(dense)
    walk.begin(blocks)
    layer = layer_of(weights, blocks, 0)
    own = matrices(walk.family, walk.c)
    recorded = {n: own[f"blocks/{n}"] for n in ("experts/gate", "experts/down", "q")}
    found = walk.observe(blocks, 0, layer, recorded, True)
    whole = moe.mixture

    def inputs(layer):
        """What the mixture of the layer reads."""
        seen: dict = {}

        def noting(c, p, x_BTD, segments_BT, **more):
            seen.update(x=x_BTD, real=segments_BT > 0)
            return whole(c, p, x_BTD, segments_BT, **more)

        monkeypatch.setattr(moe, "mixture", noting)
        walk._left(walk.rest, walk.batches[0], {}, walk.states[0], layer, stack="blocks", first=0)
        return seen

    seen = jax.jit(inputs)(layer)
    x, real = np.asarray(seen["x"], np.float64).reshape(-1, 16), np.asarray(seen["real"]).reshape(-1)
    _, chosen, _ = moe.route(walk.c.moe, jnp.asarray(x @ np.asarray(layer["router"], np.float64), jnp.float32))
    counts = found["experts/gate"].count
    assert counts.shape == (4,) and float(counts.sum()) == 2 * real.sum()
    for e in range(4):
        sent = (np.asarray(chosen) == e).any(-1) & real
        assert float(counts[e]) == sent.sum()
        if sent.any():
            mean = x[sent].T @ x[sent] / sent.sum()
            np.testing.assert_allclose(found["experts/gate"].hessian[e], mean, atol=1e-4)
            gate, up = (x[sent] @ np.asarray(layer["experts"][n][e], np.float64) for n in ("gate", "up"))
            hidden = gate / (1 + np.exp(-gate)) * up
            np.testing.assert_allclose(found["experts/down"].mean_square[e], (hidden**2).mean(0), rtol=1e-3, atol=1e-4)
    assert isinstance(found["q"], Statistics) and found["q"].hessian.shape == (16, 16)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compress")
    published(folder / "llama", layers=2)
    rng = np.random.default_rng(0)
    for name in ("text", "other"):
        lines = ["".join(map(chr, rng.integers(97, 123, 300))) for _ in range(8)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return folder


FEW = ("blocks/(q|k|v|o|gate)",)  # stay, so that less is compiled


def made(place: Path, out: str, method: str = "gptq", **more):
    c = Calibration((str(place / "text.txt"),), rows=4, length=32, batch_size=4)
    return compress.compress(place / "llama", place / out, Settings(method, **more), c, SIZES)


def test_a_compression_that_was_killed_goes_on_to_the_same_files(one_device, place, capsys):
    whole = made(place, "whole", group=32, skip=FEW)
    assert whole.folder == place / "whole" and not (place / "whole.part").exists()
    assert {entry["format"] for entry in whole.record["weights"]} == {"int4:32"}
    assert all(w["error"] <= w["plain_error"] for w in whole.record["weights"])
    with killed_in_layer(1):
        made(place, "again", group=32, skip=FEW)
    assert not (place / "again").exists() and (place / "again.part").is_dir()
    with pytest.raises(ValueError, match="holds a compression under way with another settings"):
        made(place, "again", group=64, skip=FEW)
    again = made(place, "again", group=32, skip=FEW)
    files = {m: {f.relative_to(m): f.read_bytes() for f in m.rglob("*") if f.is_file()}
             for m in (whole.folder, again.folder)}  # fmt: skip
    named = {f for f in files[whole.folder] if f.name not in ("commit_success.txt", "_CHECKPOINT_METADATA")}  # times
    for file in named - {Path("config.json")}:
        assert files[whole.folder][file] == files[again.folder][file], file
    assert files[whole.folder].keys() == files[again.folder].keys()
    assert cli.main(["compress", str(place / "llama"), str(place / "again"), "--method", "magnitude"]) == 2
    assert "again: is there already" in capsys.readouterr().err
    # It computes on the few bits, and its card says how it was made.
    p = jaxlm.open(place / "again").pretrained
    assert is_leaf(p.model.bound(p.params)["blocks"]["up"]) and p.params["blocks"]["up"]["int4"].dtype == jnp.uint8
    assert "Made of llama by gptq: matrices of the layers as int4:32" in (place / "again" / "README.md").read_text()
    before, after = (jaxlm.open(place / name).logits(["abc def"])[0] for name in ("llama", "again"))
    assert 0 < np.abs(before - after).max() < np.abs(before).max()


def test_what_cannot_be_compressed_is_refused_in_one_line_and_nothing_is_left(one_device, place, tmp_path, capsys):
    text, out = str(place / "text.txt"), tmp_path / "out"
    (tmp_path / "empty.txt").write_text("")
    with_text = ("--calibration", text, "--rows", "4", "--length", "32")
    for options, says in {
        ("--method", "gptq"): "--calibration: gptq needs text to be calibrated on",
        ("--method", "gptq", "--calibration", text, "--rows", "4000"): "text.txt holds",
        ("--method", "gptq", "--calibration", str(tmp_path / "empty.txt")): "empty.txt",
        ("--method", "wanda", "--share", "1", *with_text): "--share: 1.0 is out of range",
        ("--method", "wanda", "--group", "64", *with_text): "--group: wanda has no such setting",
        ("--method", "gptq", "--format", "nf4", *with_text): "--format: nf4 is rounded to the nearest alone",
        ("--method", "nearest", "--group", "77"): "--group: int4 has no groups of 77",
        ("--method", "magnitude", "--pattern", "5:7"): "5 of 7 doesn't fit a weight of",
        ("--method", "magnitude", "--pattern", "two"): "--pattern: 'two' is not KEPT:OF",
        ("--method", "nearest", "--skip", "blocks"): "--skip: leaves no matrix",
        ("--method", "nearest", "--budget", "1bits", *with_text): "budget:",
        ("--method", "gptq", "--data", text, *with_text): "--data: ",
        ("--method", "nearest", "--step", "3"): "--step: ",
        ("--method", "svd"): "--calibration: svd needs text to be calibrated on",
        ("--method", "svd", "--rank", "90", *with_text): "--rank: 90 makes no matrix of this model smaller; give less",
        ("--method", "svd", "--share", "0.99", *with_text): "--share: 0.99 leaves no rank of a matrix of 24 x 16",
    }.items():
        assert cli.main(["compress", str(place / "llama"), str(out), *options]) == 2, options
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("jaxlm: ") and says in line, line
        assert {p.name for p in tmp_path.iterdir()} == {"empty.txt"}, options


def test_activations_that_are_not_finite_are_refused_by_the_layer(one_device, place, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(place / "llama", broken)
    file = next(broken.glob("*.safetensors"))
    weights = load_file(file)
    weights["model.layers.1.input_layernorm.weight"][0] = np.nan
    save_file(weights, file, {"format": "pt"})
    c = Calibration((str(place / "text.txt"),), rows=4, length=32, batch_size=4)
    with pytest.raises(ValueError, match=r"inputs of blocks/\w+ of layer 1 are NaN or infinite"):
        compress.compress(broken, tmp_path / "out", Settings("wanda", skip=FEW), c, SIZES)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


@SLOW
def test_a_budget_gives_matrices_formats_of_their_own(one_device, place):
    found = made(place, "mixed", "nearest", budget="5.5bits").record["stored"]
    assert len(set(found.values())) > 1 and set(found.values()) <= {"int4:128", "int4:32", "int8"}


def test_a_compressed_model_is_compressed_no_more_and_trains_under_an_adapter_alone(one_device, place, capsys):
    small = compress.compress(place / "llama", place / "small", Settings("nearest", format="int8"), None, SIZES).folder
    with pytest.raises(ValueError, match="small: is compressed already"):
        compress.compress(small, place / "smaller", Settings("nearest"))
    args = ["train", str(small), "--data.train", str(place / "text.txt"), "--train.steps", "1", "--optim.warmup", "0"]
    assert cli.main(args) == 2
    assert "is stored as int8, which can't be trained; train an adapter on it" in capsys.readouterr().err
    assert json.loads((small / "config.json").read_text())["compression"]["weights"][0].endswith("=int8")


def test_factors_give_what_their_product_gives(one_device, place):
    small = made(place, "factors", "svd", rank=6, skip=("blocks/(o|gate|down)",))
    assert small.record["stored"] == {"blocks/q": "svd:6", "blocks/up": "svd:6"}
    assert small.record["kept"] == ["blocks/k", "blocks/v"]  # of 16 × 8, for which 6 · 24 is more
    assert all(w["error"] < w["plain_error"] < w["power"] for w in small.record["weights"])
    assert "as svd:6 (blocks/k, blocks/v as before" in (small.folder / "README.md").read_text()
    assert "blocks/q=svd:6" in json.loads((small.folder / "config.json").read_text())["compression"]["weights"]
    opened, before = jaxlm.open(small.folder), jaxlm.open(place / "llama")
    params = opened.pretrained.params
    assert params["blocks"]["q"]["a"].shape == (2, 16, 6) and params["blocks"]["up"]["b"].shape == (2, 6, 24)
    plain = dict(before.pretrained.params)
    for name in ("q", "up"):
        a, b = (np.asarray(params["blocks"][name][f]) for f in "ab")
        product = np.stack([np.tensordot(*layer, 1) for layer in zip(a, b, strict=True)])
        plain["blocks"] = plain["blocks"] | {name: jnp.asarray(product)}
    (found,) = opened.logits(["abc def"])
    whole = dataclasses.replace(before.pretrained, params=plain)
    (wanted,) = jaxlm.LanguageModel(whole).logits(["abc def"])
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@SLOW
def test_factors_are_exported_as_their_product_and_train_on(one_device, place, tmp_path):
    small = made(place, "trained", "svd", rank=6, skip=("blocks/(o|gate|down)",))
    opened = jaxlm.open(small.folder)
    params, (found,) = opened.pretrained.params, opened.logits(["abc def"])
    opened.save(tmp_path / "hf", dtype="float32")
    np.testing.assert_allclose(jaxlm.open(tmp_path / "hf").logits(["abc def"])[0], found, atol=1e-4)
    run = jaxlm.load("tiny_llama", start=str(small.folder), name="on", out=str(tmp_path), **{
        "data.train": (str(place / "text.txt"),), "train.steps": 2, "train.batch_size": 8, "train.seq_len": 32,
        "optim.warmup": 0, "train.prompts": (),
    })  # fmt: skip
    after = jaxlm.open(jaxlm.train(run).path).pretrained.params["blocks"]["q"]
    assert all((np.asarray(after[f]) != np.asarray(params["blocks"]["q"][f])).any() for f in "ab")


@SLOW
def test_zeros_stay_zeros_in_a_run_that_starts_from_a_pruned_model(one_device, place, monkeypatch):
    pruned = compress.compress(
        place / "llama", place / "pruned", Settings("magnitude", pattern="2:4"), None, SIZES
    ).folder
    zeros = {path: np.asarray(w) == 0 for path, w in tree.flatten(jaxlm.open(pruned).pretrained.params).items()}
    assert zeros["blocks/up"].mean() == 0.5
    run = jaxlm.load("tiny_llama", start=str(pruned), name="on", out=str(place / "runs"), **{
        "data.train": (str(place / "text.txt"),), "data.holdout": 0.2, "train.steps": 3, "train.batch_size": 8,
        "train.seq_len": 32, "optim.warmup": 0, "optim.ema": 0.9, "train.eval_batches": 1, "train.prompts": (),
    })  # fmt: skip
    assert run.compression.weights and all(entry.endswith("=zeros") for entry in run.compression.weights)
    trained = jaxlm.train(run).path
    after = tree.flatten(jaxlm.open(trained).pretrained.params)  # the average, where there is one
    for path, kept in zeros.items():
        if path in {entry.partition("=")[0] for entry in run.compression.weights}:
            assert ((np.asarray(after[path]) == 0) == kept).all(), path
    assert (np.asarray(after["blocks/up"]) != np.asarray(jaxlm.open(pruned).pretrained.params["blocks"]["up"])).any()
