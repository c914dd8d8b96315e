"""What is written in few bits is read back as the same numbers, and its tensors are those of the published layouts."""

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import compression, config, tree
from jaxlm.formats import huggingface, safetensors
from jaxlm.models import MODELS, llama
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import dense, is_leaf
from jaxlm.nn.moe import Moe
from jaxlm.weights import stored
from jaxlm.weights.matrices import matrices

C = llama.Config(vocab=32, layers=2, width=64, ffn=128, heads=4, kv_heads=2, head_width=16, positions=32)
SOME = ("blocks/k", "blocks/o", "blocks/down")


@functools.cache
def leaves(c, *formats: str, paths=SOME):
    """Weights of a model whose matrices have random codes and scales of these formats in turn."""
    family, rng = MODELS.of(c), np.random.default_rng(0)
    out = tree.map_named(lambda _, s: jnp.asarray(rng.standard_normal(s.shape), "float32"), family.specs(c))
    for i, path in enumerate(paths):
        m, how = matrices(family, c)[path], compression.stored(formats[i % len(formats)])
        made = {}
        for name, s in stored.specs(m, how).items():
            low, high = {("scale", "uint8"): (118, 128), ("zero", "uint8"): (0, 16)}.get((name, str(s.dtype)), (0, 256))
            if s.dtype in ("uint8", "int8"):
                made[name] = jnp.asarray(rng.integers(low, high, s.shape, np.uint8).astype(s.dtype))
            else:
                made[name] = jnp.asarray((rng.random(s.shape, np.float32) * 0.1 + 0.01).astype(s.dtype))
        out = tree.put(out, path, stored.bound(m, how, made))
    return out


def saved(folder, c, weights, layout):
    family = MODELS.of(c)
    huggingface.save(folder, family, c, family.specs(c), weights, dtype="float32", layout=layout, card=False)
    assert huggingface.describe(folder, MODELS)[0] is family
    specs = family.specs(c)
    shardings = Layout(execution=config.Execution()).shardings(specs, None)
    return tree.flatten(huggingface.load(folder, family, c, specs, shardings))


EXACT = {
    "compressed-tensors": ("int4:32", "int4:32:zero", "int4:64", "int8", "fp8", "fp8:128", "mxfp4:32"),
    "gptq": ("int4:32", "int4:32:zero", "int4:64"),
    "awq": ("int4:32", "int4:32:zero", "int4:64"),
}


@pytest.mark.parametrize(("layout", "format"), [(layout, f) for layout, each in EXACT.items() for f in each])
def test_comes_back_as_the_same_numbers(layout, format, tmp_path):
    weights = leaves(C, format)
    got = saved(tmp_path / "out", C, weights, layout)
    for path, w in tree.flatten(weights).items():
        assert is_leaf(w) == (path in SOME)
        np.testing.assert_array_equal(got[path], dense(w), err_msg=path)


def written(folder, c, weights, layout):
    """Writes a model; returns its tensors as they are in the file, and quantization_config."""
    saved(folder, c, weights, layout)
    files = safetensors.open_files(folder)
    values = json.loads((folder / "config.json").read_text())
    return {name: files.read(name) for name in files.entries}, values["quantization_config"]


def nibble(words: np.ndarray, i: int) -> np.ndarray:
    return (words.view(np.uint32) >> np.uint32(4 * i)).astype(np.int64) & 15


