"""Every published architecture: transformers' logits from transformers' files, and the same files back.

The expected values come from `tests/golden/make_hf.py`. Where PyTorch and transformers are installed, what we write is
loaded there and compared too.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from support.hf_rows import GOLDEN, ROWS, batch_of, directory, inputs, real

from jaxlm.core import config
from jaxlm.core.spec import count
from jaxlm.formats import huggingface
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.layout import Layout

TOLERANCE = 1e-4


def open_model(folder: Path) -> tuple[Model, dict]:
    family, c = huggingface.describe(folder, MODELS)
    layout = Layout(execution=config.Execution(dtype="float32"))
    specs = family.specs(c)
    return Model(family, c, specs, layout), huggingface.load(folder, family, c, specs, layout.shardings(specs, None))


def answer(model: Model, weights: dict, row) -> np.ndarray:
    """What the row compares: logits, or the last hidden state of a bare encoder.

    Operation by operation: rows share most of these, and no two rows a program, which takes seconds to compile.
    """
    out = model.forward(weights, batch_of(row.inputs))
    if row.output == "last_hidden_state":
        return np.asarray(out.x_BTD)
    return np.asarray(losses.logits(model.readout(weights, out.x_BTD), model.shard))


@pytest.mark.parametrize("name", ROWS)
def test_logits_equal_transformers_and_the_files_come_back_bit_by_bit(name, tmp_path):
    row = ROWS[name]
    tensors = directory(name, tmp_path / "theirs")
    model, weights = open_model(tmp_path / "theirs")
    assert count(model.specs) == sum(t.size for t in tensors.values())
    expected = np.load(GOLDEN / f"{name}.npz")["expected"]
    got = answer(model, weights, row)
    where = real(row.inputs)
    np.testing.assert_allclose(got[where], expected[where], atol=TOLERANCE, rtol=0)
    assert np.abs(expected[where]).max() > 100 * TOLERANCE

    huggingface.save(tmp_path / "ours", model.family, model.config, model.specs, weights, dtype="float16", card=False)
    back = safetensors.numpy.load_file(tmp_path / "ours" / "model.safetensors")
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype
        np.testing.assert_array_equal(back[key].view(np.uint16), tensor.view(np.uint16), err_msg=key)
    assert huggingface.describe(tmp_path / "ours", MODELS) == (model.family, model.config)
    given, written = (huggingface.read_config(tmp_path / folder) for folder in ("theirs", "ours"))
    if (given.get("rope_parameters") or {}).get("rope_type") == "longrope":  # transformers ignores the inner one
        assert written["original_max_position_embeddings"] == given["original_max_position_embeddings"]


@pytest.mark.parametrize("name", ROWS)
def test_transformers_reads_what_we_write(name, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing is compared live")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing is compared live")
    row = ROWS[name]
    directory(name, tmp_path / "theirs")
    model, weights = open_model(tmp_path / "theirs")
    huggingface.save(tmp_path / "ours", model.family, model.config, model.specs, weights, dtype="float16", card=False)
    there, report = getattr(transformers, row.model).from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        out = there.eval()(**{k: torch.from_numpy(np.array(v)).long() for k, v in inputs(row.inputs).items()})
    where = real(row.inputs)
    np.testing.assert_allclose(
        answer(model, weights, row)[where], out[row.output].numpy()[where], atol=TOLERANCE, rtol=0
    )


def test_the_documentation_lists_what_is_compared_here():
    """Where this fails: `python tests/golden/make_table.py`."""
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("make_table", root / "tests" / "golden" / "make_table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    page = (root / "docs" / "how-to" / "models-and-files.md").read_text("utf-8")
    shown = page.split(table.BEGIN)[1].split(table.END)[0].splitlines()
    lines = [line for line in shown if "`" in line and "`model_type`" not in line]
    assert [line.rsplit("|", 2)[0].rstrip() + " |" for line in lines] == table.without_figures()
    assert all(float(line.rsplit("|", 2)[1]) < TOLERANCE for line in lines)
    assert table.rows().keys() == {kind for f in MODELS.values() for kind in f.MODEL_TYPES if kind != "gemma3"}
