"""How far a model has moved on the inputs of its new task, from what is stored of the model before."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.continual_runs import MODELS

from jaxlm.assembly import corpus, earlier, kl_meter
from jaxlm.assembly import program as programs
from jaxlm.core import config
from jaxlm.core.continual import Continual
from jaxlm.data.tokenizer import Bytes
from jaxlm.nn.layout import Layout
from jaxlm.objectives import outputs
from jaxlm.runtime import mesh

ALONE = Layout()


def made(kind: str, folder, continual: Continual, start: str = "before") -> programs.Program:
    """The program of a run after a task of its own kind and on the same data."""
    folder.mkdir(parents=True, exist_ok=True)
    file, words = folder / "new.jsonl", [f"{i * i} words" for i in range(60)]
    rows = [{"text": w, "label": "yes" if "1" in w else "no", "source": w, "target": w[::-1]} for w in words]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, objective = MODELS[kind]
    run = config.Run(
        name=kind, out=str(folder), model=model, objective=objective, start=start, continual=continual,
        data=config.Data((str(file),), tokenizer="bytes", cache=str(folder / "cache"), tokenize_workers=0, holdout=0.3),
        optim=config.Optim(warmup=0), execution=config.Execution(dtype="float32"),
        train=config.Train(steps=4, batch_size=16, seq_len=32, prompts=(), eval_every=0, save_every=0),
    )  # fmt: skip
    run.folder.mkdir(exist_ok=True)
    before = [earlier.Task("old", objective, 32, own_head=False)] if continual.methods else []
    return programs.program(run, Bytes(), None, before)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "value"])
def test_stored_predictions_give_the_divergence_or_less(kind):
    """All of it where every class is stored; else no more, as some classes count as one."""
    a, b = jax.random.split(jax.random.key(0))
    before, now = (outputs.Predicted(3 * jax.random.normal(k, (2, 5, 9)), jnp.ones((2, 5)), kind) for k in (a, b))
    exact = outputs.divergence(before, now, outputs.Measure(), ALONE)
    found = {k: outputs.divergence_from(outputs.stored(before, k, ALONE), now, ALONE) for k in (1, 4, 8, 9, 64)}
    for k in (8, 9, 64):
        np.testing.assert_allclose(found[k], exact, rtol=1e-4, atol=1e-5)
    if kind == "softmax":
        assert (found[1] >= 0).all() and (found[1] < found[4]).all() and (found[4] < exact).all()
    same = outputs.divergence_from(outputs.stored(before, 4, ALONE), before, ALONE)
    np.testing.assert_allclose(same, 0, atol=1e-6)


@pytest.mark.parametrize("kind", ["decoder", "encoder", pytest.param("encoder_decoder", marks=pytest.mark.slow)])
def test_the_meter_is_the_mean_divergence_on_new_rows(kind, tmp_path, monkeypatch):
    """On eight devices and on one: as by hand from both models' predictions of the same rows."""
    monkeypatch.setattr(kl_meter, "TOP", 512)
    found = {}
    for devices in (8, 1) if kind == "decoder" else (1,):
        with mesh.on_devices(jax.devices()[:devices]):
            p = made(kind, tmp_path, Continual(("lwf",), kl_rows=7))
            data = corpus.corpus(p.run.data, p.objective, ["valid", "train"])
            with mesh.on_mesh(p.mesh):
                weights = p.init().all_params
                measure = kl_meter.meter(p, data, weights)
                now = jax.tree.map(lambda w: 1.5 * w, weights)
                assert abs(measure(weights)[kl_meter.NAME]) < 1e-6
                found[devices] = measure(now)[kl_meter.NAME]
                assert kl_meter.meter(p, data, None)(now)[kl_meter.NAME] == found[devices], "as of a run that goes on"
    [(_, batch, _), *more] = kl_meter._batches(p, data)
    rows = {name: jnp.asarray(leaf[0]) for name, leaf in batch.items()}
    both = [p.objective.outputs(p.model, w, rows) for w in (weights, now)]
    apart = outputs.divergence(*both, outputs.Measure(), p.model.shard)
    by_hand = float(outputs.total(apart, both[0]) / both[0].weights_BN.sum())
    assert not more and by_hand > 1e-5
    for value in found.values():
        assert value == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize(
    "kind", ["decoder", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(MODELS)[1:])]
)
def test_a_step_runs_the_model_once_on_rows_that_it_compares(kind, tmp_path, one_device, monkeypatch):
    """Losses and gradients stay what they are, for fewer floating-point operations; not where there is dropout."""
    p = made(kind, tmp_path, Continual(("lwf", "features")))
    weights = p.init().all_params
    teacher = jax.tree.map(lambda w: 0.9 * w, weights)
    record = corpus.as_records(p.objective, corpus.corpus(p.run.data, p.objective, ["train"]).train[0],
                               document_mask=True, seed=0)[0]  # fmt: skip
    row = p.objective.example(record, np.random.default_rng(0))
    batch = {name: jnp.asarray(leaf)[None] for name, leaf in row.items()}

    def loss(weights):
        [sums] = p.loss(weights, batch, jax.random.key(0), {"teacher": teacher}).values()
        return sums["loss"], sums

    found, work = [], []
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(programs.Program, "draws_nothing", False)
        lowered = jax.jit(jax.grad(loss, has_aux=True)).lower(weights)
        compiled = lowered.compile()
        found.append(jax.device_get(compiled(weights)))
        work.append(compiled.cost_analysis()["flops"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *found)
    assert float(found[0][1]["lwf"]) > 0 and work[0] < 0.9 * work[1]
    monkeypatch.undo()
    assert p.draws_nothing
    model = dataclasses.replace(p.run.model, dropout=0.1)
    assert not dataclasses.replace(p, run=dataclasses.replace(p.run, model=model)).draws_nothing


def test_runs_that_do_not_ask_measure_nothing(tmp_path, one_device):
    asking, without_rows = Continual(heads=True), Continual(heads=True, kl_rows=0)
    programs = [made("decoder", tmp_path, asking), made("decoder", tmp_path, Continual()),
                made("decoder", tmp_path, without_rows), made("decoder", tmp_path, asking, start=""),
                made("encoder", tmp_path, asking)]  # fmt: skip
    assert [bool(kl_meter.compared(p)) for p in programs] == [True, False, False, False, False]
    for p in programs[1:]:
        assert (
            kl_meter.meter(p, corpus.Corpus([], [], []), {})({}) == {} and not (p.run.folder / kl_meter.FILE).exists()
        )