def test_gptq_tensors_are_those_of_the_published_formula(tmp_path):
    """w[o, i] = scales[g, o] · (q[i, o] − (z[g, o] + 1)), g = g_idx[i], with eight codes a word along the inputs."""
    weights = leaves(C, "int4:32")
    tensors, q = written(tmp_path / "out", C, weights, "gptq")
    due = dense(tree.at(weights, "blocks/o"))[1].reshape(64, 64).T
    m = "model.layers.1.self_attn.o_proj."
    packed, zeros, scales, g_idx = (tensors[m + n] for n in ("qweight", "qzeros", "scales", "g_idx"))
    for i in range(0, 64, 5):
        for o in range(0, 64, 3):
            z = nibble(zeros[g_idx[i], o // 8], o % 8) + 1
            w = np.float32(scales[g_idx[i], o]) * (nibble(packed[i // 8, o], i % 8) - z)
            assert np.float32(w) == due[o, i]
    assert {k: q[k] for k in ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format")} == dict(
        quant_method="gptq", bits=4, group_size=32, sym=True, desc_act=False, checkpoint_format="gptq")  # fmt: skip
    assert r"-:^model\.layers\.0\.mlp\.up_proj$" in q["dynamic"] and len(q["dynamic"]) == 8


def test_awq_tensors_are_those_of_the_published_formula(tmp_path):
    """w[o, i] = scales[g, o] · (q[i, o] − z[g, o]), with eight outputs a word, in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    weights = leaves(C, "int4:32:zero")
    tensors, q = written(tmp_path / "out", C, weights, "awq")
    due = dense(tree.at(weights, "blocks/down"))[0].T
    packed, zeros, scales = (tensors[f"model.layers.0.mlp.down_proj.{n}"] for n in ("qweight", "qzeros", "scales"))
    at = [0, 4, 1, 5, 2, 6, 3, 7]
    for i in range(0, 128, 7):
        for o in range(0, 64, 3):
            z = nibble(zeros[i // 32, o // 8], at[o % 8])
            w = np.float32(scales[i // 32, o]) * (nibble(packed[i, o // 8], at[o % 8]) - z)
            assert np.float32(w) == due[o, i]
    assert q == dict(quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemm",
                     modules_to_not_convert=q["modules_to_not_convert"])  # fmt: skip
    assert "lm_head" in q["modules_to_not_convert"] and "model.layers.0.mlp.up_proj" in q["modules_to_not_convert"]


def test_matrices_of_several_forms_are_groups_of_their_own(tmp_path):
    weights = leaves(C, "int4:32", "int8", "fp8", "int4:32", paths=("blocks/q", "blocks/k", "blocks/o", "blocks/down"))
    _, q = written(tmp_path / "out", C, weights, "compressed-tensors")
    groups = q["config_groups"].values()
    assert [(g["weights"]["num_bits"], g["weights"]["type"], g["format"]) for g in groups] == [
        (8, "int", "pack-quantized"), (8, "float", "naive-quantized"), (4, "int", "pack-quantized")]  # fmt: skip
    eight, floats, last = (g["targets"] for g in groups)
    assert eight == ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"]
    assert len(floats) == 2 and last == ["Linear"]
    assert q["format"] == "mixed-precision" and {"lm_head", "model.layers.1.self_attn.v_proj"} < {*q["ignore"]}


def test_inputs_that_are_rounded_too_are_named_as_those_of_tokens(tmp_path):
    weights = leaves(C, "int8:dynamic", "fp8:dynamic", "int8:dynamic")
    tensors, q = written(tmp_path / "out", C, weights, "compressed-tensors")
    groups = {g["format"]: g["input_activations"] for g in q["config_groups"].values()}
    assert {name: (a["num_bits"], a["type"], a["strategy"], a["dynamic"]) for name, a in groups.items()} == {
        "int-quantized": (8, "int", "token", True), "float-quantized": (8, "float", "token", True)}  # fmt: skip
    codes, scale = (tensors[f"model.layers.1.mlp.down_proj.{n}"] for n in ("weight", "weight_scale"))
    assert codes.dtype == np.int8 and scale.shape == (64, 1)
    np.testing.assert_array_equal(codes * scale, dense(tree.at(weights, "blocks/down"))[1].T)


def test_gptq_names_modules_of_other_bits_and_plain_ones(tmp_path):
    weights = leaves(C, "int4:32", "int8")
    _, q = written_roughly(tmp_path / "out", C, weights)
    assert q["bits"] == 4 and q["group_size"] == 32
    assert q["dynamic"][r"+:^model\.layers\.1\.self_attn\.o_proj$"] == dict(bits=8, group_size=-1)
    assert q["dynamic"][r"-:^model\.layers\.0\.mlp\.up_proj$"] == {}


def written_roughly(folder, c, weights):
    """Writes as GPTQ, whose scales are float16: int8's lose digits."""
    got = saved(folder, c, weights, "gptq")
    for path, w in tree.flatten(weights).items():
        np.testing.assert_allclose(got[path], dense(w), rtol=1e-3, atol=1e-7, err_msg=path)
    return got, json.loads((folder / "config.json").read_text())["quantization_config"]


def test_weights_that_files_fuse_are_laid_out_together(tmp_path):
    c = dataclasses.replace(C, model_type="phi3")
    three = ("blocks/q", "blocks/k", "blocks/v")
    weights = leaves(c, "int4:32:zero", paths=three)
    got = saved(tmp_path / "out", c, weights, "compressed-tensors")
    for path, w in tree.flatten(weights).items():
        np.testing.assert_array_equal(got[path], dense(w), err_msg=path)
    with pytest.raises(
        ValueError, match=r"blocks/q: files of this model keep in one tensor weights that are stored in"
    ):
        saved(tmp_path / "other", c, leaves(c, "int4:32", "int8", paths=three), "compressed-tensors")


def test_experts_and_a_conv1d_come_back(tmp_path):
    c = MODELS["mixtral"].Config(vocab=32, layers=1, width=64, heads=4, kv_heads=2, head_width=16, positions=32,
                                 moe=Moe(experts=2, top_k=1, ffn=32))  # fmt: skip
    how = ("blocks/q", "blocks/experts/gate", "blocks/experts/down")
    weights = leaves(c, "int4:32", paths=how)
    got = saved(tmp_path / "mixtral", c, weights, "compressed-tensors")
    for path in how:
        np.testing.assert_array_equal(got[path], dense(tree.at(weights, path)), err_msg=path)
    c = MODELS["gpt2"].Config(vocab=32, layers=1, width=32, heads=2, positions=32)
    weights = leaves(c, "int4:32", paths=("blocks/up", "blocks/o"))
    got = saved(tmp_path / "gpt2", c, weights, "gptq")
    for path in ("blocks/up", "blocks/o"):
        np.testing.assert_array_equal(got[path], dense(tree.at(weights, path)), err_msg=path)
    with pytest.raises(
        ValueError, match=r"is a Conv1D, and compressed-tensors quantizes linear layers; export as gptq"
    ):
        saved(tmp_path / "conv", c, weights, "compressed-tensors")


REFUSED = {
    "kind": ("gptq", C, "fp8", r"_proj\.weight: is fp8, and GPTQ has int4 and int8; export as compressed-tensors"),
    "nf4": ("compressed-tensors", C, "nf4:64", r"blocks/\w+: is stored as nf4, for which .*_proj\.weight has no place"),
    "scaled": ("awq", C, "int4:32:scaled", r"blocks/\w+: multiplies its inputs by a vector first"),
    "awq_int8": ("awq", C, "int8", r"is int8, and AWQ's files hold int4; export as compressed-tensors"),
    "groups": ("awq", C, "int4:128", r"groups have all inputs and 128, which its files can't say"),
    "zeros": ("gptq", C, ("int4:32", "int4:32:zero"), r"some matrices have zero points and some don't"),
    "words": ("gptq", dataclasses.replace(C, ffn=36), "int4:32", r"has 64 outputs and 36 inputs, and GPTQ needs"),
    "uneven": ("compressed-tensors", dataclasses.replace(C, ffn=36), "int4:32", r"has 36 inputs, no multiple of the g"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_layout_can_not_hold_is_refused(name, tmp_path):
    layout, c, formats, says = REFUSED[name]
    with pytest.raises(ValueError, match=says) as error:
        saved(tmp_path / "out", c, leaves(c, *([formats] if isinstance(formats, str) else formats)), layout)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
