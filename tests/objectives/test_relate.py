"""Relations: marks around entities, read where both begin, with SemEval's and TACRED's figures."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from support.tiny_models import random_weights

from jaxlm.commands import cli
from jaxlm.core import config
from jaxlm.data import packing
from jaxlm.data.tokenizer import Bytes
from jaxlm.models import bert
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.objectives import relate
from jaxlm.objectives.objective import RowShape
from jaxlm.runtime.mesh import NamedSharding, make_mesh, on_mesh

TOKENS = Bytes()
MESHES = [dict(fsdp=2, context=2, tensor=2), pytest.param(dict(data=4, tensor=2), marks=pytest.mark.slow),
          pytest.param(dict(data=2, fsdp=2, context=2), marks=pytest.mark.slow)]  # fmt: skip
RNG = np.random.default_rng(0)
ROW = RowShape(40, "encoder")
ROWS = ["in <e1>Rome</e1> is <e2>Al</e2>.\tat(e1,e2)", "<e2>Bo</e2> saw <e1>Cy</e1>\tsaw(e2,e1)",
        "<e1>Di</e1> saw <e2>Ed</e2>\tsaw(e1,e2)", "<e1>Flo</e1> and <e2>Gus</e2>\tother"]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "\n".join(ROWS))
    return str(tmp_path / "a.tsv")


def test_labels_and_the_one_of_no_relation(file):
    c = relate.infer_from_data(relate.Config(), [file])
    assert c.labels == ("at(e1,e2)", "other", "saw(e1,e2)", "saw(e2,e1)") and c.negative == "other"
    assert relate.infer_from_data(relate.Config(negative=""), [file]).negative == ""
    assert relate.specs(c, 8)["relate"].shape == (16, 4)


def test_entities_are_marked_and_read_where_they_begin(file):
    c = relate.infer_from_data(relate.Config(), [file])
    [first, second, *_], notes = relate.read(c, file, ROW, TOKENS)
    assert bytes(first["ids"][1:-1]) == b"in @ Rome @ is # Al #." and notes[0].endswith("between the texts @ and #")
    assert bytes(second["ids"][1:-1]) == b" #Bo # saw @ Cy @"
    for item, (a, b) in ((first, "@#"), (second, "@#")):
        row = relate.example(c, item, ROW, TOKENS, RNG)
        assert [row["tokens"][at + 1] for at in row["at"]] == [ord(a), ord(b)], "a space, then the mark"
    own = relate.Config(labels=c.labels, markers=("<s>", "</s>", "<mask>", "<spare>"))
    [first, *_], _ = relate.read(own, file, ROW, TOKENS)
    ids = [TOKENS.id_of(piece) for piece in own.markers]
    assert first["ids"] == [TOKENS.cls_id, *b"in", ids[0], *b" Rome", ids[1], *b" is", ids[2], *b" Al", ids[3], *b".",
                            TOKENS.sep_id] and first["at"].tolist() == [3, 13]  # fmt: skip


def test_texts_that_share_rows_give_the_same(file):
    c = relate.infer_from_data(relate.Config(dropout=0.0), [file])
    found, _ = relate.read(c, file, RowShape(80, "encoder"), TOKENS)
    rows = [relate.example(c, item, RowShape(80, "encoder"), TOKENS, RNG) for item in found * 2]
    batch = {k: np.stack([r[k] for r in rows])[None] for k in rows[0]}
    shared = packing.pack_batch(batch)
    assert shared["tokens"].shape == (1, 3, 80) and shared["at"].shape == (1, 3, 10, 2)
    model, weights = make(c, positions=80)

    def value(weights, batch):
        return relate.loss(c, model, weights, jax.tree.map(lambda x: x[0], batch), None)["pairs"]["loss"]

    expected, got = (jax.jit(jax.value_and_grad(value))(weights, b) for b in (batch, shared))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got[1], expected[1])
    assert float(np.abs(expected[1]["relate"]).max()) > 0


def test_unused_pieces_stand_around_entities_where_there_are_some():
    class Bert(Bytes):
        def id_of(self, piece: str) -> int | None:
            return {f"[unused{i}]": i for i in range(1, 7)}.get(piece)

    assert relate.marks(relate.Config(), Bert()) == ([[1], [2], [3], [4]], "[unused1] [unused2] [unused3] [unused4]")


def test_long_texts_keep_the_stretch_around_both(tmp_path):
    text = "x" * 50 + " <e1>a</e1> <e2>b</e2> " + "y" * 50
    (tmp_path / "a.jsonl").write_text(json.dumps(dict(text=text, label="l")))
    c = relate.Config(labels=("l", "m"))
    [item], notes = relate.read(c, str(tmp_path / "a.jsonl"), replace(ROW, seq_len=22), TOKENS)
    assert (
        len(item["ids"]) == 22 and b" @ a @ # b" in bytes(item["ids"][1:-1]) and "1 of 1 texts lose an end" in notes[1]
    )
    assert [item["ids"][at : at + 2] for at in item["at"]] == [[*b" @"], [*b" #"]]
    with pytest.raises(
        ValueError, match=r"a\.jsonl:1: its entities begin 6 tokens apart, too far for train\.seq_len 8"
    ):
        relate.read(c, str(tmp_path / "a.jsonl"), replace(ROW, seq_len=8), TOKENS)


@pytest.mark.parametrize(
    ("c", "why"),
    [
        (relate.Config(labels=("a",)), "1 labels leave nothing"),
        (relate.Config(labels=("a", "b"), negative="c"), "objective.negative: 'c' is none of the labels a, b"),
        (relate.Config(labels=("a", "b"), markers=("<s>",)), "objective.markers: 1 pieces, where 4 are due"),
        (relate.Config(labels=("a", "b"), markers=("<s>", "x!", "<s>", "<s>")), "the tokenizer has no piece 'x!'"),
    ],
)
def test_settings(c, why):
    with pytest.raises(ValueError, match=why):
        relate.check(c, TOKENS)


def make(c: relate.Config, mesh: config.Mesh | None = None, positions: int = 40) -> tuple[Model, dict]:
    shape = bert.Config(vocab=264, layers=1, width=16, heads=2, ffn=24, positions=positions, head=False, pooler=False)
    specs = bert.specs(shape) | relate.specs(c, 16)
    layout = Layout.of(mesh or config.Mesh(), config.Execution("float32"))
    return Model(bert, shape, specs, layout), random_weights(specs)


def batch_of(c: relate.Config, file: str, n: int = 8) -> dict:
    items, _ = relate.read(c, file, ROW, TOKENS)
    rows = [relate.example(c, item, ROW, TOKENS, RNG) for item in (items * n)[:n]]
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}


def test_the_loss_by_hand_and_padding_does_not_count(file):
    c = relate.infer_from_data(relate.Config(dropout=0.0, label_smoothing=0.1), [file])
    model, weights = make(c)
    loss = jax.jit(lambda w, b: relate.loss(c, model, w, b, None)["pairs"])
    batch = batch_of(c, file)
    x_BTD = jax.jit(lambda w, b: model.forward(w, b).x_BTD)(
        weights, {k: batch[k] for k in ("tokens", "types", "segments", "positions")}
    )
    x_BD = np.concatenate([x_BTD[np.arange(8), batch["at"][:, i]] for i in (0, 1)], -1)
    z_BL = x_BD @ np.asarray(weights["relate"]) + np.asarray(weights["relate_bias"])
    log_BL = z_BL - np.log(np.exp(z_BL).sum(-1, keepdims=True))
    expected_B = -(0.9 * (batch["target"] * log_BL).sum(-1) + 0.1 * log_BL.mean(-1))
    got = loss(weights, batch)
    np.testing.assert_allclose(got["loss"], expected_B.sum(), rtol=1e-5)
    half = {k: np.concatenate([v[:4], np.zeros_like(v[4:])]) for k, v in batch.items()}
    np.testing.assert_allclose(loss(weights, half)["loss"], expected_B[:4].sum(), rtol=1e-5)
    assert float(relate.totals(half)["pairs"]) == 4


@pytest.mark.parametrize("axes", MESHES)
def test_a_mesh_gives_the_same(file, axes):
    c = relate.infer_from_data(relate.Config(dropout=0.0), [file])
    model, weights = make(c)
    batch = batch_of(c, file)

    def value(model, weights, batch):
        return relate.loss(c, model, weights, batch, None)["pairs"]["loss"]

    expected = jax.jit(jax.value_and_grad(functools.partial(value, model)))(weights, batch)
    mesh = config.Mesh(**axes, axis_type="explicit")
    (there, _), made = make(c, mesh), make_mesh(mesh)
    with on_mesh(made):
        placed = jax.device_put(weights, there.shard.shardings(there.specs, made))
        inner = lambda v: ["seq" if n == 40 else None for n in v.shape[1:]]  # noqa: E731
        home = {k: NamedSharding(made, there.shard.spec(("batch", *inner(v)))) for k, v in batch.items()}
        got = jax.jit(jax.value_and_grad(functools.partial(value, there)))(placed, jax.device_put(batch, home))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), jax.device_get(got[1]), expected[1])
    assert float(np.abs(expected[1]["blocks"]["q"]).max()) > 0


CONFIG = """
from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import bert
from jaxlm.objectives import relate

