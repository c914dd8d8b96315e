"""Classification of one text or two, by one label, several, or a number; any family's head."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from support.tiny_models import random_weights

import jaxlm
from jaxlm.commands import cli
from jaxlm.core import config
from jaxlm.data import packing
from jaxlm.data.tokenizer import Bytes
from jaxlm.evaluation import perplexity
from jaxlm.models import bert, llama, mixtral, modernbert
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.nn.moe import Moe
from jaxlm.objectives import classify
from jaxlm.objectives.objective import RowShape
from jaxlm.runtime.mesh import NamedSharding, make_mesh, on_mesh

TOKENS = Bytes()
RNG = np.random.default_rng(0)


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "a.tsv").write_text("text\tlabel\nso good\tyes\nbad\tno\nit is good\tyes\nbad bad\tno\n")
    return str(tmp_path / "a.tsv")


def row(kind: str = "encoder", seq_len: int = 16) -> RowShape:
    return RowShape(seq_len, kind)


def test_texts_and_pairs_as_models_were_pretrained(tmp_path, file):
    c = classify.infer_from_data(classify.Config(), [file])
    assert c.labels == ("no", "yes")
    [first, *_], notes = classify.read(c, file, row(), TOKENS)
    cls, sep = TOKENS.cls_id, TOKENS.sep_id
    assert first["ids"] == [cls, *b"so good", sep] and first["target"].tolist() == [0, 1] and notes == []
    [other, *_], _ = classify.read(c, file, row("decoder"), TOKENS)
    assert other["ids"] == [TOKENS.bos_id, *b"so good"]
    got = classify.example(c, other, row("decoder"), TOKENS, RNG)
    assert got["at"] == 7 and classify.example(c, first, row(), TOKENS, RNG)["at"] == 0
    (tmp_path / "p.csv").write_text('a,b,label\n"x, y",zz,1\nlong text,s,0\n')
    pair = classify.infer_from_data(classify.Config(text="a", text2="b"), [str(tmp_path / "p.csv")])
    [one, two], notes = classify.read(pair, str(tmp_path / "p.csv"), row(seq_len=9), TOKENS)
    assert one["ids"] == [cls, *b"x, y", sep, *b"zz", sep] and one["types"] == [0] * 6 + [1] * 3
    assert two["ids"] == [cls, *b"long ", sep, *b"s", sep] and "1 of 2 texts lose their end" in notes[0]


def test_several_labels_and_numbers(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_text("\n".join(json.dumps(dict(text="x", label=v)) for v in (["a", "b"], "b", [], "a, c")))
    c = classify.infer_from_data(classify.Config(kind="multi"), [str(file)])
    items, _ = classify.read(c, str(file), row(), TOKENS)
    assert [i["target"].tolist() for i in items] == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1]]
    found = [np.array([1.0, -1, 2]), np.array([-1.0, -1, -1])]
    assert classify.answers(c, items[:2], found) == ([["a", "b"], ["b"]], [["a", "c"], []])
    file.write_text(json.dumps(dict(text="x", label=2.5)))
    c = classify.infer_from_data(classify.Config(kind="regression"), [str(file)])
    [item], _ = classify.read(c, str(file), row(), TOKENS)
    assert item["target"].tolist() == [2.5] and classify.specs(c, 4)["classify"].shape == (4, 1)
    file.write_text(json.dumps(dict(text="x", label="much")))
    with pytest.raises(ValueError, match="label is 'much', where a number is due"):
        classify.read(c, str(file), row(), TOKENS)


@pytest.mark.parametrize(
    ("c", "why"),
    [
        (classify.Config(labels=("a",)), "1 labels leave nothing"),
        (classify.Config(labels=("a", "b"), class_weights=(1.0,)), "class_weights"),
        (classify.Config(kind="multi", labels=("a", "b"), label_smoothing=0.1), "label_smoothing"),
    ],
)
def test_settings(c, why):
    with pytest.raises(ValueError, match=why):
        classify.check(c, TOKENS)


def make(c: classify.Config, family=bert, mesh: config.Mesh | None = None, **more) -> tuple[Model, dict]:
    shape = dict(vocab=264, layers=1, width=16, heads=2, ffn=24, positions=24)
    shape |= dict(head=False) if family in (bert, modernbert) else dict(kv_heads=2, head_width=8)
    model = family.Config(**shape | more)
    specs = family.specs(model) | classify.specs(c, 16)
    layout = Layout.of(mesh or config.Mesh(), config.Execution("float32"))
    return Model(family, model, specs, layout), random_weights(specs)


def batch_of(c: classify.Config, file: str, kind: str, n: int = 8) -> dict:
    items, _ = classify.read(c, file, row(kind), TOKENS)
    rows = [classify.example(c, item, row(kind), TOKENS, RNG) for item in (items * n)[:n]]
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}


@pytest.mark.parametrize(("family", "pooler"), [(bert, True), (bert, False), (llama, None)])
def test_the_loss_by_hand_and_padding_does_not_count(file, family, pooler):
    c = classify.infer_from_data(classify.Config(dropout=0.0, label_smoothing=0.2), [file])
    model, weights = make(c, family, **({} if pooler is None else dict(pooler=pooler)))
    loss = jax.jit(lambda w, b: classify.loss(c, model, w, b, None)["texts"])
    batch = batch_of(c, file, model.family.kind)
    x_BTD = jax.jit(lambda w, b: model.forward(w, b).x_BTD)(
        weights, {k: batch[k] for k in ("tokens", "segments", "positions")}
    )
    x_BD = model.pooled(weights, x_BTD) if pooler else x_BTD[np.arange(8), batch["at"]]
    z_BL = np.asarray(x_BD @ weights["classify"]) + np.asarray(weights["classify_bias"])
    log_BL = z_BL - np.log(np.exp(z_BL).sum(-1, keepdims=True))
    expected_B = -(0.8 * (batch["target"] * log_BL).sum(-1) + 0.2 * log_BL.mean(-1))
    got = loss(weights, batch)
    np.testing.assert_allclose(got["loss"], expected_B.sum(), rtol=1e-5)
    short = {k: v[0] for k, v in packing.trim_padding({k: v[None] for k, v in batch.items()}, 4).items()}
    assert short["tokens"].shape[1] == 12
    np.testing.assert_allclose(loss(weights, short)["loss"], expected_B.sum(), rtol=1e-5)
    half = {k: np.concatenate([v[:4], np.zeros_like(v[4:])]) for k, v in batch.items()}
    np.testing.assert_allclose(loss(weights, half)["loss"], expected_B[:4].sum(), rtol=1e-5)
    assert float(classify.totals(half)["texts"]) == 4


EXPERTS = dict(moe=Moe(experts=4, top_k=2, ffn=16))
MEAN = dict(mean_pooling=True, window=5, layers=2)


@pytest.mark.parametrize(("family", "more"), [(bert, {}), (modernbert, MEAN), (llama, {}), (mixtral, EXPERTS)])
@pytest.mark.parametrize("kind", ["single", pytest.param("multi", marks=pytest.mark.slow)])
def test_texts_that_share_rows_give_the_same(file, family, more, kind):
    """Losses, gradients and what evaluation tells of each text, with class weights, on one device and on a mesh."""
    c = classify.infer_from_data(classify.Config(dropout=0.0, kind=kind, class_weights=(0.5, 2.0)), [file])
    model, weights = make(c, family, **more)
    batch = {k: v[None] for k, v in batch_of(c, file, model.family.kind, 12).items()}
    batch["unit"] = np.arange(1, 13, dtype=np.int32)[None, :, None] * (batch["segments"] > 0)
    batch["checksum"] = batch["unit"] * 7
    shared = packing.pack_batch(batch)
    count = 10 if model.family.kind == "encoder" else 6  # which has marks around each text
    assert shared["tokens"].shape == (1, count, 16) and shared["at"].shape == shared["rows"].shape == (1, count, 2)
    assert (shared["rows"] > 0).sum() == 12 and (shared["rows"] > 0).sum(-1).max() == 2

    def value(model, weights, batch):
        sums = classify.loss(c, model, weights, jax.tree.map(lambda x: x[0], batch), None)["texts"]
        return sums["loss"] - sums.get("aux", 0)  # which is of rows, not of texts

    both = jax.jit(jax.value_and_grad(functools.partial(value, model)))
    expected, got = both(weights, batch), both(weights, shared)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got[1], expected[1])
    assert all(float(np.abs(expected[1][name]).max()) > 0 for name in ("classify", "embed"))

    step = perplexity.make_eval_step(functools.partial(classify.loss, c, model), classify.totals, np.ones(264))
    one, other = (perplexity.tally(step, weights, [b], 12).table() for b in (batch, shared))
    assert one[1] == other[1] == [7 * number for number in range(1, 13)]
    if family is not mixtral:  # the loss has what its router adds
        np.testing.assert_allclose(one[0], other[0], rtol=1e-5)

    shared = packing.pack_batch(batch, ways=4)
    settings = config.Mesh(data=4, tensor=2, axis_type="explicit")
    there, mesh = make(c, family, settings, **more)[0], make_mesh(settings)
    with on_mesh(mesh):
        placed = jax.device_put(weights, there.shard.shardings(there.specs, mesh))
        home = {k: NamedSharding(mesh, there.shard.spec((None, "batch"))) for k in shared}
        spread = jax.jit(jax.value_and_grad(functools.partial(value, there)))(placed, jax.device_put(shared, home))
    np.testing.assert_allclose(spread[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), jax.device_get(spread[1]), expected[1])


@pytest.mark.parametrize("family", [pytest.param(bert, marks=pytest.mark.slow), llama])
def test_a_mesh_gives_the_same(file, family):
    c = classify.infer_from_data(classify.Config(dropout=0.0), [file])
    model, weights = make(c, family)
    batch = batch_of(c, file, model.family.kind)

    def value(model, weights, batch):
        return classify.loss(c, model, weights, batch, None)["texts"]["loss"]

    expected = jax.jit(jax.value_and_grad(functools.partial(value, model)))(weights, batch)
    mesh = config.Mesh(data=4, tensor=2, axis_type="explicit")
    (there, _), made = make(c, family, mesh), make_mesh(mesh)
    with on_mesh(made):
        placed = jax.device_put(weights, there.shard.shardings(there.specs, made))
        home = {k: NamedSharding(made, there.shard.spec(("batch", *[None] * (v.ndim - 1)))) for k, v in batch.items()}
        got = jax.jit(jax.value_and_grad(functools.partial(value, there)))(placed, jax.device_put(batch, home))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), jax.device_get(got[1]), expected[1])
    assert float(np.abs(expected[1]["blocks"]["q"]).max()) > 0


CONFIG = """
from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import bert
from jaxlm.objectives import classify

