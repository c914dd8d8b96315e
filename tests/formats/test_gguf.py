"""GGUF files: what is written comes back, stands as llama.cpp expects it, and damaged or foreign files are refused."""

import dataclasses
import json
import os
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.public_weights import smollm2

from jaxlm.assembly import convert
from jaxlm.core import config, tree
from jaxlm.core.spec import count, init, is_spec
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data import train_tokenizer
from jaxlm.formats import gguf as ours
from jaxlm.formats import gguf_file_types, gguf_rope, gguf_tokenizer, gguf_write
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import logits
from jaxlm.nn.moe import Moe
from jaxlm.nn.rope import Rope
from jaxlm.runtime.mesh import make_mesh

gguf = pytest.importorskip("gguf")

BASE = dict(vocab=48, layers=3, width=64, heads=4, kv_heads=2, head_width=32, ffn=96, positions=128)
LLAMA, GEMMA, MIXTRAL = (MODELS[name].Config for name in ("llama", "gemma", "mixtral"))
ROWS: dict[str, tuple[str, Any]] = {
    "llama": ("llama", LLAMA(**BASE)),
    "tied": ("llama", LLAMA(**BASE, tied=True)),
    "biases": ("llama", LLAMA(**BASE, qkv_bias=True, o_bias=True, mlp_bias=True)),
    "llama 3.1": ("llama", LLAMA(**BASE, rope=Rope(5e5, scaling="llama3", factor=8.0, trained=64))),
    "linear": ("llama", LLAMA(**BASE, rope=Rope(scaling="linear", factor=4.0))),
    "yarn": ("llama", LLAMA(**BASE, rope=Rope(scaling="yarn", factor=4.0, trained=64))),
    "smollm3": ("llama", LLAMA(**BASE | dict(layers=5), model_type="smollm3", rotated=(True, True, True, False))),
    "qwen2": ("llama", LLAMA(**BASE | dict(head_width=16), model_type="qwen2", qkv_bias=True)),
    "qwen3": ("llama", LLAMA(**BASE, model_type="qwen3", qk_norm=True)),
    "mixtral": ("mixtral", MIXTRAL(**BASE, moe=Moe(experts=4, top_k=2, ffn=96))),
    "qwen3moe": (
        "mixtral",
        MIXTRAL(**BASE, moe=Moe(experts=4, top_k=2, ffn=32), model_type="qwen3_moe", qk_norm=True),
    ),
    "olmo2": ("olmo", MODELS["olmo"].Config(**BASE | dict(head_width=16))),
    "gemma": ("gemma", GEMMA(**BASE, model_type="gemma", score_width=32)),
    "gemma2": (
        "gemma",
        GEMMA(**BASE, model_type="gemma2", window=16, score_width=32, softcap_scores=50.0, softcap_logits=30.0),
    ),
    "gemma3": (
        "gemma",
        GEMMA(
            **BASE | dict(layers=7),
            window=16,
            windowed=(True,) * 5 + (False,),
            score_width=32,
            rope=Rope(1e6, scaling="linear", factor=8.0),
        ),
    ),
    "gpt2": ("gpt2", MODELS["gpt2"].Config(vocab=48, layers=2, width=64, heads=4, ffn=256, positions=128, dropout=0.0)),
}


def draw(name: str) -> tuple[Any, Any, Any, Any]:
    """(family, Config, specs, weights that float16 holds exactly)."""
    family, c = MODELS[ROWS[name][0]], ROWS[name][1]
    specs, rng = family.specs(c), np.random.default_rng(0)

    def one(path: str, spec: Any) -> jax.Array:
        return jnp.asarray((rng.integers(-1024, 1024, spec.shape) / 1024).astype(np.float32))

    return family, c, specs, tree.map_named(one, specs)


def here(specs: Any) -> Any:
    home = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda s: home, specs, is_leaf=is_spec)


def reload(path: Path) -> tuple[Any, Any, Any]:
    files = ours.open_file(path)
    family, c = ours.describe(files, MODELS)
    specs = family.specs(c)
    return family, c, ours.load(files, family, c, specs, here(specs))


