"""Extractive question answering: windows over long texts, spans back to characters, no answer, SQuAD's figures."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from support.tiny_models import random_weights

from jaxlm.commands import cli
from jaxlm.core import config, config_io
from jaxlm.data.tokenizer import Bytes
from jaxlm.models import bert
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.objectives import answer
from jaxlm.objectives.objective import RowShape
from jaxlm.runtime.mesh import NamedSharding, make_mesh, on_mesh

TOKENS = Bytes()
MESHES = [dict(fsdp=2, context=2, tensor=2), pytest.param(dict(data=4, tensor=2), marks=pytest.mark.slow),
          pytest.param(dict(data=2, fsdp=2, context=2), marks=pytest.mark.slow)]  # fmt: skip
RNG = np.random.default_rng(0)
TEXTS = ["Ann saw Oslo in May", "Bob left Rome at six", "Eve likes 北京 in June"]
PLACES = ["Oslo", "Rome", "北京"]
ROW = RowShape(32, "encoder")


def records(*more: dict) -> str:
    rows = [dict(question="where?", context=text, answers=[dict(text=place, answer_start=text.index(place))])
            for text, place in zip(TEXTS, PLACES, strict=True)]  # fmt: skip
    return "\n".join(json.dumps(row) for row in (*rows, *more))


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "a.jsonl").write_text(records())
    return str(tmp_path / "a.jsonl")


@pytest.fixture
def long(tmp_path: Path) -> str:
    text = "0123456789" * 3
    rows = [dict(question="?", context=text, answers=[dict(text="6789", answer_start=16)]),
            dict(question="no?", context=text, answers=[])]  # fmt: skip
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "long.jsonl")


def test_a_question_and_its_text_with_the_answer_marked(file):
    row = replace(ROW, seq_len=40)
    [first, *_], notes = answer.read(answer.Config(), file, row, TOKENS)
    assert notes == [] and first["ids"] == [
        TOKENS.cls_id,
        *b"where?",
        TOKENS.sep_id,
        *b"Ann saw Oslo in May",
        TOKENS.sep_id,
    ]
    assert first["types"] == [0] * 8 + [1] * 20 and first["target"] == (16, 19)
    row = answer.example(answer.Config(), first, row, TOKENS, RNG)
    assert bytes(row["tokens"][16:20].tolist()) == b"Oslo" and row["target"].tolist() == [16, 19]
    assert np.flatnonzero(row["allowed"]).tolist() == [0, *range(8, 27)]


def test_long_texts_are_read_in_windows_that_overlap(long):
    c = answer.infer_from_data(answer.Config(stride=6), [long])
    assert c.no_answer
    items, notes = answer.read(c, long, replace(ROW, seq_len=14), TOKENS)
    some = [item for item in items if item["where"].endswith(":1")]
    assert "2 of 2 texts are read in several windows" in notes[0]
    assert [bytes(i["ids"][3:-1]).decode() for i in some][:3] == ["0123456789", "6789012345", "2345678901"]
    # Only a window that holds all of the answer learns it; the others learn that there is none.
    assert [i["target"] for i in some] == [(0, 0), (0, 0), (7, 10), (0, 0), (0, 0)]
    own = [[at + 6 * i["window"] for at, mine in enumerate(i["may_begin"]) if mine] for i in some]
    assert sorted(t for row in own for t in row) == list(range(30)), "each token belongs to one window"
    assert own[1] == list(range(8, 14)), "to the one that shows most around it"
    items, notes = answer.read(answer.Config(question_len=1), long, replace(ROW, seq_len=40), TOKENS)
    assert len(items) == 2 and "1 questions lose their end; raise objective.question_len" in notes[0]
    _, notes = answer.read(answer.Config(max_answer=3), long, replace(ROW, seq_len=40), TOKENS)
    assert "1 answers are longer than objective.max_answer" in notes[0]
    with pytest.raises(ValueError, match=r"train\.seq_len: 5 has no room for .*long\.jsonl:2 and its text"):
        answer.read(c, long, replace(ROW, seq_len=5), TOKENS)


def test_answers_that_tokens_leave_out_are_told(file):
    class Deaf(Bytes):
        def encode_offsets(self, text):
            ids, spans = super().encode_offsets(text)
            return [i for i in ids if i < 128], [span for i, span in zip(ids, spans, strict=True) if i < 128]

    items, notes = answer.read(answer.Config(), file, ROW, Deaf())
    assert items[-1]["target"] == (0, 0) and "1 answers have no token" in notes[0]


def scores(item: dict, begin: int, end: int, value: float, none: float = 0.0) -> np.ndarray:
    """That a window's span is found, by its tokens of context."""
    z_T2 = np.full((40, 2), -20.0)
    z_T2[0] = none / 2
    z_T2[item["first"] + begin, 0] = z_T2[item["first"] + end, 1] = value / 2
    return z_T2