def config():
    return Run("r", bert.Config(vocab=264, layers=1, width=32, heads=2, ffn=64, positions=32), classify.Config(),
               data=Data(train=({many!r},), valid=({file!r},), tokenizer="bytes"), optim=Optim(lr=1e-2, warmup=1),
               train=Train(steps=20, batch_size=8, seq_len=32, eval_every=20, prompts=(), metric="f1_macro"),
               execution=Execution("float32"), out={out!r})
"""


def test_from_the_command_line_to_a_report(file, one_device, tmp_path, capsys):
    pytest.importorskip("sklearn")
    many = tmp_path / "many.tsv"  # few records are slow to shuffle
    many.write_text("text\tlabel\n" + "so good\tyes\nbad\tno\nit is good\tyes\nbad bad\tno\n" * 32)
    (tmp_path / "c.py").write_text(CONFIG.format(many=str(many), file=file, out=str(tmp_path)))
    assert cli.main(["train", str(tmp_path / "c.py")]) == 0
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "r"), "--data", file, "--json"]) == 0
    printed, shown = capsys.readouterr()
    assert "weighted avg" in shown and json.loads(printed)["f1_macro"] == 1
    (tmp_path / "new.csv").write_text("id,text\n7,so good\n8,bad bad\n")
    assert cli.main(["predict", str(tmp_path / "r"), "--data", str(tmp_path / "new.csv")]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["id"], row["label"]) for row in told] == [("7", "yes"), ("8", "no")]
    assert all(row["probabilities"][row["label"]] > 0.5 for row in told)
    assert all(abs(sum(row["probabilities"].values()) - 1) < 1e-9 for row in told)
    model = jaxlm.open(tmp_path / "r")
    assert model.predict("so good") == {k: v for k, v in told[0].items() if k not in ("id", "text")}
    assert [row["label"] for row in model.predict(["it is good", {"text": "bad"}])] == ["yes", "no"]
    with pytest.raises(ValueError, match=r"^input 0: no text 'text'; columns there: sentence"):
        model.predict({"sentence": "good"})
    (tmp_path / "e.tsv").write_text("text\tlabel\n")
    assert cli.main(["eval", str(tmp_path / "r"), "--data", str(tmp_path / "e.tsv")]) == 2
    assert "is empty: it holds no labelled example" in capsys.readouterr().err
    (tmp_path / "e.tsv").write_text("sentence\tlabel\nx\tyes\n")
    assert cli.main(["eval", str(tmp_path / "r"), "--data", str(tmp_path / "e.tsv")]) == 2
    assert "no text 'text'; columns there: sentence, label. Set objective.text" in capsys.readouterr().err
    (tmp_path / "e.tsv").write_text("text\tlabel\nx\tyess\n")
    assert cli.main(["eval", str(tmp_path / "r"), "--data", str(tmp_path / "e.tsv")]) == 2
    assert "e.tsv:2: unknown label 'yess'; did you mean 'yes'?" in capsys.readouterr().err
