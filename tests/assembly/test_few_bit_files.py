"""Compressed models are exported in the layouts of few bits, and quantized checkpoints are opened by every command."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import quantized_rows, tiny_published

from jaxlm.assembly import convert, merge
from jaxlm.assembly.open_model import open_model, published_run
from jaxlm.commands import cli
from jaxlm.core import config, config_io
from jaxlm.core.compression import Compression
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.models import llama
from jaxlm.runtime import mesh
from jaxlm.weights import merging
from jaxlm.weights.adapters.adapted import Adapted

C = llama.Config(vocab=tiny_published.VOCAB, layers=1, width=64, ffn=128, heads=4, kv_heads=2, head_width=16,
                 positions=64)  # fmt: skip
PATHS = tuple(f"blocks/{name}" for name in ("q", "k", "v", "o", "gate", "up", "down"))


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return tiny_published.directory(tmp_path_factory.mktemp("few") / "plain", C)


def compressed(plain, folder, how: dict[str, str]):
    """Writes a run directory whose matrices are stored so."""
    p = open_model(plain)
    settings = Compression(tuple(f"{path}={text}" for path, text in how.items()))
    adapted = Adapted(config.Adapter(), llama, C, settings)
    run = dataclasses.replace(published_run(p.source), name=folder.name, out=str(folder.parent), compression=settings)
    p.source.save_text(folder / "tokenizer")
    with Checkpoints(folder / "checkpoints") as checkpoints, mesh.on_mesh(p.mesh):
        params = adapted.initial_values(p.params, None, jax.random.key(0))
        checkpoints.save(0, dict(step=jnp.zeros((), jnp.int32), params=params), {"step": 0}, wait=True)
    config_io.dump(run, folder / "config.json")
    return folder


@pytest.mark.parametrize("layout", [pytest.param("compressed-tensors", marks=pytest.mark.slow), "gptq",
                                    pytest.param("awq", marks=pytest.mark.slow)])  # fmt: skip
def test_a_compressed_run_is_exported_in_each_layout(layout, plain, tmp_path):
    run = compressed(plain, tmp_path / "run", dict.fromkeys(PATHS[3:5], "int4:32"))
    _, record = convert.export(run, tmp_path / "out", format=layout)
    assert record["relative_difference"] < 1e-5
    q = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert q["quant_method"] == layout
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_plain_models_and_adapters_are_not_written_in_few_bits(plain, tmp_path):
    with pytest.raises(ValueError, match=r"plain has no weights of few bits; make them first: jaxlm compress"):
        convert.export(plain, tmp_path / "out", format="gptq")
    assert not (tmp_path / "out").exists()


def quantized(plain, folder, name: str):
    """Writes the plain model's directory with its matrices quantized as a row of tests/support is."""
    row, rng = quantized_rows.ROWS[name], np.random.default_rng(0)
    shutil.copytree(plain, folder)
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        made, _ = row.make(rng, *tensors.pop(key).shape)
        tensors |= {f"{key.removesuffix('.weight')}.{last}": x for last, x in made.items()}
    save_file(tensors, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text()) | dict(quantization_config=row.config)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_a_quantized_checkpoint_is_imported_exported_and_merged(plain, tmp_path, capsys):
    few = quantized(plain, tmp_path / "few", "gptq_act_order")
    before = convert.logits(open_model(few))
    assert "gptq weights are read as the float32 numbers" in capsys.readouterr().err
    convert.import_model(str(few), tmp_path / "run")
    np.testing.assert_array_equal(convert.logits(open_model(tmp_path / "run")), before)
    convert.export(few, tmp_path / "hf")
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "quantization_config" not in values and values["dtype"] == "float32"
    merge.merge([few, tmp_path / "run"], tmp_path / "merged", merging.Settings(method="linear"))
    np.testing.assert_allclose(convert.logits(open_model(tmp_path / "merged")), before, atol=1e-4)


CONFIG = """
from jaxlm import Data, Optim, Run, Train
from jaxlm.models import llama
from jaxlm.objectives import causal

def config():
    return Run("r", llama.Config(), causal.Config(), data=Data(train=({file!r},)), optim=Optim(warmup=1), out={out!r},
               train=Train(steps=2, batch_size=8, seq_len=16, prompts=()))
"""


@pytest.mark.slow
def test_a_quantized_checkpoint_generates_is_scored_and_trained_on(plain, tmp_path, capsys):
    few, text = quantized(plain, tmp_path / "few", "fp8_blocks"), str(tmp_path / "text.txt")
    (tmp_path / "text.txt").write_text(f"{tiny_published.TEXT}\n" * 40)
    (tmp_path / "c.py").write_text(CONFIG.format(file=text, out=str(tmp_path)))
    assert cli.main(["generate", str(few), "--prompt", "the film was", "--tokens", "3", "--json"]) == 0
    assert cli.main(["eval", str(few), "--data", text, "--json"]) == 0
    before = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
    assert cli.main(["train", str(tmp_path / "c.py"), "--start", str(few), "--optim.lr", "1e-2"]) == 0
    assert cli.main(["eval", str(tmp_path / "r"), "--data", text, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] < before