def test_spans_go_back_to_characters(file):
    c = answer.Config(no_answer=False)
    items, _ = answer.read(c, file, replace(ROW, seq_len=40), TOKENS)
    true, told = answer.answers(
        c, items, [scores(i, *span, 3.0) for i, span in zip(items, [(8, 11), (9, 12), (10, 15)], strict=True)]
    )
    assert true == [("Oslo",), ("Rome",), ("北京",)] and [several[0].text for several in told] == PLACES
    cut = answer.best(c, items[2:], [scores(items[2], 11, 12, 3.0)])
    assert cut[0].text == "北", "a character whose bytes are found in part is given whole"


def test_the_best_of_all_windows_and_no_answer(long):
    c = answer.Config(stride=6, n_best=3)
    items, _ = answer.read(c, long, replace(ROW, seq_len=14), TOKENS)
    some = items[:5]
    quiet = [scores(i, 0, 0, -30.0) for i in some]
    [top, *rest] = answer.best(c, some, [*quiet[:2], scores(some[2], 4, 7, 3.0), *quiet[3:]])
    assert top == ("6789", 3.0) and rest[0] == ("", 0.0), "its score is above that of no answer"
    assert len(rest) == 3
    shy = answer.best(c, some, [*quiet[:2], scores(some[2], 4, 7, 3.0, none=4.0), *quiet[3:]])
    assert shy[0].text == "6789", "a window's own no answer says nothing of the other windows"
    shy = answer.best(c, some, [scores(i, 4, 7, 3.0, none=4.0) for i in some])
    assert shy[0] == ("", 0.0) and shy[1].score == -1
    bold = answer.Config(stride=6, threshold=1.5)
    assert answer.best(bold, some, [scores(i, 4, 7, 3.0, none=4.0) for i in some])[0].text
    edge = answer.best(c, some, [scores(some[0], 9, 9, 3.0), *quiet[1:]])
    assert edge[0].text == "", "a token at a window's edge belongs to the next window"
    short = answer.best(
        answer.Config(stride=6, max_answer=3), some, [*quiet[:2], scores(some[2], 4, 7, 3.0), *quiet[3:]]
    )
    assert all(len(told.text) <= 3 for told in short)


@pytest.mark.parametrize("name", ["question_len", "stride", "max_answer", "n_best"])
def test_settings(name):
    with pytest.raises(ValueError, match=rf"objective\.{name}: 0 must be at least 1"):
        answer.check(answer.Config(**{name: 0}), TOKENS)


def make(c: answer.Config, mesh: config.Mesh | None = None) -> tuple[Model, dict]:
    shape = bert.Config(vocab=264, layers=1, width=16, heads=2, ffn=24, positions=32, head=False, pooler=False)
    specs = bert.specs(shape) | answer.specs(c, 16)
    layout = Layout.of(mesh or config.Mesh(), config.Execution("float32"))
    return Model(bert, shape, specs, layout), random_weights(specs)


def batch_of(c: answer.Config, file: str, n: int = 8) -> dict:
    items, _ = answer.read(c, file, ROW, TOKENS)
    rows = [answer.example(c, item, ROW, TOKENS, RNG) for item in (items * n)[:n]]
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}


def test_the_loss_by_hand_and_padding_does_not_count(file):
    c = answer.Config(dropout=0.0)
    model, weights = make(c)
    loss = jax.jit(lambda w, b: answer.loss(c, model, w, b, None)["windows"])
    batch = batch_of(c, file)
    x_BTD = jax.jit(lambda w, b: model.forward(w, b).x_BTD)(
        weights, {k: batch[k] for k in ("tokens", "types", "segments", "positions")}
    )
    z_BT2 = np.asarray(x_BTD @ weights["answer"]) + np.asarray(weights["answer_bias"])
    expected, right = np.zeros(8), 0
    for b, (z_T2, allowed, target) in enumerate(zip(z_BT2, batch["allowed"], batch["target"], strict=True)):
        for side in (0, 1):
            z = z_T2[allowed > 0, side]
            expected[b] += (np.log(np.exp(z).sum()) - z_T2[target[side], side]) / 2
        right += all(np.where(allowed > 0, z_T2[:, s], -np.inf).argmax() == target[s] for s in (0, 1))
    got = loss(weights, batch)
    np.testing.assert_allclose(got["loss"], expected.sum(), rtol=1e-5)
    assert float(got["accuracy"]) == right
    half = {k: np.concatenate([v[:4], np.zeros_like(v[4:])]) for k, v in batch.items()}
    np.testing.assert_allclose(loss(weights, half)["loss"], expected[:4].sum(), rtol=1e-5)
    assert float(answer.totals(half)["windows"]) == 4


