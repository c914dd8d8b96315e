"""Multiple choice: each choice in a row of its own, one softmax over those of a question, any family."""

import functools
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from support.tiny_models import random_weights

from jaxlm.commands import cli
from jaxlm.core import config
from jaxlm.data import packing
from jaxlm.data.tokenizer import Bytes
from jaxlm.models import bert, llama
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.objectives import choice
from jaxlm.objectives.objective import RowShape
from jaxlm.runtime.mesh import NamedSharding, make_mesh, on_mesh

TOKENS = Bytes()
MESHES = [dict(fsdp=2, context=2, tensor=2), pytest.param(dict(data=4, tensor=2), marks=pytest.mark.slow),
          pytest.param(dict(data=2, fsdp=2, context=2), marks=pytest.mark.slow)]  # fmt: skip
RNG = np.random.default_rng(0)
ROWS = [dict(context="2+2", choices=["5", "four", "9"], answer=1), dict(context="a b", choices=["c", "z"], answer="A"),
        dict(context="sky", choices=["blue", "red", "old"], answer=0)]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return str(tmp_path / "a.jsonl")


def row(kind: str = "encoder", seq_len: int = 16) -> RowShape:
    return RowShape(seq_len, kind)


def test_every_choice_behind_its_context(file):
    c = choice.infer_from_data(choice.Config(), [file])
    assert c.most == 3
    [first, second, _], notes = choice.read(c, file, row(), TOKENS)
    cls, sep = TOKENS.cls_id, TOKENS.sep_id
    assert first["texts"][1] == dict(ids=[cls, *b"2+2", sep, *b"four", sep], types=[0] * 5 + [1] * 5) and notes == []
    got = choice.example(c, second, row(), TOKENS, RNG)
    assert got["tokens"].shape == (3, 16) and got["choice_mask"].tolist() == [1, 1, 0] and not got["segments"][2].any()
    assert got["target"].tolist() == [1, 0, 0] and got["at"].tolist() == [0, 0, 0]
    [first, *_], _ = choice.read(c, file, row("decoder"), TOKENS)
    assert first["texts"][1]["ids"] == [TOKENS.bos_id, *b"2+2 four"]
    assert choice.example(c, first, row("decoder"), TOKENS, RNG)["at"].tolist() == [5, 8, 5]


def test_a_long_context_keeps_what_is_next_to_the_choice(file):
    c = choice.infer_from_data(choice.Config(), [file])
    [first, *_], notes = choice.read(c, file, row(seq_len=9), TOKENS)
    assert bytes(first["texts"][1]["ids"][1:3]) == b"+2" and len(first["texts"][1]["ids"]) == 9
    assert bytes(first["texts"][0]["ids"][1:4]) == b"2+2" and "2 of 3 contexts lose their beginning" in notes[0]


def test_settings(file):
    with pytest.raises(ValueError, match=r"a\.jsonl:1: 3 choices; raise objective\.most from 2"):
        choice.read(choice.Config(most=2), file, row(), TOKENS)
    with pytest.raises(ValueError, match=r"objective\.choices: names no column"):
        choice.check(choice.Config(choices=()), TOKENS)


def make(c: choice.Config, family=bert, mesh: config.Mesh | None = None, **more) -> tuple[Model, dict]:
    shape = dict(vocab=264, layers=1, width=16, heads=2, ffn=24, positions=24)
    shape |= dict(head=False) if family is bert else dict(kv_heads=2, head_width=8)
    model = family.Config(**shape | more)
    specs = family.specs(model) | choice.specs(c, 16)
    layout = Layout.of(mesh or config.Mesh(), config.Execution("float32"))
    return Model(family, model, specs, layout), random_weights(specs)


def batch_of(c: choice.Config, file: str, kind: str, n: int = 8) -> dict:
    items, _ = choice.read(c, file, row(kind), TOKENS)
    rows = [choice.example(c, item, row(kind), TOKENS, RNG) for item in (items * n)[:n]]
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}


