"""Quantized checkpoints of every layout become the very weights that their published formulas give, on any mesh."""

import copy
import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.quantized_rows import E2M1, ROWS

from jaxlm.core import config, tree
from jaxlm.formats import huggingface
from jaxlm.models import MODELS, gpt_oss, llama
from jaxlm.nn.layout import Layout
from jaxlm.nn.moe import Moe
from jaxlm.runtime.mesh import make_mesh

C = llama.Config(vocab=32, layers=1, width=64, ffn=128, heads=4, kv_heads=2, head_width=16, positions=32)


def linear(name: str) -> bool:
    return name.endswith("_proj.weight")


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "model"
    specs, rng = llama.specs(C), np.random.default_rng(0)
    weights = tree.map_named(lambda _, s: jax.numpy.asarray(rng.standard_normal(s.shape), "float32"), specs)
    huggingface.save(folder, llama, C, specs, weights, dtype="float32", card=False)
    return folder


@functools.cache
def made_by(row, outs, ins):
    return ROWS[row].make(np.random.default_rng(outs + ins), outs, ins)


def write(plain, folder, row, change=lambda tensors, config: None):
    """Writes the plain model with its matrices as a row makes them; returns the dense tensors."""
    tensors = load_file(plain / "model.safetensors")
    dense = dict(tensors)
    for name in sorted(filter(linear, tensors)):
        made, dense[name] = made_by(row, *tensors.pop(name).shape)
        tensors |= {f"{name.removesuffix('.weight')}.{last}": x for last, x in made.items()}
    values = json.loads((plain / "config.json").read_text()) | dict(quantization_config=copy.deepcopy(ROWS[row].config))
    change(tensors, values)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    return dense


def load(folder, mesh=None, layout=None):
    family, c = huggingface.describe(folder, MODELS)
    specs = family.specs(c)
    layout = layout or Layout(execution=config.Execution())
    return huggingface.load(folder, family, c, specs, layout.shardings(specs, mesh))


@pytest.mark.parametrize("name", ROWS)
def test_the_numbers_are_those_of_the_formula(name, plain, tmp_path):
    dense = write(plain, tmp_path / "few", name)
    (tmp_path / "dense").mkdir()
    save_file(dense, tmp_path / "dense" / "model.safetensors")
    (tmp_path / "dense" / "config.json").write_text((plain / "config.json").read_text())
    got, due = tree.flatten(load(tmp_path / "few")), tree.flatten(load(tmp_path / "dense"))
    for path, w in due.items():
        np.testing.assert_allclose(got[path], w, rtol=3e-7, atol=1e-9, err_msg=path)


@pytest.mark.parametrize("name", ROWS)
def test_a_part_of_a_matrix_is_that_part(name, plain, tmp_path):
    """Whatever the view of it: heads apart, one of several interleaved weights, columns amid a word."""
    write(plain, tmp_path / "few", name)
    files = huggingface.open_tensors(tmp_path / "few")
    whole = files.read(MATRIX)
    for index, shape in (
        ([slice(5, 39), slice(9, 30)], (64, 64)),
        ([slice(1, 3), slice(7, 9), slice(0, 64)], (4, 16, 64)),
        ([slice(0, 16), slice(1, 2), slice(2, 4), slice(3, 5)], (16, 4, 4, 16)),
    ):
        got = files.read(MATRIX, index, shape)
        np.testing.assert_array_equal(got, whole.reshape(shape)[tuple(index)])
    np.testing.assert_array_equal(files.read(MATRIX, [slice(70, 900)], (4096,)), whole.reshape(-1)[70:900])
    turned = files.turn([MATRIX])
    assert turned.entries[MATRIX].shape == (64, 64)
    np.testing.assert_array_equal(turned.read(MATRIX, [slice(3, 9), slice(0, 64)]), whole.T[3:9])


def test_devices_get_their_parts(plain, tmp_path):
    write(plain, tmp_path / "few", "gptq_act_order")
    sizes = config.Mesh(fsdp=4, tensor=2)
    mesh, layout = make_mesh(sizes), Layout.of(sizes, config.Execution())
    here, there = tree.flatten(load(tmp_path / "few")), tree.flatten(load(tmp_path / "few", mesh, layout))
    for path, w in here.items():
        np.testing.assert_array_equal(there[path], w, err_msg=path)
    assert not there["blocks/q"].is_fully_replicated


