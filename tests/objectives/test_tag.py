"""Tagging: words are learned at their first token, packing changes nothing, and figures are the field's own."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from support.tiny_models import random_weights

from jaxlm.assembly import model_source
from jaxlm.commands import cli
from jaxlm.core import config
from jaxlm.data import packing
from jaxlm.data.tokenizer import Bytes
from jaxlm.models import bert
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.objectives import tag
from jaxlm.objectives.objective import RowShape
from jaxlm.runtime.mesh import NamedSharding, make_mesh, on_mesh

TOKENS = Bytes()
SENTENCES = "Ann B-PER\nsaw O\nOslo B-LOC\n\nBob B-PER\nBrown I-PER\nleft O\n\nIt O\nrained O\n\n"


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "a.txt").write_text(SENTENCES)
    return str(tmp_path / "a.txt")


def items(file: str, c: tag.Config, seq_len: int = 24) -> tuple[list, list]:
    return tag.read(c, file, RowShape(seq_len, "encoder"), TOKENS)


def test_a_words_tag_stands_at_its_first_token(file):
    c = tag.infer_from_data(tag.Config(), [file])
    assert c.labels == ("O", "B-LOC", "B-PER", "I-PER")
    found, notes = items(file, c)
    assert notes == [] and found[0]["ids"] == [TOKENS.cls_id, *b"Ann saw Oslo", TOKENS.sep_id]
    assert found[0]["firsts"] == [1, 4, 8] and found[0]["tags"] == [2, 0, 1]
    row = tag.example(c, found[0], RowShape(24, "encoder"), TOKENS, np.random.default_rng(0))
    assert np.flatnonzero(row["weights"]).tolist() == [1, 4, 8] and row["targets"][[1, 4, 8]].tolist() == [2, 0, 1]
    assert row["segments"].sum() == 14
    short, notes = items(file, c, 10)
    assert short[0]["firsts"] == [1, 4, -1] and "3 of 3 sentences lose their end" in notes[0]
    heavy = tag.Config(labels=c.labels, class_weights=(0.5, 1, 2, 3))
    row = tag.example(heavy, found[0], RowShape(24, "encoder"), TOKENS, np.random.default_rng(0))
    assert row["weights"][[1, 4, 8]].tolist() == [2, 0.5, 1]


def test_words_beyond_the_end_count_as_untagged(file):
    c = tag.infer_from_data(tag.Config(), [file])
    short, _ = items(file, c, 10)
    true, told = tag.answers(c, short, [np.full((24, 2), 2.0)] * 3)
    assert true[0] == ["B-PER", "O", "B-LOC"] and told[0] == ["B-PER", "B-PER", "O"]


def make(c: tag.Config, mesh: config.Mesh | None = None) -> tuple[Model, dict]:
    shape = bert.Config(vocab=264, layers=1, width=16, heads=2, ffn=24, positions=24, head=False, pooler=False)
    specs = bert.specs(shape) | tag.specs(c, 16)
    layout = Layout.of(mesh or config.Mesh(), config.Execution("float32"))
    return Model(bert, shape, specs, layout), random_weights(specs)


def test_packed_sentences_and_meshes_give_the_same(file):
    c = tag.infer_from_data(tag.Config(dropout=0.0, label_smoothing=0.1), [file])
    found, _ = items(file, c)
    rows = [tag.example(c, item, RowShape(24, "encoder"), TOKENS, np.random.default_rng(0)) for item in found] * 3
    batch = {k: np.stack([r[k] for r in rows])[None] for k in rows[0]}
    model, weights = make(c)

    def value(model, weights, batch):
        return tag.loss(c, model, weights, jax.tree.map(lambda x: x[0], batch), None)["tags"]["loss"]

    expected = jax.jit(jax.value_and_grad(functools.partial(value, model)))(weights, batch)
    together = packing.pack_batch(batch, ways=8)
    assert together["tokens"].shape[1] == 8 and (together["segments"] > 0).sum() == (batch["segments"] > 0).sum()
    got = jax.jit(jax.value_and_grad(functools.partial(value, model)))(weights, together)
    mesh = config.Mesh(data=4, tensor=2, axis_type="explicit")
    there, made = make(c, mesh)[0], make_mesh(mesh)
    with on_mesh(made):
        placed = jax.device_put(weights, there.shard.shardings(there.specs, made))
        home = {k: NamedSharding(made, there.shard.spec((None, "batch", None))) for k in together}
        spread = jax.jit(jax.value_and_grad(functools.partial(value, there)))(placed, jax.device_put(together, home))
    for other in (got, jax.device_get(spread)):
        np.testing.assert_allclose(other[0], expected[0], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), other[1], expected[1])
    assert all(np.abs(g).max() > 0 for g in (expected[1]["tag"], expected[1]["blocks"]["q"]))


def test_words_of_a_text_are_those_of_the_usual_corpora():
    found = tag.WORD.findall('"Ms. O\'Neil-Wu (32) paid 3,000.50 in the U.S.," he said…')
    assert found == ['"', "Ms", ".", "O'Neil-Wu", "(", "32", ")", "paid", "3,000.50", "in", "the", "U.S", ".", ",", '"',
                     "he", "said", "…"]  # fmt: skip


def test_spans_of_any_scheme():
    assert tag.spans(["I-A", "I-A", "O", "B-B", "I-B", "B-B", "I-A"]) == [
        ("A", 0, 2), ("B", 3, 5), ("B", 5, 6), ("A", 6, 7)
    ]  # fmt: skip


def test_the_loss_by_hand(file):
    c = tag.infer_from_data(tag.Config(dropout=0.0), [file])
    found, _ = items(file, c)
    row = tag.example(c, found[1], RowShape(24, "encoder"), TOKENS, np.random.default_rng(0))
    model, weights = make(c)
    batch = {k: v[None] for k, v in row.items()}
    x_BTD = jax.device_get(jax.jit(lambda w, b: model.forward(w, b).x_BTD)(weights, batch))
    z_TL = x_BTD[0] @ weights["tag"] + weights["tag_bias"]
    log_TL = z_TL - np.log(np.exp(z_TL).sum(-1, keepdims=True))
    at = np.flatnonzero(row["weights"])
    sums = jax.jit(lambda w, b: tag.loss(c, model, w, b, None)["tags"])(weights, batch)
    np.testing.assert_allclose(sums["loss"], -log_TL[at, row["targets"][at]].sum(), rtol=1e-5)
    found = jax.jit(lambda w, b: tag.predict(c, model, w, b))(weights, batch)
    np.testing.assert_array_equal(found[0, :, 0], z_TL.argmax(-1))
    np.testing.assert_allclose(found[0, :, 1], np.exp(log_TL).max(-1), rtol=1e-5)
    assert float(tag.totals(batch)["tags"].sum()) == len(at)


CONFIG = """
from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import bert
from jaxlm.objectives import tag