@pytest.mark.parametrize(("family", "pooler"), [(bert, True), (bert, False), (llama, None)])
def test_the_loss_by_hand_and_padding_does_not_count(file, family, pooler):
    c = choice.infer_from_data(choice.Config(dropout=0.0), [file])
    model, weights = make(c, family, **({} if pooler is None else dict(pooler=pooler)))
    loss = jax.jit(lambda w, b: choice.loss(c, model, w, b, None)["questions"])
    forward = jax.jit(lambda w, b: model.forward(w, b).x_BTD)
    batch = batch_of(c, file, model.family.kind)
    expected, right = [], 0
    for b in range(8):
        z = []
        for n in range(batch["choice_mask"][b].sum()):
            given = {k: batch[k][b, n][None] for k in ("tokens", "segments", "positions")}
            given |= dict(types=batch["types"][b, n][None]) if family is bert else {}
            x_BTD = forward(weights, given)
            x_D = model.pooled(weights, x_BTD)[0] if pooler else x_BTD[0, batch["at"][b, n]]
            z.append(float((np.asarray(x_D) @ np.asarray(weights["choice"]))[0]))
        target = int(batch["target"][b].argmax())
        expected.append(np.log(np.exp(z).sum()) - z[target])
        right += int(np.argmax(z)) == target
    got = loss(weights, batch)
    np.testing.assert_allclose(got["loss"], sum(expected), rtol=1e-5)
    assert float(got["accuracy"]) == right
    short = {k: v[0] for k, v in packing.trim_padding({k: v[None] for k, v in batch.items()}, 4).items()}
    assert short["tokens"].shape == (8, 3, 12)
    np.testing.assert_allclose(loss(weights, short)["loss"], sum(expected), rtol=1e-5)
    half = {k: np.concatenate([v[:4], np.zeros_like(v[4:])]) for k, v in batch.items()}
    np.testing.assert_allclose(loss(weights, half)["loss"], sum(expected[:4]), rtol=1e-5)
    assert float(choice.totals(half)["questions"]) == 4


@pytest.mark.parametrize("family", [bert, pytest.param(llama, marks=pytest.mark.slow)])
@pytest.mark.parametrize("axes", MESHES)
def test_a_mesh_gives_the_same(file, family, axes):
    c = choice.infer_from_data(choice.Config(dropout=0.0), [file])
    model, weights = make(c, family)
    batch = batch_of(c, file, model.family.kind)

    def value(model, weights, batch):
        return choice.loss(c, model, weights, batch, None)["questions"]["loss"]

    expected = jax.jit(jax.value_and_grad(functools.partial(value, model)))(weights, batch)
    mesh = config.Mesh(**axes, axis_type="explicit")
    (there, _), made = make(c, family, mesh), make_mesh(mesh)
    with on_mesh(made):
        placed = jax.device_put(weights, there.shard.shardings(there.specs, made))
        home = {k: NamedSharding(made, there.shard.spec(("batch",))) for k in batch}
        got = jax.jit(jax.value_and_grad(functools.partial(value, there)))(placed, jax.device_put(batch, home))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), jax.device_get(got[1]), expected[1])
    assert float(np.abs(expected[1]["blocks"]["q"]).max()) > 0


CONFIG = """
from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import bert
from jaxlm.objectives import choice

def config():
    return Run("r", bert.Config(vocab=264, layers=1, width=32, heads=2, ffn=64, positions=32), choice.Config(),
               data=Data(train=({many!r},), valid=({file!r},), tokenizer="bytes"), optim=Optim(lr=1e-2, warmup=1),
               train=Train(steps=30, batch_size=16, seq_len=32, prompts=(), metric="accuracy"),
               execution=Execution("float32"), out={out!r})
"""


def test_from_the_command_line_to_a_report(file, one_device, tmp_path, capsys, monkeypatch):
    many = tmp_path / "many.jsonl"  # few records are slow to shuffle
    many.write_text("\n".join(map(json.dumps, ROWS * 40)))
    (tmp_path / "c.py").write_text(CONFIG.format(many=str(many), file=file, out=str(tmp_path)))
    assert cli.main(["train", str(tmp_path / "c.py"), "--optim.freeze", "^position$"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "r"), "--data", file, "--json"]) == 0
    printed, shown = capsys.readouterr()
    assert json.loads(printed)["accuracy"] == 1 and "chosen" in shown
    unanswered = [json.dumps({k: v for k, v in row.items() if k != "answer"}) for row in ROWS]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(unanswered)))
    assert cli.main(["predict", str(tmp_path / "r")]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["choice"] for row in told] == [1, 0, 0] and [len(row["probabilities"]) for row in told] == [3, 2, 3]
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS[0] | dict(answer=7)))
    assert cli.main(["eval", str(tmp_path / "r"), "--data", str(tmp_path / "b.jsonl")]) == 2
    assert "b.jsonl:1: answer '7' is none of the 3 choices" in capsys.readouterr().err
