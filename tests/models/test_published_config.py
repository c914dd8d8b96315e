"""Values of a published config.json: a wrong type or range is refused, what transformers ignores is ignored."""

import copy
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from support.hf_rows import GOLDEN, ROWS

from jaxlm.core import weight_names
from jaxlm.formats import gguf_names, huggingface
from jaxlm.models import MODELS

NUMBERS = [-1, 0, 1, 3, 7, 10**20, -(10**20), 1e300, 0.5, -0.5, True, False, float("nan"), float("inf")]
LISTS = [[], [4], [0, 1], [None], ["full_attention"], [[]]]
BAD = [None, "", "4", "gelu", {}, {"rope_type": "yarn"}, {"factor": None}, *NUMBERS, *LISTS]


def values_of(name: str) -> dict:
    with np.load(GOLDEN / f"{name}.npz") as golden:
        return json.loads(str(golden["config"]))


def opened(values: dict, folder: Path):
    """(config, names of tensors): what reading a model computes before it reads a weight."""
    (folder / "config.json").write_text(json.dumps(values))
    family, c = huggingface.describe(folder, MODELS)
    return c, weight_names.tensors(family.names(c), family.specs(c))


def mutated(values: dict, rng: random.Random) -> tuple[dict, str]:
    """The values with one or two of them, or of an object in them, another."""
    values, what = copy.deepcopy(values), []
    for _ in range(rng.choice([1, 1, 2])):
        inner = [values, *(v for v in values.values() if isinstance(v, dict) and v)]
        place = rng.choice(inner)
        key = rng.choice(sorted(place))
        place[key] = rng.choice(BAD)
        what.append(f"{key}={place[key]!r}")
    return values, ", ".join(what)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_any_value_is_read_well_or_refused_in_one_line(name, tmp_path):
    values, rng, refused = values_of(name), random.Random(name), 0
    for _ in range(12):
        changed, what = mutated(values, rng)
        started = time.perf_counter()
        try:
            opened(changed, tmp_path)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            refused += 1
        except Exception as error:
            raise AssertionError(f"{name} with {what}") from error
        assert time.perf_counter() - started < 5, what
    assert refused


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama", {"num_attention_heads": [4]}, r"num_attention_heads is \[4\]; it must be a whole number"),
        ("llama", {"num_attention_heads": None}, "num_attention_heads is None"),
        ("gpt2", {"n_embd": "32"}, "n_embd is '32'"),
        ("bert", {"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number from 1"),
        ("gemma2", {"num_hidden_layers": 10**20}, "num_hidden_layers is 1000"),
        ("qwen3_window", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
        ("llama_yarn", {"rope_parameters": {"rope_type": "yarn", "factor": "2"}}, "rope_parameters: factor is '2'"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ("t5", {"dropout_rate": 2}, "dropout_rate is 2"),
        ("llama", {"head_dim": 7}, "head_width: 7 of 7 values would be rotated, in pairs"),
        ("llama", {"num_key_value_heads": 3}, "kv_heads"),
        ("bert", {"num_attention_heads": 5}, "num_attention_heads|heads"),
    ],
)
def test_the_key_and_what_it_must_be_are_named(name, change, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        opened(values_of(name) | change, tmp_path)


IGNORED = {  # keys that transformers 5.24's code of these models leaves unread
    "partial_rotary_factor": (0.5, {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3",
                                    "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmo2", "modernbert"}),
    "attn_logit_softcapping": (20.0, {"gemma3", "gemma", "llama"}),
    "no_rope_layers": ([0, 1], {"llama", "mistral", "qwen2", "qwen3", "phi3"}),
    "attention_bias": (True, {"mistral", "qwen2", "phi3", "mixtral"}),
    "mlp_bias": (True, {"mistral", "qwen2", "qwen3", "phi3"}),
    "hidden_act": ("gelu", {"gemma2", "gemma3"}),
    "hidden_activation": ("relu", {"gemma", "llama"}),
    "sliding_window": (4, {"llama", "gemma", "olmo2"}),
    "layer_types": (["sliding_attention"] * 2, {"llama", "phi3", "mistral"}),
}  # fmt: skip


GGUF = ["llama", "llama_yarn", "gpt2", "gemma2", "gemma3", "qwen3_moe", "olmo2"]


@pytest.mark.parametrize("name", GGUF)
def test_any_metadata_of_a_gguf_file_are_read_well_or_refused(name):
    values = values_of(name)
    family = huggingface.family_of(values, MODELS)
    c = family.from_hf(values)
    fields, _ = gguf_names.metadata(gguf_names.complete(family.to_hf(c)))
    shapes = {"token_embd.weight": (c.vocab, c.width), "output.weight": (c.vocab, c.width)}
    assert family.from_hf(gguf_names.config(fields, shapes, None)).heads == c.heads
    rng, refused = random.Random(name), 0
    for _ in range(60):
        key = rng.choice(sorted(fields))
        changed = fields | {key: rng.choice(BAD)}
        try:
            again = family.from_hf(gguf_names.config(changed, shapes, None))
            weight_names.tensors(family.names(again), family.specs(again))
        except (ValueError, KeyError) as error:
            assert "\n" not in str(error)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{name} with {key}={changed[key]!r}") from error
    assert refused


@pytest.mark.parametrize(
    ("key", "name"), [(key, name) for key, (_, names) in IGNORED.items() for name in sorted(names)]
)
def test_what_transformers_ignores_changes_nothing(key, name, tmp_path):
    values, value = values_of(name), IGNORED[key][0]
    plain = {k: v for k, v in values.items() if k != key}
    if "rope_parameters" in plain and name == "modernbert" and key == "partial_rotary_factor":
        plain["rope_parameters"] = {k: v | {key: value} for k, v in plain["rope_parameters"].items()}
    if isinstance(value, list):
        value = value[:1] * plain["num_hidden_layers"]
    assert opened(plain | {key: value}, tmp_path)[0] == opened(values if key not in values else plain, tmp_path)[0]


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_the_activation_of_later_gemmas_has_one_key(name, tmp_path):
    values = {k: v for k, v in values_of(name).items() if k != "hidden_activation"} | {"hidden_act": "gelu"}
    assert opened(values, tmp_path)[0].activation == "gelu_pytorch_tanh"


def test_phi3_alone_rotates_a_part_of_its_heads(tmp_path):
    values = values_of("phi3") | {"partial_rotary_factor": 0.5}
    values["rope_parameters"] = values["rope_parameters"] | {"partial_rotary_factor": 0.5}
    assert opened(values, tmp_path)[0].rope.share == 0.5
    with pytest.raises(ValueError, match=r"partial_rotary_factor 0\.5 with rope_type 'yarn'"):
        opened(values_of("llama_yarn") | {"partial_rotary_factor": 0.5}, tmp_path)
