"""Every key of a config.json and of GGUF's metadata that is read has a rule, which says what its value may be."""

import json
from typing import ClassVar

import pytest
from models.test_published_config import ROWS, values_of

from jaxlm.core import published_config
from jaxlm.core.published_config import PublishedConfig
from jaxlm.data import tokenizer as tokenizers
from jaxlm.formats import gguf_metadata, gguf_names, gguf_rope, gguf_tokenizer, huggingface
from jaxlm.formats.gguf_metadata import Metadata
from jaxlm.models import MODELS, gemma
from jaxlm.nn import rope


class Recorder(PublishedConfig):
    """It notes which keys are read, whether they are there or not, and forbids reading past the rules."""

    read: ClassVar[set[str]] = set()

    def __getitem__(self, key):
        self.read.add(key)
        value = super().__getitem__(key)
        return Recorder(value, value.where) if isinstance(value, PublishedConfig) else value

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def pop(self, key, default=None):
        self.read.add(key)
        return super().pop(key, default)

    def __contains__(self, key):
        self.read.add(key)
        return super().__contains__(key)

    def items(self):
        raise AssertionError("values that are read together aren't checked; read each by its key")

    values = items


def test_every_key_that_a_family_reads_has_a_rule(monkeypatch):
    for module in (rope, gemma):
        monkeypatch.setattr(module, "PublishedConfig", Recorder)
    lacking, every = {}, set()
    for name in sorted(ROWS):
        monkeypatch.setattr(Recorder, "read", set())
        values = Recorder(values_of(name))
        huggingface.family_of(values, MODELS).from_hf(values)
        every |= Recorder.read
        if keys := Recorder.read - published_config.RULES.keys():
            lacking[name] = sorted(keys)
    assert not lacking
    assert {"add_cross_attention", "position_embedding_type", "rope_theta", "beta_fast", "head_dim"} <= every


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *[("bart", {key: "x"}) for key in ("normalize_before", "add_final_layer_norm", "normalize_embedding",
                                           "static_position_embeddings", "add_bias_logits", "extra_pos_embeddings")],
        ("bert", {"is_decoder": 10**20}),
        ("bert", {"add_cross_attention": [0]}),
        ("gpt2", {"scale_attn_weights": "no"}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": {}}),
        ("llama", {"quantization_config": ["a"]}),
        ("llama", {"quantization_config": {"quant_method": 4}}),
        ("gemma3", {"rope_local_base_freq": "x"}),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else x,
)  # fmt: skip
def test_their_values_are_refused_by_key(name, change, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values_of(name) | change))
    with pytest.raises(ValueError, match=r"must be (true or false|a whole number|an object|a text|a number)") as caught:
        huggingface.describe(tmp_path, MODELS)
    assert "\n" not in str(caught.value)


def metadata_of(name):
    values = values_of(name)
    family = huggingface.family_of(values, MODELS)
    c = family.from_hf(values)
    fields, factors = gguf_names.metadata(gguf_names.complete(family.to_hf(c)))
    shapes = {"token_embd.weight": (c.vocab, c.width), "output.weight": (c.vocab, c.width)}
    return fields, shapes, factors


GGUF = ("gemma", "gemma2", "gemma3", "gpt2", "llama", "llama_3.1", "llama_linear", "llama_yarn", "mixtral", "olmo2",
        "olmo2_biases_yarn", "qwen2", "qwen3", "qwen3_moe", "smollm3")  # fmt: skip


@pytest.fixture
def keys(monkeypatch):
    """The keys of metadata that are read."""
    read = set()

    class Noting(Metadata):
        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

        def get(self, key, default=None):
            read.add(key)
            return super().get(key, default)

    for module in (gguf_names, gguf_rope, gguf_tokenizer):
        monkeypatch.setattr(module, "Metadata", Noting)
    return read


def tokenizer_fields(tmp_path):
    """The metadata of a byte-level tokenizer, and of one of SentencePiece's."""
    from jaxlm.data import train_tokenizer

    pieces = train_tokenizer.train_sentencepiece(["some words of text 12"] * 9, tmp_path / "t.model", vocab_size=300)
    alphabet = [chr(b if b in range(33, 127) else 256 + b) for b in range(256)]
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    model = dict(type="BPE", vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[])
    levels = json.dumps(dict(version="1.0", added_tokens=[], pre_tokenizer=level, decoder=level, model=model))
    for made in (tokenizers.HuggingFace(levels), pieces):
        written = gguf_tokenizer.write(made, made.vocab_size, True)
        yield {f"tokenizer.ggml.{key}": value for key, value in written.items()}


def test_every_key_of_metadata_that_is_read_has_a_rule(keys, tmp_path):
    for name in GGUF:
        fields, shapes, factors = metadata_of(name)
        gguf_names.config(fields, shapes, factors)
    for fields in tokenizer_fields(tmp_path):
        gguf_tokenizer.read(fields)
    assert sorted(key for key in keys if gguf_metadata.rule_of(key) is None) == []
    assert {"llama.block_count", "tokenizer.ggml.tokens", "tokenizer.ggml.bos_token_id"} <= keys


def test_values_of_metadata_are_refused_by_key(tmp_path):
    """Of every key that a file has, with values of other types: a line that names a key, or the same model."""
    wrong = (None, "x", [], {}, -1, 10**20, float("nan"), [None], [[]], ["x"], True)
    refused = 0
    for name in ("llama_yarn", "gemma3", "mixtral", "gpt2"):
        fields, shapes, factors = metadata_of(name)
        for key in fields:
            for value in wrong:
                try:
                    gguf_names.config(fields | {key: value}, shapes, factors)
                except ValueError as error:
                    assert "\n" not in str(error)
                    refused += "must be" in str(error)
    for fields in tokenizer_fields(tmp_path):
        for key in fields:
            for value in wrong:
                try:
                    gguf_tokenizer.read(fields | {key: value})
                except ValueError as error:
                    assert "\n" not in str(error)
                    refused += "must be" in str(error)
    assert refused > 300
