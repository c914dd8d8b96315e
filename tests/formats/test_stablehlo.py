"""Exported programs, run in a process that can't import this package, compute what the model does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file

from jaxlm.core import config, spec
from jaxlm.formats import stablehlo
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import logits
from jaxlm.nn.moe import Moe

pytest.importorskip("flatbuffers")

ROWS = [[5, 9, 2, 41, 7], [3, 1], [8, 8, 30, 2, 11, 12, 13, 14, 1, 0, 4, 6]]
ALONE = """
import json, runpy, sys
sys.modules["jaxlm"] = None  # an import of it fails
run = runpy.run_path(sys.argv[1] + "/run.py")
rows = json.loads(sys.argv[2])
out = {"forward": [x.astype("float32").tolist() for x in run["forward"](rows)]}
if run["ABOUT"]["cache"]:
    out["generate"] = run["generate"](rows, 6)
print(json.dumps(out))
"""


def make(family: str, dtype: str = "float32", sharp: float = 4, **more: Any) -> tuple[Model, Any]:
    f = MODELS[family]
    c = f.Config(**dict(vocab=64, layers=2, width=32, heads=4, positions=64) | more)
    specs = f.specs(c)
    weights = spec.init(specs, jax.random.key(0))
    blocks = {
        name: w * sharp if name in "qkv" else w for name, w in weights["blocks"].items()
    }  # so that positions tell
    return Model(f, c, specs, Layout(execution=config.Execution(dtype=dtype))), weights | {"blocks": blocks}


MODELS_HERE = {
    "llama": dict(kv_heads=2, head_width=8, ffn=48),
    "gemma": dict(kv_heads=2, head_width=8, ffn=48, window=8, score_width=8),
    "bert": dict(ffn=48),
    "mixtral": dict(kv_heads=2, head_width=8, moe=Moe(experts=4, top_k=2, ffn=16)),
}


def alone(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", ALONE, str(folder), json.dumps(ROWS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


# "gemma" has all that "llama" has, and caches of two sizes.
@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "gemma", "bert", "mixtral"])
def test_programs_compute_what_the_model_does_without_this_package(family: str, tmp_path: Path) -> None:
    model, weights = make(family, **MODELS_HERE[family])
    notes = stablehlo.save(tmp_path / "out", model, weights, lengths=(8, 16), cache=None, platforms=("cpu",))
    assert len(notes) == (6 if model.family.generates else 3)
    found = alone(tmp_path / "out")

    @jax.jit
    def whole(weights: Any, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        number = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        batch = dict(tokens=tokens_BT, positions=number, segments=(number < lengths_B[:, None]).astype(jnp.int32))
        x_BTD = model.forward(weights, batch).x_BTD
        return logits(model.readout(weights, x_BTD), model.shard) if model.family.kind == "decoder" else x_BTD

    def at_once(rows: list[list[int]]) -> np.ndarray:
        padded = np.array([row + [0] * (18 - len(row)) for row in rows], np.int32)
        return np.asarray(whole(weights, padded, np.array([len(row) for row in rows])))

    for row, z, expected in zip(ROWS, found["forward"], at_once(ROWS), strict=True):
        np.testing.assert_allclose(z, expected[: len(row)], atol=2e-5, rtol=1e-5)
    if model.family.generates:
        rows = ROWS
        for _ in range(6):  # all that was said is read again for each token
            z = at_once(rows)
            rows = [[*row, int(z[i, len(row) - 1].argmax())] for i, row in enumerate(rows)]
        assert found["generate"] == [row[-6:] for row in rows]


def test_bfloat16_weights_are_stored_as_such(tmp_path: Path) -> None:
    model, given = make("llama", "bfloat16", 1, **MODELS_HERE["llama"])
    stablehlo.save(tmp_path / "out", model, given, lengths=(16,), cache=0)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(w.dtype) for name, w in weights.items() if w.ndim > 1} == {"bfloat16"}
    run = jax.export.deserialize(bytearray((tmp_path / "out" / "forward_16.stablehlo").read_bytes()))
    row = jnp.arange(16)[None] + 3
    found = run.call(weights, row, jnp.arange(16)[None], jnp.ones((1, 16), jnp.int32))
    expected = jax.jit(lambda w, b: logits(model.readout(w, model.forward(w, b).x_BTD), model.shard))
    np.testing.assert_allclose(found, expected(given, dict(tokens=row, positions=jnp.arange(16)[None])), atol=0.05)


def test_one_program_serves_any_number_of_rows_on_every_platform(tmp_path: Path) -> None:
    model, weights = make("llama", **MODELS_HERE["llama"])
    stablehlo.save(tmp_path / "out", model, weights, lengths=(8,), cache=16)
    made = jax.export.deserialize(bytearray((tmp_path / "out" / "forward_8.stablehlo").read_bytes()))
    assert made.platforms == ("cpu", "cuda", "tpu")
    assert str(made.out_avals[0].shape[0]) == "b"
    about = json.loads((tmp_path / "out" / "model.json").read_text())
    assert about["programs"]["forward_8"] == {"inputs": ["int32[b,8]"] * 3, "outputs": "float32[b,8,64]"}
    assert set(about["programs"]) == {"forward_8", "prefill_8", "step"}


def test_what_can_not_be_exported_is_refused(tmp_path: Path) -> None:
    model, weights = make("llama", **MODELS_HERE["llama"])
    with pytest.raises(ValueError, match="cache 4 must hold the longest of lengths 8 and at most 64"):
        stablehlo.save(tmp_path / "a", model, weights, lengths=(8,), cache=4)
    with pytest.raises(ValueError, match=r"lengths .* must be positive"):
        stablehlo.save(tmp_path / "a", model, weights, lengths=(0,))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a model\.json already"):
        stablehlo.save(tmp_path / "b", model, weights)
    f = MODELS["t5"]
    seq2seq = Model(f, f.Config(), None, Layout())
    with pytest.raises(ValueError, match="encoder-decoders are not exported"):
        stablehlo.save(tmp_path / "a", seq2seq, {})
    assert not (tmp_path / "a").exists()