@pytest.mark.parametrize("axes", MESHES)
def test_a_mesh_gives_the_same(file, axes):
    c = answer.Config(dropout=0.0)
    model, weights = make(c)
    batch = batch_of(c, file)

    def value(model, weights, batch):
        return answer.loss(c, model, weights, batch, None)["windows"]["loss"]

    expected = jax.jit(jax.value_and_grad(functools.partial(value, model)))(weights, batch)
    mesh = config.Mesh(**axes, axis_type="explicit")
    (there, _), made = make(c, mesh), make_mesh(mesh)
    with on_mesh(made):
        placed = jax.device_put(weights, there.shard.shardings(there.specs, made))
        inner = lambda v: ["seq" if n == 32 else None for n in v.shape[1:]]  # noqa: E731
        home = {k: NamedSharding(made, there.shard.spec(("batch", *inner(v)))) for k, v in batch.items()}
        got = jax.jit(jax.value_and_grad(functools.partial(value, there)))(placed, jax.device_put(batch, home))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), jax.device_get(got[1]), expected[1])
    assert float(np.abs(expected[1]["blocks"]["q"]).max()) > 0


CONFIG = """
from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import bert
from jaxlm.objectives import answer

def config():
    return Run("r", bert.Config(vocab=264, layers=1, width=32, heads=2, ffn=64, positions=24, head=False,
               pooler=False), answer.Config(stride=6),
               data=Data(train=({train!r},), valid={valid!r}, tokenizer="bytes", holdout=0.4),
               optim=Optim(lr=1e-2, warmup=1), execution=Execution("float32"), out={out!r},
               train=Train(steps=60, batch_size=16, micro_batches=2, seq_len=24, prompts=(), metric="f1"))
"""


def test_from_the_command_line_to_a_report(file, one_device, tmp_path, capsys):
    Path(file).write_text(records(dict(question="why?", context=TEXTS[0], answers=[])))
    many = tmp_path / "many.jsonl"  # few records are slow to shuffle
    many.write_text((Path(file).read_text() + "\n") * 16)
    (tmp_path / "c.py").write_text(CONFIG.format(train=str(many), valid=(file,), out=str(tmp_path)))
    assert cli.main(["train", str(tmp_path / "c.py"), "--optim.freeze", "^position$"]) == 0
    assert "4 of 4 texts are read in several windows" in capsys.readouterr().out
    assert cli.main(["eval", str(tmp_path / "r"), "--data", file, "--out", str(tmp_path / "out"), "--json"]) == 0
    printed, shown = capsys.readouterr()
    found = json.loads(printed)
    assert found["f1"] == found["hasans_exact"] == found["noans_exact"] == 1 and "with objective.threshold" in shown
    assert found["sizes"]["answers"] == "4 questions"
    kept = [json.loads(line) for line in (tmp_path / "out" / "examples.jsonl").read_text().splitlines()]
    assert [(row["where"], row["true"], row["found"][0][0]) for row in kept[-2:]] == [
        (f"{file}:3", ["北京"], "北京"), (f"{file}:4", [], "")
    ]  # fmt: skip
    assert len(kept[0]["found"]) > 5, "the n best, with how far they are above no answer"
    asked = [json.dumps(dict(question=q, context=TEXTS[0])) for q in ("where?", "why?")]
    assert cli.main(["predict", str(tmp_path / "r"), "--text", asked[0], "--text", asked[1]]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["answer"] for row in told] == ["Oslo", ""]
    assert TEXTS[0][told[0]["start"] : told[0]["end"]] == "Oslo" and told[0]["score"] > 0
    assert cli.main(["predict", str(tmp_path / "r"), "--text", "where?"]) == 2
    assert "input 0: is one text, and this task's inputs have several parts" in capsys.readouterr().err


def test_windows_of_one_text_are_held_out_together(file, tmp_path, capsys):
    from jaxlm.assembly import corpus, open_model
    from jaxlm.assembly.model_source import StartModel

    (tmp_path / "c.py").write_text(CONFIG.format(train=file, valid=(), out=str(tmp_path)))
    run = config_io.load(tmp_path / "c.py")
    data = corpus.corpus(run.data, open_model.bound_objective(run, StartModel(run.start)))
    ([*train], [*valid]) = data.train[0], data.valid[0]
    assert {i["where"] for i in train}.isdisjoint(i["where"] for i in valid) and len(valid) > 1
    assert len({i["where"] for i in valid}) == 1
