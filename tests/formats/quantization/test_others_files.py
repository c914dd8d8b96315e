"""What others wrote is read as they read it: checkpoints of compressed-tensors and transformers by their logits
(`tests/golden/make_quantized.py`), matrices of AutoAWQ by the numbers that they were made of (`make_awq.py`)."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.hf_rows import batch_of, draw

from jaxlm.core import config
from jaxlm.core.published_config import PublishedConfig
from jaxlm.formats import huggingface, quantization, safetensors
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.layout import Layout

GOLDEN = Path(__file__).parents[2] / "golden" / "quantized"
ROUGH = {"nvfp4": 5e-2}
"""Where they compute the weights in bfloat16."""


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.safetensors")))
def test_logits_are_theirs(name, tmp_path):
    golden, files = np.load(GOLDEN / f"{name}.npz"), safetensors.open_files(GOLDEN, name)
    tensors = {key: files.read(key) for key in files.entries}
    values = json.loads(str(golden["config"]))
    D, V = values["hidden_size"], values["vocab_size"]
    plain = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
    plain |= {f"model.layers.0.{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
    tensors |= {key: draw(key, shape).astype(np.float32) for key, shape in plain.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(values))

    family, c = huggingface.describe(tmp_path, MODELS)
    layout, specs = Layout(execution=config.Execution(dtype="float32")), family.specs(c)
    weights = huggingface.load(tmp_path, family, c, specs, layout.shardings(specs, None))
    model = Model(family, c, specs, layout)
    out = model.forward(weights, batch_of("decoder"))
    got = np.asarray(losses.logits(model.readout(weights, out.x_BTD), layout))
    np.testing.assert_allclose(got, golden["expected"], atol=ROUGH.get(name, 1e-4), rtol=0)
    assert np.abs(golden["expected"]).max() > 1


@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast"])
def test_matrices_are_what_autoawq_packed(layout, tmp_path):
    golden = np.load(GOLDEN / "awq.npz")
    save_file({f"m.{last}": golden[f"{layout}.{last}"] for last in ("qweight", "qzeros", "scales")}, tmp_path / FILE)
    q = PublishedConfig(dict(quant_method="awq", bits=4, group_size=64, version=layout))
    got = quantization.opened(safetensors.open_files(tmp_path), q).read("m.weight")
    # The fast layout stores zero points times scales, rounded to float16.
    np.testing.assert_allclose(got, golden["dense"], atol=5e-4 if layout == "gemv_fast" else 1e-7)


FILE = "model.safetensors"
