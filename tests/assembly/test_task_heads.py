"""Heads of labelled tasks in published files: transformers' outputs from transformers' files, and the same files back.

The expected values come from `tests/golden/make_hf.py`, as those of `tests/models/test_published.py` do.
"""

import json

import numpy as np
import pytest
import safetensors.numpy
from support import head_rows
from support.hf_rows import GOLDEN, batch_of, compared, directory, inputs

from jaxlm.assembly import open_model, task_heads
from jaxlm.assembly.model_source import Source, describe
from jaxlm.core import config, tree
from jaxlm.formats import huggingface
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.objectives import OBJECTIVES

TOLERANCE = 1e-4
# One row of each way to read a model's states; the others differ in names alone.
USUAL = ("bert_", "roberta_classes", "distilbert_classes", "modernbert_", "gpt2_", "llama_")
NAMES = [name if name.startswith(USUAL) else pytest.param(name, marks=pytest.mark.slow) for name in head_rows.ROWS]
LAYOUT = Layout(execution=config.Execution(dtype="float32"))


def read(folder) -> tuple[Source, dict]:
    source = describe(folder)
    specs = open_model.specs_of(source)
    return source, open_model.read(source, specs, LAYOUT.shardings(specs, None))


def outputs(source: Source, weights: dict, kind: str) -> np.ndarray:
    """What the head gives for the row's inputs, operation by operation."""
    model = Model(source.family, source.config, open_model.specs_of(source), LAYOUT)
    batch = batch_of(kind)
    batch = {"at": np.zeros(len(batch["tokens"]), np.int32)} | batch
    return np.asarray(OBJECTIVES.of(source.head).head.logits(source.head, model, weights, batch))


def write(source: Source, weights: dict, folder) -> None:
    made = task_heads.export(source.family, source.config, source.head, weights)
    assert not made.left_out
    huggingface.save(
        folder, source.family, made.config, made.specs, weights, dtype="float16", names=made.names, values=made.values
    )


def real(row) -> np.ndarray:
    """Which outputs mean something: those of padding don't."""
    mask = batch_of(row.inputs)["segments"].astype(bool)
    return mask if row.output == "spans" or "Token" in row.model else np.ones(len(mask), bool)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_transformers_and_the_files_come_back_bit_by_bit(name, tmp_path):
    row = head_rows.ROWS[name]
    tensors = directory(name, tmp_path / "theirs")
    source, weights = read(tmp_path / "theirs")
    assert sum(w.size for w in tree.flatten(weights).values()) == sum(t.size for t in tensors.values())
    expected, where = np.load(GOLDEN / f"{name}.npz")["expected"], real(row)
    got = outputs(source, weights, row.inputs).reshape(expected.shape)
    where = where if row.inputs != "choices" else ...
    np.testing.assert_allclose(got[where], expected[where], atol=TOLERANCE, rtol=0)
    assert np.abs(expected[where]).max() > 100 * TOLERANCE

    write(source, weights, tmp_path / "ours")
    back = safetensors.numpy.load_file(tmp_path / "ours" / "model.safetensors")
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key].view(np.uint16), tensor.view(np.uint16), err_msg=key)
    again = describe(tmp_path / "ours")
    assert (again.config, again.head) == (source.config, source.head)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [row.model]


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_we_write(name, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing is compared live")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing is compared live")
    row = head_rows.ROWS[name]
    directory(name, tmp_path / "theirs")
    write(*read(tmp_path / "theirs"), tmp_path / "ours")
    auto = getattr(transformers, f"AutoModelFor{row.model.rpartition('For')[2]}")
    there, report = auto.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert type(there).__name__ == row.model and not any(report.values()), report
    said = there.config.id2label
    assert said == row.config.get("id2label", said) and there.config.problem_type == row.config.get(
        "problem_type", there.config.problem_type
    )
    there.config.pad_token_id = row.config.get("pad_token_id", there.config.pad_token_id)
    with torch.no_grad():
        out = there.eval()(**{k: torch.from_numpy(np.array(v)).long() for k, v in inputs(row.inputs).items()})
    expected, where = np.load(GOLDEN / f"{name}.npz")["expected"], real(row)
    where = where if row.inputs != "choices" else ...
    np.testing.assert_allclose(compared(out, row.output)[where], expected[where], atol=TOLERANCE, rtol=0)