def config():
    return Run("r", bert.Config(vocab=264, layers=1, width=32, heads=2, ffn=64, positions=40, head=False, pooler=False),
               relate.Config(), data=Data(train=({many!r},), valid=({file!r},), tokenizer="bytes"),
               optim=Optim(lr=1e-2, warmup=1),
               train=Train(steps=40, batch_size=16, seq_len=40, prompts=(), metric="f1_macro"),
               execution=Execution("float32"), out={out!r})
"""


def test_from_the_command_line_to_a_report(file, one_device, tmp_path, capsys):
    pytest.importorskip("sklearn")
    many = tmp_path / "many.tsv"  # few records are slow to shuffle
    many.write_text("text\tlabel\n" + "\n".join(ROWS * 32))
    (tmp_path / "c.py").write_text(CONFIG.format(many=str(many), file=file, out=str(tmp_path)))
    assert cli.main(["train", str(tmp_path / "c.py"), "--optim.freeze", "^position$"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "r"), "--data", file, "--json"]) == 0
    printed, shown = capsys.readouterr()
    found = json.loads(printed)
    assert found["f1_macro"] == found["f1_micro"] == 1 and "relations, without 'other'" in shown
    (tmp_path / "new.txt").write_text("<e1>Di</e1> saw <e2>Ed</e2>\n<e1>Flo</e1> and <e2>Gus</e2>\n")
    out = tmp_path / "told.jsonl"
    for status in (0, 2):  # a second time the file exists
        asked = ["predict", str(tmp_path / "r"), "--data", str(tmp_path / "new.txt"), "--out", str(out)]
        assert cli.main(asked) == status
    assert "exists; name another file" in capsys.readouterr().err
    assert [json.loads(line)["label"] for line in out.read_text().splitlines()] == ["saw(e1,e2)", "other"]
    (tmp_path / "b.tsv").write_text("text\tlabel\n<e1>Di</e1> saw <e2>Ed</e2>\tsaw(e2,e2)\n")
    assert cli.main(["eval", str(tmp_path / "r"), "--data", str(tmp_path / "b.tsv")]) == 2
    assert "b.tsv:2: unknown label 'saw(e2,e2)'; did you mean 'saw(e" in capsys.readouterr().err