MATRIX = "model.layers.0.self_attn.q_proj.weight"
MODULE = MATRIX.removesuffix(".weight")


def drop(last):
    return lambda tensors, values: tensors.pop(f"{MODULE}.{last}")


def put(last, change):
    def change_one(tensors, values):
        tensors[f"{MODULE}.{last}"] = change(tensors.get(f"{MODULE}.{last}"))

    return change_one


def say(**settings):
    return lambda tensors, values: values["quantization_config"].update(settings)


def plain_again(tensors, values):
    for name in [n for n in tensors if "_proj." in n]:
        tensors.pop(name)


REFUSED = {
    "method": ("gptq", say(quant_method="hqq"), r"'hqq' weights are not read, only awq, .*; bring the unquantised"),
    "bits": ("gptq", say(bits=5), r"bits is 5; GPTQ is read with 2, 3, 4, 8"),
    "bits_text": ("gptq", say(bits="four"), r"quantization_config: bits is 'four'; it must be a whole number"),
    "other_bits": ("gptq", say(bits=8), r"down_proj\.scales is float16 \[4, 64\], but floats \[2, 64\] are due"),
    "layout": ("gptq", say(checkpoint_format="marlin"), r"layout 'marlin' is not read, only gptq and gptq_v2"),
    "rotation": ("gptq", say(rotation="hadamard"), r"rotation 'hadamard' changes the model itself"),
    "group": ("gptq", say(group_size=16), r"down_proj\.scales is float16 \[4, 64\], but floats \[8, 64\] are due"),
    "pattern": ("gptq", say(dynamic={"+:(": {"bits": 8}}), r"'\(' is no regular expression"),
    "no_scales": ("gptq", drop("scales"), r"q_proj has no scales beside its qweight; fetch the files again"),
    "no_zeros": ("awq", drop("qzeros"), r"q_proj has no qzeros beside its qweight and scales; fetch"),
    "order": ("gptq_act_order", put("g_idx", lambda x: x + 9), r"q_proj\.g_idx names a group beyond the 2 there are"),
    "twice": ("awq", put("weight", lambda x: np.ones((64, 64), "f")), r"holds .*q_proj\.weight beside .*qweight"),
    "extra": ("awq", put("act.scales", lambda x: np.ones(64, np.float32)), r"1 tensor is not this model's .*scales"),
    "bias": ("gptq", put("bias", lambda x: np.ones(64, np.float16)), r"1 tensor is not this model's .*q_proj\.bias"),
    "awq_layout": ("awq", say(version="marlin"), r"AWQ's layout 'marlin' is not read, only gemm, gemv, gemv_fast"),
    "awq_bits": ("awq", say(bits=3), r"bits is 3; AWQ is read with 4"),
    "awq_group": ("awq", say(group_size=48), r"down_proj\.qweight has 128 inputs, not a multiple of the group_size 48"),
    "fp8_alone": ("fp8_static", drop("weight_scale"), r"q_proj\.weight is float8_e4m3fn without a scale"),
    "fp8_blocks": ("fp8_blocks", say(weight_block_size=[32, 32]), r"where one for each block of 32 × 32 are due"),
    "fp8_size": ("fp8_blocks", say(weight_block_size=[0, 32]), r"weight_block_size is \[0, 32\]; it must be two whole"),
    "packed_bits": ("packed", say(config_groups={"g": {"targets": ["Linear"], "weights": {"num_bits": 8}}}),
                    r"weight_packed has 16 words for 128 inputs, which don't hold 8 bits each"),
    "packed_shape": ("packed", put("weight_shape", lambda x: x * [2, 1]), r"weight_shape is \[128, 64\], but"),
    "packed_no_shape": ("packed", drop("weight_shape"), r"q_proj has no weight_shape beside its weight_packed"),
    "format": ("packed", say(format="marlin-24"), r"the format 'marlin-24' of compressed-tensors is not read"),
    "sparse": ("packed", say(sparsity_config={"format": "sparse-24-bitmask"}), r"sparsity_config \(sparse-24-bitm"),
    "transform": ("packed", say(transform_config={"config_groups": {"u": {}}}), r"transform_config .* is not read"),
    "targets": ("packed", say(config_groups={"g": {"targets": "Linear"}}), r"targets is 'Linear'; it must be a list"),
    "frozen": ("int8_channel", put("weight", lambda x: x.astype(np.float32)), r"is still to be rounded"),
    "modelopt": ("modelopt_fp8", say(quant_algo="W4A8_AWQ"), r"quant_algo 'W4A8_AWQ' of modelopt is not read"),
    "state": ("nf4", put("weight.quant_state.bitsandbytes__nf4", lambda x: x[:9]), r"bitsandbytes__nf4 can't be read"),
    "absmax": ("nf4", put("weight.absmax", lambda x: x[:9]), r"weight\.absmax is float32 \[9\], but floats \[64\]"),
    "plain": ("gptq", plain_again, r"config\.json says gptq in quantization_config, but no tensor is stored so"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(name, plain, tmp_path):
    row, change, says = REFUSED[name]
    write(plain, tmp_path / "few", row, change)
    with pytest.raises(ValueError, match=says) as error:
        load(tmp_path / "few")
    assert "\n" not in str(error.value)


def test_scales_of_inputs_and_caches_and_biases_of_zeros_are_left_out(plain, tmp_path):
    def more(tensors, values):
        tensors[f"{MODULE}.bias"] = np.zeros(64, np.float16)
        tensors["model.layers.0.self_attn.k_scale"] = np.ones((), np.float32)

    write(plain, tmp_path / "few", "gptq", more)
    load(tmp_path / "few")
    assert huggingface.left_out(tmp_path / "few", C) == [
        f"{tmp_path / 'few'}: gptq weights are read as the float32 numbers that they stand for; inputs and caches stay "
        "unrounded"
    ]


def test_experts_in_mxfp4_are_those_of_gpt_oss(tmp_path):
    """Its files have blocks of 32 inputs, the first of two codes in the low half, and keep [experts, in, out]."""
    c = gpt_oss.Config(vocab=32, layers=1, width=64, heads=2, kv_heads=1, head_width=16, moe=Moe(2, 1, 32))
    specs, rng = gpt_oss.specs(c), np.random.default_rng(0)
    weights = tree.map_named(lambda _, s: jax.numpy.asarray(rng.standard_normal(s.shape), "float32"), specs)
    huggingface.save(tmp_path / "dense", gpt_oss, c, specs, weights, dtype="float32", card=False)
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    few = dict(tensors)
    for last in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{last}"
        E, ins, outs = few.pop(name).shape
        codes = rng.integers(0, 16, (E, outs, ins))
        exponents = rng.integers(120, 130, (E, outs, ins // 32)).astype(np.uint8)
        packed = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8).reshape(E, outs, ins // 32, 16)
        few |= {f"{name}_blocks": packed, f"{name}_scales": exponents}
        dense = E2M1[codes] * np.repeat(2.0 ** (exponents.astype(np.float32) - 127), 32, -1)
        tensors[name] = np.ascontiguousarray(dense.swapaxes(1, 2)).astype(np.float32)
    save_file(tensors, tmp_path / "dense" / "model.safetensors")
    values = json.loads((tmp_path / "dense" / "config.json").read_text())
    values["quantization_config"] = dict(quant_method="mxfp4", modules_to_not_convert=["lm_head"])
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "config.json").write_text(json.dumps(values))
    save_file(few, tmp_path / "few" / "model.safetensors")
    got, due = tree.flatten(load(tmp_path / "few")), tree.flatten(load(tmp_path / "dense"))
    for path, w in due.items():
        np.testing.assert_array_equal(got[path], w, err_msg=path)
    save_file({n: x for n, x in few.items() if "down_proj_scales" not in n}, tmp_path / "few" / "model.safetensors")
    with pytest.raises(ValueError, match=r"down_proj_blocks has no .*down_proj_scales beside it; fetch"):
        load(tmp_path / "few")


@pytest.mark.parametrize(("row", "file"), [("gptq", "quantize_config.json"), ("awq", "quant_config.json")])
def test_settings_of_early_files_stand_beside_config_json(row, file, plain, tmp_path):
    def moved(tensors, values):
        early = dict(w_bit=4, q_group_size=32, version="GEMM", zero_point=True)
        values.pop("quantization_config")
        said.append(early if row == "awq" else dict(bits=4, group_size=32, desc_act=False))

    said: list[dict] = []
    dense = write(plain, tmp_path / "few", row, moved)
    (tmp_path / "few" / file).write_text(json.dumps(said[0]))
    got = huggingface.open_tensors(tmp_path / "few").read(MATRIX)
    np.testing.assert_allclose(got, dense[MATRIX], rtol=3e-7, atol=1e-9)
