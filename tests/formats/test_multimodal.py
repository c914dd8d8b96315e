"""Text models of multimodal ones: transformers' logits of a text from the whole model's files.

The expected values come from `tests/golden/make_hf.py`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from support.hf_rows import GOLDEN, WRAPPED, batch_of, directory

from jaxlm.assembly import convert, model_source
from jaxlm.core import config
from jaxlm.core.published_config import PublishedConfig
from jaxlm.formats import huggingface, multimodal
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.layout import Layout

TOLERANCE = 1e-4


def logits(folder: Path) -> np.ndarray:
    family, c = huggingface.describe(folder, MODELS)
    layout, specs = Layout(execution=config.Execution(dtype="float32")), family.specs(c)
    weights = huggingface.load(folder, family, c, specs, layout.shardings(specs, None))
    model = Model(family, c, specs, layout)
    x_BTD = model.forward(weights, batch_of("decoder")).x_BTD
    return np.asarray(losses.logits(model.readout(weights, x_BTD), layout))


def expected(name: str) -> np.ndarray:
    return np.load(GOLDEN / f"{name}.npz")["expected"]


def rewritten(folder: Path, change) -> None:
    """Changes the values of config.json in place."""
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("name", WRAPPED)
def test_a_texts_logits_are_those_of_the_whole_model(name, tmp_path):
    directory(name, tmp_path / "whole")
    np.testing.assert_allclose(logits(tmp_path / "whole"), expected(name), atol=TOLERANCE, rtol=0)


def test_newer_files_call_the_tensors_otherwise(tmp_path):
    tensors = directory("multimodal_llava", tmp_path / "whole")
    newer = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    for name in list(tensors):
        for old, new in newer.items():
            if name.startswith(old):
                tensors[new + name.removeprefix(old)] = tensors.pop(name)
    assert "lm_head.weight" in tensors
    safetensors.numpy.save_file(tensors, tmp_path / "whole" / "model.safetensors")
    np.testing.assert_allclose(logits(tmp_path / "whole"), expected("multimodal_llava"), atol=TOLERANCE, rtol=0)


def test_early_files_have_the_texts_values_beside_the_others(tmp_path):
    directory("multimodal_qwen2_vl", tmp_path / "whole")

    def flatten(values):
        inner = {k: v for k, v in values.pop("text_config").items() if k != "model_type"}
        inner["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 0]}
        del inner["rope_parameters"]
        values |= {k: v for k, v in inner.items() if k != "tie_word_embeddings"} | {"rope_theta": 1e6}

    rewritten(tmp_path / "whole", flatten)
    np.testing.assert_allclose(logits(tmp_path / "whole"), expected("multimodal_qwen2_vl"), atol=TOLERANCE, rtol=0)


def test_values_that_are_left_out_are_the_text_classs_own():
    """As google/gemma-3-4b-it's config.json has them."""
    given = dict(
        hidden_size=2560, intermediate_size=10240, model_type="gemma3_text", num_hidden_layers=34,
        rope_scaling=dict(factor=8.0, rope_type="linear"), sliding_window=1024,
    )  # fmt: skip
    values = multimodal.text_config(PublishedConfig({"model_type": "gemma3", "text_config": given}), None)
    c = huggingface.family_of(values, MODELS).from_hf(values)
    assert (c.heads, c.kv_heads, c.head_width, c.vocab, c.tied, c.positions) == (8, 4, 256, 262208, True, 131072)
    assert (c.rope.factor, c.rope.theta, c.rope_local.theta, c.rope_local.scaling) == (8.0, 1e6, 1e4, "default")


def test_where_config_json_is_silent_the_files_say_whether_there_is_a_head(tmp_path):
    """Mistral Small 3.1's config.json says nothing and its class ties, and its files have a head of their own."""
    tensors = directory("multimodal_mistral3", tmp_path / "whole")
    rewritten(tmp_path / "whole", lambda values: values.pop("tie_word_embeddings", None))
    assert huggingface.describe(tmp_path / "whole", MODELS)[1].tied
    head = tensors["language_model.model.embed_tokens.weight"][::-1].copy()
    safetensors.numpy.save_file(
        tensors | {"language_model.lm_head.weight": head}, tmp_path / "whole" / "model.safetensors"
    )
    got = logits(tmp_path / "whole")
    np.testing.assert_allclose(got[..., ::-1], expected("multimodal_mistral3"), atol=TOLERANCE, rtol=0)


def test_what_is_left_out_is_said_and_the_text_model_is_written_alone(tmp_path, capsys):
    tensors = directory("multimodal_gemma3", tmp_path / "whole")
    convert.export(str(tmp_path / "whole"), tmp_path / "text")
    said = capsys.readouterr().err.splitlines()
    line = "a multimodal gemma3; its text model (gemma3_text) is read, all else is left out"
    assert f"{tmp_path}/whole: {line}" in said
    written = safetensors.numpy.load_file(tmp_path / "text" / "model.safetensors")
    theirs = {multimodal.text_name(name): x for name, x in tensors.items() if name.startswith("language_model.")}
    assert written.keys() == theirs.keys() and all(np.array_equal(written[name], x) for name, x in theirs.items())
    assert huggingface.read_config(tmp_path / "text")["model_type"] == "gemma3_text"
    capsys.readouterr()
    model_source.describe(tmp_path / "text")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("change", "says"), [
    (lambda v: v["text_config"].update(model_type="cohere"), r"model_type 'cohere' inside a llava is not read here"),
    (lambda v: v.pop("text_config"), r"config\.json: lacks text_config, which llava needs"),
    (lambda v: v.update(text_config=[1]), r"config\.json: text_config is \[1\]; it must be an object"),
    (lambda v: v["text_config"].update(num_attention_heads="4"), r"text_config: num_attention_heads is '4'; it must"),
    (lambda v: v.update(quantization_config=dict(quant_method="hqq")), r"quantization_config: 'hqq' weights are not"),
    (lambda v: v.update(model_type="paligemma"), r"model_type 'paligemma' is not read here; known: .*llava_next"),
])  # fmt: skip
def test_what_is_not_read_says_so(change, says, tmp_path):
    directory("multimodal_llava", tmp_path / "whole")
    rewritten(tmp_path / "whole", change)
    with pytest.raises(ValueError, match=says) as error:
        logits(tmp_path / "whole")
    assert "\n" not in str(error.value)


def test_a_tensor_of_the_text_model_that_is_not_known_is_named(tmp_path):
    tensors = directory("multimodal_llava", tmp_path / "whole")
    tensors["language_model.model.layers.0.cross_attn.weight"] = np.zeros((2, 2), np.float16)
    safetensors.numpy.save_file(tensors, tmp_path / "whole" / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensor is not this model's \(model\.layers\.0\.cross_attn\.weight\)"):
        logits(tmp_path / "whole")