def config():
    return Run("r", bert.Config(vocab=264, layers=1, width=32, heads=2, ffn=64, positions=32), tag.Config(),
               data=Data(train=({many!r},), valid=({file!r},), tokenizer="bytes"), optim=Optim(lr=1e-2, warmup=1),
               train=Train(steps=25, batch_size=8, seq_len=32, eval_every=25, prompts=(), metric="f1", use="best"),
               execution=Execution("float32"), out={out!r})
"""


def test_from_the_command_line_to_a_report(file, tmp_path, capsys):
    pytest.importorskip("seqeval")
    many = tmp_path / "many.txt"  # few records are slow to shuffle
    many.write_text(SENTENCES * 40)
    (tmp_path / "c.py").write_text(CONFIG.format(many=str(many), file=file, out=str(tmp_path)))
    assert cli.main(["train", str(tmp_path / "c.py")]) == 0
    assert "3 of 3 validation examples stand in the training data too (first: " in capsys.readouterr().out
    assert model_source.describe(tmp_path / "r").run.objective.labels == ("O", "B-LOC", "B-PER", "I-PER")
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "r"), "--data", file]) == 0
    shown = capsys.readouterr().out
    assert "entities (seqeval, strict, IOB2)" in shown and "words (scikit-learn)" in shown and "support" in shown
    assert "f1               1" in shown
    figures = shown.partition("\nword_accuracy ")[2]
    assert "\nloss " in figures.partition("\nf1 ")[2], "the task's own scores come first"
    assert "perplexity" not in shown and "\naccuracy" not in figures and "\nnll" not in figures
    assert cli.main(["predict", str(tmp_path / "r"), "--text", "Bob Brown left", "--text", "Ann saw Oslo"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"] == "Bob Brown left" and first["tags"] == ["B-PER", "I-PER", "O"]
    [entity] = first["entities"]
    assert (entity["label"], entity["text"], entity["words"]) == ("PER", "Bob Brown", [0, 2])
    assert 0.5 < entity["score"] <= 1
    assert [e["label"] for e in second["entities"]] == ["PER", "LOC"]
    (tmp_path / "words.conll").write_text("Ann\nsaw\nOslo\n\nIt\nrained\n")
    assert cli.main(["predict", str(tmp_path / "r"), "--data", str(tmp_path / "words.conll")]) == 0
    assert [json.loads(line)["tags"] for line in capsys.readouterr().out.splitlines()] == [
        ["B-PER", "O", "B-LOC"], ["O", "O"]
    ]  # fmt: skip
    (tmp_path / "b.txt").write_text(SENTENCES.replace("B-LOC", "B-ORG"))
    assert cli.main(["eval", str(tmp_path / "r"), "--data", str(tmp_path / "b.txt")]) == 2
    assert "b.txt:1: unknown label 'B-ORG'" in capsys.readouterr().err
