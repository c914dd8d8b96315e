"""What holds for every objective of the table: rows of one shape, losses that are sums, weights that are learned."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.assembly import corpus
from jaxlm.assembly.run_objective import BoundObjective, bind, row_shape
from jaxlm.core import config, spec
from jaxlm.core.batch import Batch
from jaxlm.data.tokenizer import Bytes
from jaxlm.models import MODELS, bert, llama, t5
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.objectives import OBJECTIVES

T, WIDTH, ROWS = 32, 16, 4
SMALL = {
    "decoder": llama.Config(vocab=384, layers=1, width=WIDTH, heads=2, kv_heads=1, head_width=8, ffn=16),
    "encoder": bert.Config(vocab=384, layers=1, width=WIDTH, heads=2, ffn=16, positions=T, dropout=0.0),
    "encoder_decoder": t5.Config(vocab=384, layers=1, width=WIDTH, heads=2, head_width=8, ffn=16),
}
ANIMALS = ("dog", "cat", "owl", "fox", "hen", "bee")
TEXTS = [dict(text=f"the {a} sees {b} and {a}s " * 3, source=f"a {a}", target=f"{b}!") for a in ANIMALS for b in "xyz"]
LABELLED = [dict(text=f"a {a}", label=a[0] in "doc") for a in ANIMALS]
CHATS = [dict(question=f"a {a}?", answer="yes " * i) for i, a in enumerate(ANIMALS, 1)]
PREFERENCES = [dict(prompt=f"{a}?", chosen=f"a {a}", rejected="no") for a in ANIMALS]
QUESTIONS = [dict(question="who?", context=f"it is {a}", answers=[dict(text=a, answer_start=6)]) for a in ANIMALS]
CHOICES = [dict(context=a, choices=["is", "was"], answer=i % 2) for i, a in enumerate(ANIMALS)]
RELATED = [dict(text=f"<e1>{a}</e1> or <e2>me</e2>", label=str(i % 2)) for i, a in enumerate(ANIMALS)]
LINES = {
    "sft": CHATS, "preference": PREFERENCES, "classify": LABELLED, "answer": QUESTIONS, "choice": CHOICES,
    "relate": RELATED,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {"infill": dict(sentinels=("<cls>", "<sep>", "<mask>"))}


def bound(name: str, file: Path) -> BoundObjective:
    """The objective with settings for these texts, and without dropout."""
    objective = OBJECTIVES[name]
    settings = objective.infer_from_data(objective.Config(**SETTINGS.get(name, {})), [str(file)])
    if "dropout" in {f.name for f in dataclasses.fields(settings)}:
        settings = dataclasses.replace(settings, dropout=0.0)
    out = bind(settings, Bytes(), row_shape(T, SMALL[objective.models[0]]))
    out.check()
    return out


@pytest.fixture(params=OBJECTIVES)
def objective(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[BoundObjective, Any]:
    """(bound, records of a small file)."""
    name = request.param
    file = tmp_path / ("words.txt" if name == "tag" else "lines.jsonl")
    if name == "tag":
        file.write_text("".join(f"a O\n{animal} B-X\n\n" for animal in ANIMALS))
    else:
        file.write_text("".join(json.dumps(line) + "\n" for line in LINES.get(name, TEXTS)))
    out = bound(name, file)
    data = config.Data(train=(str(file),), valid=(str(file),), cache=str(tmp_path / "cache"), tokenize_workers=1)
    return out, corpus.as_records(out, corpus.corpus(data, out).train[0], document_mask=True, seed=0)


def examples(objective: BoundObjective, records: Any) -> list[dict[str, np.ndarray]]:
    rngs = [np.random.default_rng(i) for i in range(ROWS)]
    return [dict(objective.example(records[i % len(records)], rng)) for i, rng in enumerate(rngs)]


def stacked(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_rows_have_one_shape_and_only_keys_that_are_documented(objective):
    task, records = objective
    shapes = [{name: (x.shape, x.dtype) for name, x in row.items()} for row in examples(task, records)]
    assert all(shape == shapes[0] for shape in shapes)
    assert set(shapes[0]) <= set(Batch.__annotations__)
    assert {x.dtype.name for x in examples(task, records)[0].values()} <= {"int32", "float32", "bool"}


def test_a_worker_makes_the_same_rows(objective):
    task, records = objective
    jax.tree.map(np.testing.assert_array_equal, examples(pickle.loads(pickle.dumps(task)), records),
                 examples(task, records))  # fmt: skip


def test_losses_and_totals_of_a_batch_are_the_sums_over_its_parts_and_padding_adds_nothing(objective):
    task, records = objective
    family, c = MODELS.of(SMALL[task.objective.models[0]]), SMALL[task.objective.models[0]]
    heads = task.specs(WIDTH)
    specs = family.specs(c) | heads
    model = Model(family, c, specs, Layout(execution=config.Execution(dtype="float32", scan=True)))
    rng = np.random.default_rng(5)
    weights = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32) / 4, specs, is_leaf=spec.is_spec)

    @jax.jit
    def step(weights: Any, batch: Any) -> Any:
        def value(own: Any) -> Any:
            sums = task.loss(model, weights | own, batch, None)
            return sum(values["loss"] for values in sums.values()), (sums, task.totals(batch))

        (_, aux), gradients = jax.value_and_grad(value, has_aux=True)({name: weights[name] for name in heads})
        return *aux, gradients

    rows = examples(task, records)
    sums, totals, gradients = step(weights, stacked(rows))
    assert set(sums) == set(totals) and all("loss" in values for values in sums.values())
    assert all(np.isfinite(x) for x in jax.tree.leaves(sums)) and all(float(x) > 0 for x in totals.values())
    assert all(np.abs(gradients[name]).max() > 0 for name in heads), "weights of its own are learned"
    blank = {name: np.zeros_like(x) for name, x in rows[0].items()}
    parts = [step(weights, stacked([row, blank, blank, blank]))[:2] for row in rows]
    added = jax.tree.map(lambda *x: sum(map(float, x)), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), (sums, totals), added)


def test_the_shapes_of_added_weights_follow_the_models_width(objective):
    task, _ = objective
    small, large = task.specs(WIDTH), task.specs(2 * WIDTH)
    assert small.keys() == large.keys()
    for name, s in small.items():
        assert len(s.shape) == len(s.axes)
        scaled = tuple(n * (2 if axis == "embed" else 1) for n, axis in zip(s.shape, s.axes, strict=True))
        assert large[name].shape == scaled, name


def test_prompts_are_token_ids_and_an_encoder_decoder_reads_a_source(objective):
    task, _ = objective
    prompts, sources = task.prompts(["a dog", "it"])
    assert len(prompts) == 2 and all(isinstance(i, int) for ids in prompts for i in ids)
    assert (sources is not None) == (task.row.kind == "encoder_decoder")
