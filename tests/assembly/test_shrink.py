"""`jaxlm shrink` and `jaxlm extract`: from a model's place to a directory that opens, starts a run and exports."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from support.sized_models import batch_of, model_of, tiny
from support.tiny_models import published

import jaxlm
from jaxlm.assembly import calibrated_program, convert, unit_scores
from jaxlm.assembly.open_model import open_model
from jaxlm.commands import cli
from jaxlm.core import spec, tree
from jaxlm.runtime import mesh
from jaxlm.weights import matrices
from jaxlm.weights.grow import depth

TEXT = ("--importance", "magnitude")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model, and text for it."""
    folder = tmp_path_factory.mktemp("models")
    published(folder / "llama", layers=2, heads=4, kv_heads=2)
    rows = [json.dumps({"text": f"a text with number {i} in it " * 3}) for i in range(60)]
    (folder / "text.jsonl").write_text("\n".join(rows))
    (folder / "empty.jsonl").write_text("")
    return folder


def test_blocks_that_add_nothing_go_again_and_the_table_says_so(one_device, folder, tmp_path, capsys):
    larger = jaxlm.grow(folder / "llama", tmp_path / "larger", blocks=2).path
    argv = ["shrink", larger, tmp_path / "back", "--layers", 2, "--calibration", folder / "text.jsonl"]
    capsys.readouterr()
    assert cli.main([*map(str, argv), "--batches", "1", "--held-out-batches", "1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kept"] == {"blocks layers": [0, 2]} and said["sizes"]["layers"] == [4, 2]
    before, after = said["figures"]["loss"]
    assert after == pytest.approx(before, abs=1e-5) and said["figures"]["window in tokens"] == [64, 64]
    np.testing.assert_array_equal(
        jaxlm.open(folder / "llama").logits(["some text"])[0], jaxlm.open(tmp_path / "back").logits(["some text"])[0]
    )
    run = jaxlm.RunDirectory(tmp_path / "back").config
    assert (run.model.layers, run.start, run.data.train) == (2, "", ())
    jaxlm.open(tmp_path / "back").save(tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Made smaller from larger: layers from 4 to 2" in card and "`text.jsonl`" in card


def complaint(capsys, *args: object) -> str:
    assert cli.main([str(a) for a in args]) == 2
    line = capsys.readouterr().err
    assert line.startswith("jaxlm: ") and line.count("\n") == 1
    return line


def test_what_can_not_shrink_is_refused_in_one_line_and_nothing_is_left(one_device, folder, tmp_path, capsys):
    out, llama, text = tmp_path / "new" / "smaller", folder / "llama", ("--calibration", folder / "text.jsonl")
    for options, says in {
        (): "sizes: give heads, kv_heads, ffn, experts, width, layers, decoder_layers (some of them) or share alone",
        ("--share", 0.5, "--ffn", 8): "not share and ffn",
        ("--share", 1): "--share: 1.0 is out of range",
        ("--heads", 6): "--heads: 6 are more than the model's 4",
        ("--heads", 3): "--heads: 3 are neither whole groups of 2 heads nor as many of each of 2 groups",
        ("--experts", 2): "--experts: this model has none",
        ("--decoder-layers", 1): "--decoder-layers: this model has none",
        ("--ffn", 24): "sizes: the model would stay as it is",
        ("--ffn", 0): "--ffn: 0 is out of range",
        ("--ffn", 8): "--calibration: ",
        ("--ffn", 8, "--calibration", folder / "none.txt"): "none.txt",
        ("--ffn", 8, "--calibration", folder / "empty.jsonl"): "empty.jsonl",
    }.items():
        assert says in complaint(capsys, "shrink", llama, out, *options), options
        assert not out.parent.exists(), options
    bert = published(tmp_path / "bert", "bert")
    line = complaint(capsys, "shrink", bert, out, "--heads", 1, *TEXT)
    assert "can't go from 8 to 16" in line and "change heads and width together" in line
    broken = published(tmp_path / "broken", layers=1)
    values = jaxlm.open(broken)
    values.params["blocks"]["up"] = values.params["blocks"]["up"].at[0, 0, 0].set(np.nan)
    with pytest.raises(ValueError, match=r"calibration: inputs of blocks/down, layer 0 are NaN or infinite"):
        jaxlm.shrink(values, out, ffn=8, calibration=(str(text[1]),), batches=1)
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", dict(heads=2, ffn=9, width=8)), ("bert", dict(ffn=9)),
     *[pytest.param(*row, marks=pytest.mark.slow) for row in (("t5", dict(heads=1, ffn=9, width=8)),
                                                              ("bert", dict(width=8, heads=1, layers=1)))]],
)  # fmt: skip
def test_transformers_computes_the_same_with_the_smaller_model(one_device, family, options, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    more = dict(heads=4, kv_heads=2) if family == "llama" else {}
    model = published(tmp_path / "model", family, layers=2, **more)
    small = jaxlm.shrink(model, tmp_path / "smaller", importance="magnitude", **options)
    jaxlm.open(small.path).save(tmp_path / "hf")
    p = open_model(small.path)
    kinds = dict(llama="AutoModelForCausalLM", bert="AutoModelForMaskedLM", t5="AutoModelForSeq2SeqLM")
    read = getattr(transformers, kinds[family]).from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    batch = {name: torch.from_numpy(np.array(x)).long() for name, x in convert.probe(p).items()}
    ids = dict(input_ids=batch["tokens"])
    if family == "t5":
        ids = dict(input_ids=batch["source"], decoder_input_ids=batch["tokens"])
    with torch.no_grad():
        theirs = read(**ids).logits.numpy()
    ours = convert.logits(p)
    assert np.abs(theirs - ours).max() <= 1e-5 * max(1, np.abs(ours).max())


def test_files_of_sentence_vectors_say_the_new_width(one_device, tmp_path):
    model = published(tmp_path / "bert", "bert")
    (model / "modules.json").write_text("[]")
    (model / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (model / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    small = jaxlm.shrink(model, tmp_path / "smaller", width=8, heads=1, importance="magnitude").path
    values = json.loads((small / "1_Pooling" / "config.json").read_text())
    assert values == pooling | {"word_embedding_dimension": 8}


@pytest.mark.slow
@pytest.mark.parametrize("importance", ["activation", "loss"])
def test_one_and_eight_devices_choose_the_same(folder, tmp_path, importance):
    made = []
    for n in (1, 8):
        with mesh.on_devices(jax.devices()[:n]):
            how = dict(heads=2, ffn=9, width=8, layers=1, batches=2, held_out_batches=1, importance=importance)
            path = tmp_path / f"on{n}"
            jaxlm.shrink(folder / "llama", path, calibration=(str(folder / "text.jsonl"),), **how)
            made.append((json.loads((path / "shrunk.json").read_text()), tree.flatten(jaxlm.open(path).params)))
    (one, a), (many, b) = made
    assert one["kept"] == many["kept"]
    np.testing.assert_allclose(one["figures"]["loss"], many["figures"]["loss"], rtol=1e-5)
    for path in a:
        np.testing.assert_allclose(a[path], b[path], atol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", ["t5", pytest.param("deepseek", marks=pytest.mark.slow)])
def test_layers_that_add_nothing_have_no_influence(one_device, name):
    model, weights = tiny(name)
    plan = depth.expansion(model.specs, 1)
    larger = model_of(model.family, depth.config(model.config, model.specs, plan))
    stacks = {path: n for side in spec.sequences(larger.specs) for path, n in side}
    found, tokens = jax.jit(lambda w: unit_scores._turned(larger, stacks, w, batch_of(larger)))(
        depth.weights(model.specs, weights, plan)
    )
    assert found.keys() == plan.keys() and {float(n) for n in tokens.values()} == {12.0}
    for path, layers in plan.items():
        assert [abs(float(x)) < 1e-5 for x in found[path]] == list(layers.new), path


def test_influence_is_the_cosine_of_the_states_around_a_layer(one_device):
    model, weights = tiny("bert")  # whose states are normed, so that a model of fewer layers gives them
    found, _ = jax.jit(lambda w: unit_scores._turned(model, {"blocks": 2}, w, batch_of(model)))(weights)
    states = []
    for n in (1, 2):
        plan = {"blocks": depth.Layers(tuple(range(n)), (False,) * n)}
        part = model_of(model.family, depth.config(model.config, model.specs, plan))
        out = jax.jit(lambda w, part=part: part.forward(w, batch_of(part)).x_BTD)
        states.append(np.asarray(out(depth.weights(model.specs, weights, plan)), np.float64))
    lengths = np.prod([np.linalg.norm(x, axis=-1) for x in states], 0)
    cosine = (states[0] * states[1]).sum(-1) / lengths
    assert float(found["blocks"][1]) == pytest.approx((1 - cosine).sum(), rel=1e-4)


def test_what_a_training_changed_becomes_an_adapter(one_device, folder, tmp_path, capsys):
    base = jaxlm.open(folder / "llama")
    rng = np.random.default_rng(0)
    blocks = dict(base.params["blocks"])
    q, down = (np.array(blocks[name]) for name in ("q", "down"))
    q += np.einsum("ldr,lrhc->ldhc", *(rng.standard_normal(s) / 4 for s in ((2, 16, 2), (2, 2, *q.shape[2:]))))
    down += np.einsum("lfr,lrd->lfd", *(rng.standard_normal(s) / 4 for s in ((2, 24, 1), (2, 1, 16))))
    base.params["blocks"] = blocks | dict(q=jax.numpy.asarray(q), down=jax.numpy.asarray(down))
    base.save(tmp_path / "tuned")
    argv = ["extract", tmp_path / "tuned", folder / "llama", tmp_path / "lora", "--rank", 2, "--json"]
    assert cli.main([*map(str, argv)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["missed"] < 1e-9 and said["adapter_off_by"] < 1e-5 < said["base_off_by"] and said["left_out"] == []
    wanted = jaxlm.open(tmp_path / "tuned").logits(["some text"])[0]
    with_it = jaxlm.open(f"{folder / 'llama'}+{tmp_path / 'lora'}")
    np.testing.assert_allclose(with_it.logits(["some text"])[0], wanted, atol=1e-4)
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 2, 2)
    out = tmp_path / "more"
    for args, says in {
        (folder / "llama", folder / "llama", out): "--targets: llama differs from the base in none of them",
        (tmp_path / "tuned", published(tmp_path / "other", layers=1), out): "give the model that it began as",
        (
            tmp_path / "tuned",
            folder / "llama",
            out,
            "--rank",
            17,
        ): "--rank: 17 is none of a matrix of 24 x 16; give 1 to 16 (blocks/down)",
    }.items():
        assert says in complaint(capsys, "extract", *args), args
        assert not out.exists()


@pytest.mark.slow
def test_on_given_text_an_adapter_is_nearest_to_what_was_trained(one_device, folder, tmp_path):
    base, text = jaxlm.open(folder / "llama"), (str(folder / "text.jsonl"),)
    change = np.random.default_rng(0).standard_normal((2, 24, 16)).astype(np.float32) / 8
    base.params["blocks"] = base.params["blocks"] | {"down": base.params["blocks"]["down"] + change}
    base.save(tmp_path / "tuned")
    opened = open_model(folder / "llama")
    down = matrices.matrices(opened.model.family, opened.model.config)["blocks/down"]
    seen, _ = unit_scores.recorded(
        calibrated_program.of(opened, text, 1), jax.device_get(opened.params), {"blocks/down": down}, hessian=True
    )
    hessian, errors = np.asarray(seen["blocks/down"].hessian, np.float64), {}
    for name, on in (("plain", ()), ("whitened", text)):
        jaxlm.extract(tmp_path / "tuned", folder / "llama", tmp_path / name, rank=4, calibration=on, batches=1)
        pair = open_model(f"{folder / 'llama'}+{tmp_path / name}").params["adapter"]["blocks"]["down"]
        off = change.astype(np.float64) - np.asarray(pair["a"], np.float64) @ np.asarray(pair["b"], np.float64)
        errors[name] = np.einsum("lio,lij,ljo->", off, hessian, off)
    whole = np.einsum("lio,lij,ljo->", change, hessian, change)
    told = json.loads((tmp_path / "whitened" / "extracted.json").read_text())
    assert told["whitened"] and told["missed"] == pytest.approx(errors["whitened"] / whole, rel=1e-2)
    assert errors["whitened"] < 0.95 * errors["plain"]