def save(path: Path, *model: Any, **options: Any) -> Path:
    gguf_write.save(path, *model, **options)
    return path


def same(a: Any, b: Any) -> None:
    flat = tree.flatten(b)
    assert tree.flatten(a).keys() == flat.keys()
    for path, w in tree.flatten(a).items():
        np.testing.assert_array_equal(w, flat[path], err_msg=path)


# ----------------------------------------------------------------------------------------------------- out and in again


@pytest.mark.parametrize("name", ROWS)
def test_what_is_written_comes_back(name: str, tmp_path: Path) -> None:
    family, c, specs, weights = draw(name)
    path = save(tmp_path / "x.gguf", family, c, specs, weights)
    found, told, back = reload(path)
    assert found is family and told == c
    same(weights, back)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "mixtral"])
def test_a_part_is_read_as_the_whole_would_be(name: str, tmp_path: Path) -> None:
    family, c, specs, weights = draw(name)
    files = ours.open_file(save(tmp_path / "x.gguf", family, c, specs, weights, file_type="q8_0"))
    for tensor, entry in files.entries.items():
        whole, rows = files.read(tensor), entry.shape[0]
        assert whole.dtype == entry.dtype and whole.shape == entry.shape
        shape = (rows // 8, 8, *entry.shape[1:]) if rows % 8 == 0 else entry.shape
        for part in (slice(1, 3), slice(shape[0] - 1, shape[0])):
            index = [part, *(slice(n // 2, n) for n in shape[1:])]
            np.testing.assert_array_equal(files.read(tensor, index, shape), whole.reshape(shape)[tuple(index)])


def test_shards_get_their_share(tmp_path: Path) -> None:
    family, c, specs, weights = draw("llama")
    files = ours.open_file(save(tmp_path / "x.gguf", family, c, specs, weights))
    mesh = make_mesh(config.Mesh(fsdp=2, tensor=2, data=2))
    layout = Layout()
    homes = jax.tree.map(
        lambda s: jax.sharding.NamedSharding(mesh, layout.spec(s.axes, layout.store)), specs, is_leaf=is_spec
    )
    back = ours.load(files, family, c, specs, homes, dtype=jnp.bfloat16)
    assert back["blocks"]["q"].sharding.shard_shape(back["blocks"]["q"].shape) == (3, 32, 2, 32)
    same(jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights), back)


def test_q8_0_is_off_by_at_most_half_a_step(tmp_path: Path) -> None:
    family, c, specs, weights = draw("llama")
    _, _, back = reload(save(tmp_path / "x.gguf", family, c, specs, weights, file_type="q8_0"))
    np.testing.assert_array_equal(back["norm"], weights["norm"])
    w, v = (np.asarray(x["embed"]).reshape(-1, 32) for x in (weights, back))
    step = abs(w).max(1, keepdims=True) / 127
    assert (abs(w - v) <= step * 0.5 + abs(w) * 1e-3).all()  # the step itself is a float16
    assert (w != v).any()


# ------------------------------------------------------------------------------------------------- as llama.cpp has it


def test_tensors_stand_as_llama_cpp_expects_them(tmp_path: Path) -> None:
    family, c, specs, weights = draw("llama")
    reader = gguf.GGUFReader(save(tmp_path / "x.gguf", family, c, specs, weights))
    tensors = {t.name: t for t in reader.tensors}
    assert {t.tensor_type.name for n, t in tensors.items() if "norm" in n} == {"F32"}
    assert {t.tensor_type.name for n, t in tensors.items() if "norm" not in n} == {"F16"}
    assert list(tensors["blk.2.ffn_down.weight"].shape) == [96, 64]  # innermost first
    q = np.asarray(weights["blocks"]["q"])[1]  # D H C; rotation pairs i with i + C/2 here, 2i with 2i + 1 there
    found = tensors["blk.1.attn_q.weight"].data.reshape(4, 32, 64)
    for i in range(16):
        np.testing.assert_array_equal(found[:, 2 * i], q[:, :, i].T)
        np.testing.assert_array_equal(found[:, 2 * i + 1], q[:, :, i + 16].T)
    fields = {n: f.contents() for n, f in reader.fields.items()}
    assert fields["general.architecture"] == "llama" and fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    told = {n.removeprefix("llama."): v for n, v in fields.items() if n.startswith("llama.")}
    assert told["attention.head_count"] == 4 and told["attention.head_count_kv"] == 2
    assert told["rope.dimension_count"] == told["attention.key_length"] == 32 and told["vocab_size"] == 48


def test_gemma_keeps_its_norms_plus_one_and_gpt2_its_matrices_turned(tmp_path: Path) -> None:
    family, c, specs, weights = draw("gemma")
    found = {t.name: t.data for t in gguf.GGUFReader(save(tmp_path / "a", family, c, specs, weights)).tensors}
    np.testing.assert_array_equal(found["output_norm.weight"], weights["norm"] + 1)
    np.testing.assert_array_equal(found["blk.0.ffn_norm.weight"], weights["blocks"]["norm2"][0] + 1)
    family, c, specs, weights = draw("gpt2")
    found = {t.name: t.data for t in gguf.GGUFReader(save(tmp_path / "b", family, c, specs, weights)).tensors}
    np.testing.assert_array_equal(found["blk.1.ffn_up.weight"], weights["blocks"]["up"][1].T)


def test_divisors_of_llama_3_are_recognised() -> None:
    """Files hold the divisors, not what they were computed from: Llama 3.1 8B, Llama 3.2 1B, and an odd one."""
    for width, factor, low, high, trained in (
        (128, 8.0, 1.0, 4.0, 8192),
        (64, 32.0, 1.0, 4.0, 8192),
        (128, 4.0, 1.0, 6.0, 1000),
    ):
        told = Rope(5e5, scaling="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high, trained=trained)
        p = dict(factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=trained)
        divisors = gguf_rope.divisors(gguf_rope.plain(5e5, width), p).astype(np.float32)
        fields = {"llama.rope.freq_base": 5e5}
        found = gguf_rope.read(fields, "llama", divisors)
        assert found["original_max_position_embeddings"] / found["high_freq_factor"] == pytest.approx(
            trained / high, 1e-2
        )
        assert found["original_max_position_embeddings"] / found["low_freq_factor"] == pytest.approx(
            trained / low, 1e-2
        )
        assert found["factor"] == told.factor
    with pytest.raises(ValueError, match="another form"):
        gguf_rope.read(fields, "llama", np.linspace(1, 3, 64).astype(np.float32))


# ------------------------------------------------------------------------------------------------------- quantizations


def by_hand(path: Path, kind: str, more: dict[str, Any] | None = None, drop: str = "") -> dict[str, np.ndarray]:
    """A small Llama written with the library alone → what its tensors dequantize to."""
    rng, kinds = np.random.default_rng(1), gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "llama")
    counts = dict(block_count=1, context_length=64, embedding_length=256, feed_forward_length=256)
    for key, value in counts.items() | {"attention.head_count": 4, "attention.head_count_kv": 2}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in (more or {}).items():
        writer.add_key_value(key, *value)
    shapes = {"token_embd": (32, 256), "output_norm": (256,), "blk.0.attn_norm": (256,), "blk.0.ffn_norm": (256,)}
    shapes |= {f"blk.0.attn_{n}": (256 if n in ("q", "output") else 128, 256) for n in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{n}": (256, 256) for n in ("gate", "up", "down")}
    out = {}
    for name, shape in shapes.items():
        if name == drop:
            continue
        as_kind = kinds.F32 if len(shape) == 1 else kinds[kind]
        plain = rng.standard_normal(shape).astype(np.float32)
        try:
            data = gguf.quants.quantize(plain, as_kind)
        except NotImplementedError:  # numbers are as good as any: only reading is ours
            data = rng.integers(0, 60, gguf.quant_shape_to_byte_shape(shape, as_kind), np.uint8)
        writer.add_tensor(name + ".weight", data, raw_dtype=as_kind)
        out[name] = gguf.quants.dequantize(data, as_kind).reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


KINDS = [
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "TQ1_0", "MXFP4"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_quantizations_are_undone(kind: str, tmp_path: Path) -> None:
    due = by_hand(tmp_path / "x.gguf", kind)
    _, c, weights = reload(tmp_path / "x.gguf")
    assert (c.heads, c.kv_heads, c.head_width, c.tied, c.eps) == (4, 2, 64, True, 1e-5)
    np.testing.assert_array_equal(weights["embed"], due["token_embd"])
    np.testing.assert_array_equal(weights["blocks"]["down"][0], due["blk.0.ffn_down"].T)
    k = due["blk.0.attn_k"].reshape(2, 32, 2, 256).swapaxes(1, 2).reshape(2, 64, 256)
    np.testing.assert_array_equal(weights["blocks"]["k"][0], k.transpose(2, 0, 1))


# ----------------------------------------------------------------------------------------------------------- tokenizers

TEXTS = [
    "The capital of France is",
    "x = 12345 + 6.7\n\n\tdef f():  return 'é😀漢字'",
    "We'LL go; it's 3.14159",
    " a  b   ",
    "",
]


def bpe(pre: str) -> tuple[dict[str, Any], tokenizers.HuggingFace]:
    """Fields of a byte-level vocabulary, and its tokenizer made with the library's own means."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    first: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    if pre in ("qwen2", "llama-bpe", "dbrx"):  # as in their published tokenizer.json
        digits = r"\p{N}" if pre == "qwen2" else r"\p{N}{1,3}"
        words = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
            r"\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        first = [pre_tokenizers.Split(Regex(words), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*first, letters])
    made.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator([Path(__file__).read_text(), *TEXTS * 3], trainer)
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    source = json.loads(made.to_str())
    pieces = {**source["model"]["vocab"], **{t["content"]: t["id"] for t in source["added_tokens"]}}
    tokens = sorted(pieces, key=pieces.__getitem__)
    kinds = [3 if t in ("<s>", "</s>") else 4 if t == "<tool>" else 1 for t in tokens]
    merges = [m if isinstance(m, str) else " ".join(m) for m in source["model"]["merges"]]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges}
    fields |= {"bos_token_id": 0, "eos_token_id": 1, "add_bos_token": False}
    named = {f"tokenizer.ggml.{k}": v for k, v in fields.items()}
    return named, tokenizers.HuggingFace(made.to_str(), {"bos": "<s>", "eos": "</s>"})


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2"])
def test_byte_level_tokenizers_cut_as_published_ones(pre: str) -> None:
    fields, published = bpe(pre)
    read = gguf_tokenizer.read(fields)
    for text in TEXTS:
        assert read.encode(text) == published.encode(text), text
        assert read.decode(read.encode(text)) == text
    assert (read.bos_id, read.eos_id, read.vocab_size) == (0, 1, published.vocab_size)
    assert read.encode("</s>") != [1] and len(read.encode("<tool>")) == 1
    written = gguf_tokenizer.write(published, published.vocab_size, False)
    assert {f"tokenizer.ggml.{k}": v for k, v in written.items()} == fields


def test_digits_are_cut_one_by_one_in_smollm_and_by_three_in_llama() -> None:
    digits = {pre: gguf_tokenizer.read(bpe(pre)[0]).encode("111111") for pre in ("gpt-2", "smollm")}
    assert len(set(digits["smollm"])) == 1 and len(digits["smollm"]) == 6
    assert gguf_tokenizer.WORDS["llama-bpe"][0].count(r"\p{N}{1,3}") == 1


def test_every_token_that_ends_an_answer_is_told() -> None:
    fields, tokenizer = bpe("gpt-2")
    names = fields["tokenizer.ggml.tokens"]
    eos = fields.get("tokenizer.ggml.eos_token_id", tokenizer.eos_id)
    others = [i for i in range(len(names)) if i != eos][5:8]
    written = gguf_tokenizer.write(tokenizer, len(names), False, (eos, *others[:2]))
    assert (written["eot_token_id"], written["eom_token_id"]) == tuple(others[:2])
    again = {f"tokenizer.ggml.{key}": value for key, value in written.items()}
    assert gguf_tokenizer.end_ids(again) == tuple(others[:2])
    with pytest.raises(ValueError, match="all end an answer, and a file names 2 besides eos"):
        gguf_tokenizer.write(tokenizer, len(names), False, others)
    known = {**again, "tokenizer.ggml.tokens": [*names, "<|eot_id|>", "<|im_end|>"]}
    known["tokenizer.ggml.token_type"] = [*again["tokenizer.ggml.token_type"], gguf_tokenizer.CONTROL, 1]
    del known["tokenizer.ggml.eot_token_id"], known["tokenizer.ggml.eom_token_id"]
    assert gguf_tokenizer.end_ids(known) == (len(names),), "by its name, if it is no word"
    with pytest.raises(ValueError, match="eot_token_id is 99999"):
        gguf_tokenizer.end_ids(known | {"tokenizer.ggml.eot_token_id": 99999})


def test_of_two_tokenizers_the_one_that_is_used_is_written(tmp_path: Path) -> None:
    """A tokenizer.model of the same size is believed only where it reads hard texts as the tokenizer.json does."""
    _, tokenizer = bpe("gpt-2")
    other = train_tokenizer.train_sentencepiece(["some words of text 12"] * 9, tmp_path / "x.model", vocab_size=300)
    assert gguf_tokenizer.different_text(tokenizer, other) is not None
    assert gguf_tokenizer.different_text(other, other) is None
    source = SimpleNamespace(format="hf", path=tmp_path, tokens=tokenizer)
    (tmp_path / "tokenizer.model").write_bytes(other.model)
    object.__setattr__(tokenizer, "vocab_size", other.vocab_size)
    assert convert._vocabulary(source) is tokenizer
    source.tokens = other
    assert convert._vocabulary(source).fingerprint == other.fingerprint


def test_what_added_tokens_do_to_spaces_is_not_lost_in_silence() -> None:
    _, tokenizer = bpe("gpt-2")
    values = json.loads(tokenizer.json)
    assert gguf_tokenizer.lost_settings(tokenizer) == []
    flags = dict(single_word=False, lstrip=False, rstrip=True, normalized=False, special=True)
    values["added_tokens"].append(dict(id=tokenizer.vocab_size, content="<|end|>", **flags))
    assert gguf_tokenizer.lost_settings(tokenizers.HuggingFace(json.dumps(values))) == ["<|end|> (rstrip)"]
    values["normalizer"] = {"type": "NFC"}
    values["added_tokens"][-1] |= dict(single_word=True, rstrip=False, normalized=True)
    told = gguf_tokenizer.lost_settings(tokenizers.HuggingFace(json.dumps(values)))
    assert told == ["<|end|> (single_word, normalized)"]


def test_sentencepiece_comes_back_as_it_was(tmp_path: Path) -> None:
    text = [Path(__file__).read_text()]
    made = train_tokenizer.train_sentencepiece(text, tmp_path / "t.model", vocab_size=400)
    written = gguf_tokenizer.write(made, 402, True)
    assert written["model"] == "llama" and written["tokens"][400:] == ["[PAD400]", "[PAD401]"]
    fields = {f"tokenizer.ggml.{k}": v for k, v in written.items()}
    read = gguf_tokenizer.read(fields)
    assert gguf_tokenizer.adds_bos(fields)
    for sample in (*TEXTS, *text):
        assert read.encode(sample) == made.encode(sample)
        assert read.decode(read.encode(sample)) == made.decode(made.encode(sample))
    assert all(getattr(read, f"{k}_id") == getattr(made, f"{k}_id") for k in ("bos", "eos", "pad", "unk"))


def test_text_travels_with_the_weights(tmp_path: Path) -> None:
    family, c, _, _ = draw("tied")
    _, made = bpe("smollm")
    c = LLAMA(**BASE | dict(vocab=made.vocab_size + 5, layers=1), tied=True)
    specs = family.specs(c)
    weights = init(specs, jax.random.key(0))
    text = ours.Text(made, True, "{{ messages[0]['content'] }}")
    files = ours.open_file(save(tmp_path / "x.gguf", family, c, specs, weights, text=text, name="small"))
    back = ours.text(files)
    assert back.add_bos and back.chat_template == text.chat_template and files.fields["general.name"] == "small"
    assert all(back.tokenizer.encode(t) == made.encode(t) for t in TEXTS)
    assert back.tokenizer.vocab_size == c.vocab


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pre": "smolm"}, "tokenizer.ggml.pre is 'smolm'; did you mean 'smollm'; known are gpt-2, "),
        ({"pre": "deepseek-v3"}, "tokenizer.ggml.pre is 'deepseek-v3'; known are gpt-2, "),
        ({"model": "rwkv"}, "tokenizer.ggml.model is 'rwkv', not one of gpt2"),
        ({"tokens": []}, "tokens is missing or empty"),
        ({"token_type": [1]}, "token_type has 1 entries for"),
        ({"eos_token_id": 10**6}, "eos_token_id is 1000000, but there are"),
        ({"merges": ["a"]}, "merges has an entry"),
        ({"model": "llama"}, "scores is missing"),
    ],
)
def test_faults_of_tokenizers_are_named(change: dict[str, Any], says: str) -> None:
    fields, _ = bpe("smollm")
    with pytest.raises(ValueError, match=says):
        gguf_tokenizer.read(fields | {f"tokenizer.ggml.{k}": v for k, v in change.items()})


# ------------------------------------------------------------------------------------------------------------- refusals


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    said = str(error.value)
    assert "\n" not in said and len(said) < 600
    return said


def test_truncated_files_are_refused_wherever_they_end(tmp_path: Path) -> None:
    by_hand(tmp_path / "x.gguf", "Q4_0")
    whole = (tmp_path / "x.gguf").read_bytes()
    for cut in (0, 3, 6, 20, 30, 100, 300, 700, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cut\.gguf: ") as error:
            ours.open_file(tmp_path / "cut.gguf")
        one_line(error)


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    by_hand(tmp_path / "x.gguf", "Q4_0")
    whole = (tmp_path / "x.gguf").read_bytes()
    kind = whole.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16
    cases = {
        "magic": (b"GGML" + whole[4:], "magic"),
        "version": (whole[:4] + struct.pack("<I", 77) + whole[8:], "77"),
        "other order": (whole[:4] + whole[4:8][::-1] + whole[8:], "x.gguf|byte"),
        "endless": (whole[:16] + struct.pack("<Q", 1 << 60) + whole[24:], "endless"),
        "unknown type": (
            whole[:kind] + struct.pack("<I", 250) + whole[kind + 4 :],
            "blk.0.ffn_up.weight is stored as type 250",
        ),
        "no float": (whole[:kind] + struct.pack("<I", 24) + whole[kind + 4 :], "blk.0.ffn_up.weight is stored as I8"),
    }
    for name, (data, says) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=says) as error:
            ours.open_file(tmp_path / name)
        assert name in one_line(error)
    with pytest.raises(ValueError, match=r"absent\.gguf: no such file"):
        ours.open_file(tmp_path / "absent.gguf")


def test_what_is_not_known_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    kinds = gguf.GGUFValueType
    faults: list[tuple[dict[str, Any], str, str]] = [
        ({"general.architecture": ("lama", kinds.STRING)}, "", "is 'lama'; did you mean 'llama'; known are llama, "),
        *(
            (
                {"general.architecture": (other, kinds.STRING)},
                "",
                f"general.architecture is '{other}'; known are llama, ",
            )
            for other in ("qwen2moe", "llama4", "gemma3n", "gemma4", "olmo", "qwen3vlmoe")
        ),
        ({"llama.expert_count": (8, kinds.UINT32)}, "", "llama.expert_used_count is missing"),
        ({"llama.rope.scaling.type": ("longrope", kinds.STRING)}, "", "rope.scaling.type 'longrope'"),
        ({"llama.rope.dimension_count": (32, kinds.UINT32)}, "", "differ in width"),
        ({"split.count": (3, kinds.UINT16)}, "", "merge them first"),
        ({"llama.vocab_size": (32, kinds.UINT32)}, "blk.0.ffn_up", "model.layers.0.mlp.up_proj.weight is missing"),
        (
            {"llama.feed_forward_length": (128, kinds.UINT32)},
            "",
            r"\[256, 256\], but the metadata make it \[128, 256\]",
        ),
    ]
    for i, (more, drop, says) in enumerate(faults):
        by_hand(tmp_path / f"{i}.gguf", "F16", more, drop)
        with pytest.raises(ValueError, match=says) as error:
            reload(tmp_path / f"{i}.gguf")
        assert f"{i}.gguf" in one_line(error)


@pytest.mark.parametrize(
    ("c", "kind", "says"),
    [
        (LLAMA(**BASE, model_type="mistral", window=16), "f16", "sliding_window 16 can't be told"),
        (LLAMA(**BASE, rope=Rope(scaling="dynamic", factor=2.0)), "f16", "rope_type 'dynamic' has no form"),
        (LLAMA(**BASE, rope=Rope(share=0.5)), "f16", "rope.share: 0.5 is not in files"),
        (LLAMA(**BASE, model_type="qwen2", qkv_bias=True), "f16", "heads × head_dim = hidden_size"),
        (LLAMA(**BASE), "q4_kk", "quantize: unknown 'q4_kk'; did you mean 'q4_k_s'"),
        (GEMMA(**BASE, model_type="gemma2", window=16, score_width=7, softcap_scores=50.0), "f16", "query_pre_attn"),
        (GEMMA(**BASE, model_type="gemma", score_width=32, tied=False), "f16", "lm_head.weight has no place"),
    ],
)
def test_a_model_that_the_file_can_not_tell_is_refused(c: Any, kind: str, says: str, tmp_path: Path) -> None:
    family = MODELS["gemma" if isinstance(c, GEMMA) else "llama"]
    specs = family.specs(c)
    weights = jax.tree.map(lambda s: jnp.zeros(s.shape), specs, is_leaf=is_spec)
    with pytest.raises(ValueError, match=says) as error:
        save(tmp_path / "x.gguf", family, c, specs, weights, file_type=kind)
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_numbers_beyond_float16_and_existing_files_are_refused(tmp_path: Path) -> None:
    family, c, specs, weights = draw("llama")
    with pytest.raises(ValueError, match=r"token_embd\.weight holds numbers beyond the range of F16"):
        save(tmp_path / "x.gguf", family, c, specs, weights | {"embed": weights["embed"] * 1e6})
    assert not list(tmp_path.iterdir())
    save(tmp_path / "x.gguf", family, c, specs, weights)
    with pytest.raises(ValueError, match="exists already"):
        save(tmp_path / "x.gguf", family, c, specs, weights)


# ----------------------------------------------------------------------------------------------------------- llama.cpp

LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp

for line in sys.stdin:
    path, ids, text = json.loads(line)
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.warmup, p.verbosity = path, 256, False, -1
    server = xllamacpp.Server(p)
    asked = dict(prompt=ids, n_predict=1, temperature=0, n_probs=1 << 20, ignore_eos=True)
    found = server.handle_completions(asked)
    found = json.loads(found) if isinstance(found, (str, bytes)) else found
    told = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    body = json.dumps(dict(content=text, add_special=False, parse_special=False)).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + "/tokenize", body, headers)
    tokens = json.loads(urllib.request.urlopen(request).read())["tokens"]
    print("ANSWER", json.dumps([[t["id"], t["logprob"]] for t in told]), "TOKENS", tokens, flush=True)
"""


def answers(files: list[tuple[Path, Any, Any]], made: Any, far_below: float) -> None:
    """Holds llama.cpp's log probabilities after a prompt, and its tokens of a text, to ours: (file, Config, weights).

    llama.cpp keeps keys and values in float16, and multiplies blocks of few bits with inputs rounded to eight.
    """
    python = os.environ.get("JAXLM_LLAMACPP_PYTHON")
    if not python:
        pytest.skip("PEER MISSING: set JAXLM_LLAMACPP_PYTHON to a Python that has xllamacpp (or its like)")
    prompt, lines, due = made.encode("The capital of France is a mesh, and 12 heads."), [], []
    for path, c, weights in files:
        family = MODELS.of(c)
        model = Model(family, c, family.specs(c), Layout(execution=config.Execution(dtype="float32")))
        batch = dict(tokens=jnp.asarray([prompt]), positions=jnp.arange(len(prompt))[None])
        z_TV = jax.nn.log_softmax(logits(model.readout(weights, model.forward(weights, batch).x_BTD), model.shard)[0])
        # The server tells nothing of a token that is half a character: end where a whole one is likeliest.
        last = next(i for i in range(len(prompt) - 1, 0, -1) if made.decode([int(z_TV[i].argmax())]).isascii())
        lines.append(json.dumps([str(path), prompt[: last + 1], TEXTS[1]]))
        due.append(np.asarray(z_TV[last]))
    done = subprocess.run([python, "-c", LLAMA_CPP], input="\n".join(lines), capture_output=True, text=True)
    told = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert len(told) == len(files), done.stderr[-2000:]
    for (path, _, _), answer, z_V in zip(files, told, due, strict=True):
        found, tokens = answer.split(" TOKENS ")
        far = {id: abs(logprob - z_V[id]) for id, logprob in json.loads(found)}
        assert len(far) == len(z_V), path
        assert max(far.values()) < far_below and np.std(z_V) > 0.3, (path, max(far.values()), np.std(z_V))
        assert json.loads(tokens) == made.encode(TEXTS[1])


@pytest.mark.slow
def test_llama_cpp_computes_the_same(tmp_path: Path) -> None:
    _, made = bpe("gpt-2")
    files = []
    for name, (family_name, c) in ROWS.items():
        family, c = MODELS[family_name], dataclasses.replace(c, vocab=made.vocab_size)
        specs = family.specs(c)
        weights = jax.tree.map(
            lambda w: w + 0.1 * jnp.cos(jnp.arange(w.size) ** 2).reshape(w.shape), init(specs, jax.random.key(0))
        )
        weights = jax.tree.map(lambda w: w.astype(jnp.float16).astype(jnp.float32), weights)
        path = save(tmp_path / f"{name}.gguf", family, c, specs, weights, text=ours.Text(made, False, None))
        files.append((path, c, weights))
    answers(files, made, 0.03)


@pytest.mark.slow
def test_llama_cpp_computes_the_same_of_few_bits(tmp_path: Path) -> None:
    """Our side multiplies with the numbers that are read again of the file."""
    _, made = bpe("gpt-2")
    family = MODELS["llama"]
    c = LLAMA(**BASE | dict(vocab=made.vocab_size, width=256, head_width=64, ffn=512), tied=True)
    specs = family.specs(c)
    weights, files = init(specs, jax.random.key(0)), []
    for file_type in gguf_file_types.QUANTIZED:
        path = tmp_path / f"{file_type}.gguf"
        save(path, family, c, specs, weights, file_type=file_type, text=ours.Text(made, False, None))
        files.append((path, c, reload(path)[2]))
    answers(files, made, 0.1)


# --------------------------------------------------------------------------------------------------------- real weights


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france() -> None:
    files = ours.open_file(smollm2())
    family, c = ours.describe(files, MODELS)
    specs, shard = family.specs(c), Layout(execution=config.Execution(dtype="float32"))
    assert count(specs) == 134_515_008
    weights, text = ours.load(files, family, c, specs, here(specs)), ours.text(files)
    model = Model(family, c, specs, shard)

    @jax.jit
    def next_token(weights: Any, tokens_BT: jax.Array, last: jax.Array) -> jax.Array:
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        x_BTD = model.forward(weights, dict(tokens=tokens_BT, positions=positions_BT)).x_BTD
        return logits(model.readout(weights, x_BTD), shard)[0, last].argmax()

    ids = text.tokenizer.encode("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314] and not text.add_bos
    for _ in range(2):
        row = jnp.asarray([ids + [0] * (8 - len(ids))])
        ids.append(int(next_token(weights, row, jnp.asarray(len(ids) - 1))))
    assert text.tokenizer.decode(ids) == "The capital of France is Paris."
    assert "<|im_start|>" in (text.chat_template or "")
