"""Losses of preferences and their gradients equal those of plain formulas over all logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config, spec, tree
from jaxlm.models import llama
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.layout import Layout
from jaxlm.objectives import preference
from jaxlm.objectives.objective import RowShape
from jaxlm.runtime.mesh import NamedSharding, make_mesh, on_mesh
from jaxlm.training import step

V, T, B = 32, 24, 4
ONE = config.Mesh()
METHODS = ["dpo", "ipo", "kto", "orpo"]


def make(mesh: config.Mesh = ONE) -> tuple[Model, dict]:
    c = llama.Config(vocab=V, layers=1, width=16, heads=2, kv_heads=2, head_width=8, ffn=24)
    layout = Layout.of(mesh, config.Execution(dtype="float32", loss_chunk=8))
    specs = llama.specs(c)
    return Model(llama, c, specs, layout), jax.tree.map(lambda w: 2 * w, spec.init(specs, jax.random.key(0)))


def rows(method: str, n: int = B) -> tuple[dict, list]:
    """A batch, and its answers as (ids, where the answer begins)."""
    rng, out, texts = np.random.default_rng(0), [], []
    for _ in range(n):
        prompt = rng.integers(0, V, 3).tolist()
        answers = [rng.integers(0, V, k).tolist() for k in (3, 2, 4)[: 3 if method == "kto" else 2]]
        texts.append([([*prompt, *a], 3) for a in answers])
        record = dict(texts=texts[-1], reference=rng.normal(-8, 1, len(answers)))
        out.append(preference.example(preference.Config(), record, RowShape(T), None, rng))
    return {name: np.stack([r[name] for r in out]) for name in out[0]}, texts


def by_hand(c: preference.Config, model: Model, weights: dict, batch: dict, texts: list) -> jax.Array:
    """From the logits of each answer alone."""
    total = jnp.zeros(())
    found = []
    for pair in texts:
        logs, counts = [], []
        for ids, begin in pair:
            x = np.array([ids[:-1]])
            out = model.forward(weights, dict(tokens=x, positions=np.arange(x.shape[1])[None]))
            p_TV = jax.nn.log_softmax(losses.logits(model.readout(weights, out.x_BTD), model.shard)[0], -1)
            logs.append(p_TV[np.arange(len(ids) - 1), np.array(ids[1:])][begin - 1 :].sum())
            counts.append(len(ids) - begin)
        found.append((logs, counts))
    gains = [[a - r for a, r in zip(logs, row, strict=True)] for (logs, _), row in zip(found, batch["reference"])]  # noqa: B905
    drift = jax.lax.stop_gradient(jnp.maximum(0.0, sum(g[-1] for g in gains) / len(gains)))
    for (logs, counts), gain in zip(found, gains, strict=True):
        mean = [a / n for a, n in zip(logs, counts, strict=True)]
        if c.method == "dpo":
            m = c.beta * (gain[0] - gain[1])
            total += -0.9 * jnp.log(jax.nn.sigmoid(m)) - 0.1 * jnp.log(jax.nn.sigmoid(-m)) - c.sft * mean[0]
        elif c.method == "ipo":
            total += (gain[0] / counts[0] - gain[1] / counts[1] - 1 / (2 * c.beta)) ** 2 - c.sft * mean[0]
        elif c.method == "kto":
            good, bad = jax.nn.sigmoid(c.beta * (gain[0] - drift)), jax.nn.sigmoid(c.beta * (drift - gain[1]))
            total += 1 - (good + bad) / 2 - c.sft * mean[0]
        else:
            odds = [m - jnp.log(1 - jnp.exp(m)) for m in mean]
            total += -mean[0] - c.beta * jnp.log(jax.nn.sigmoid(odds[0] - odds[1]))
    return total


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_of_plain_formulas(method):
    model, weights = make()
    c = preference.Config(method=method, beta=0.3, label_smoothing=0.1, sft=0.5)
    batch, texts = rows(method)
    ours = jax.jit(jax.value_and_grad(lambda w: preference.loss(c, model, w, batch, None)["pairs"]["loss"]))(weights)
    theirs = jax.value_and_grad(lambda w: by_hand(c, model, w, batch, texts))(weights)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=2e-5)
    for (path, a), b in zip(tree.flatten(ours[1]).items(), tree.flatten(theirs[1]).values(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max() + 1), err_msg=path)


def test_the_reference_is_what_the_model_finds_at_first():
    """Then no answer has gained anything: the loss is log 2."""
    model, weights = make()
    c, (batch, _) = preference.Config(), rows("dpo")
    batch["reference"] = np.asarray(preference.reference(c, model, weights, batch))
    sums = preference.loss(c, model, weights, batch, None)["pairs"]
    np.testing.assert_allclose(sums["loss"], B * np.log(2), rtol=1e-6)
    assert float(np.abs(sums["margin"])) < 1e-5


@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
def test_a_mesh_and_micro_batches_give_the_same(axis_type):
    model, weights = make()
    batch, _ = rows("dpo", 8)
    loss = lambda model: functools.partial(preference.loss, preference.Config(), model)  # noqa: E731
    expected = jax.value_and_grad(lambda w: loss(model)(w, batch, None)["pairs"]["loss"])(weights)
    halves = [{k: v[i : i + 4] for k, v in batch.items()} for i in (0, 4)]
    parts = [float(loss(model)(weights, half, None)["pairs"]["loss"]) for half in halves]
    np.testing.assert_allclose(sum(parts), expected[0], rtol=1e-5)
    c = config.Mesh(data=2, fsdp=2, tensor=2, axis_type=axis_type)
    mesh, (there, _) = make_mesh(c), make(c)
    homes = there.shard.shardings(there.specs, mesh)
    with on_mesh(mesh):
        placed = jax.device_put(weights, homes)
        rows_home = {k: NamedSharding(mesh, there.shard.spec(("batch", None))) for k in batch}
        got = jax.jit(jax.value_and_grad(lambda w, b: loss(there)(w, b, None)["pairs"]["loss"]))(
            placed, jax.device_put(batch, rows_home)
        )
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), jax.device_get(got[1]), expected[1])


def test_rows_too_long_lose_the_beginning_of_the_prompt_and_empty_rows_weigh_nothing():
    record = dict(texts=[(list(range(1, 21)), 15), (list(range(1, 9)), 5)], reference=[0.0, 0.0])
    row = preference.example(preference.Config(), record, RowShape(16), None, np.random.default_rng(0))
    assert row["tokens"][:8].tolist() == list(range(12, 20)) and row["targets"][7] == 20
    assert row["weights"][:8].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    model, weights = make()
    batch = {k: np.stack([v, np.zeros_like(v)]) for k, v in row.items()}
    alone = {k: v[:1] for k, v in batch.items()}
    both, one = (preference.loss(preference.Config(), model, weights, b, None)["pairs"]["loss"] for b in (batch, alone))
    np.testing.assert_allclose(both, one, rtol=1e-6)
    assert float(preference.totals(batch)["pairs"]) == 1


@pytest.mark.parametrize(("change", "why"), [(dict(beta=0.0), "beta"), (dict(label_smoothing=0.6), "label_smoothing")])
def test_settings(change, why):
    with pytest.raises(ValueError, match=f"objective.{why}"):
        preference.check(dataclasses.replace(preference.Config(), **change), None)


def test_training_prefers():
    model, weights = make()
    c, (batch, _) = preference.Config(beta=0.5), rows("dpo")
    batch["reference"] = np.asarray(preference.reference(c, model, weights, batch))
    from jaxlm.training import optimizers

    tx = optimizers.make(config.Optim(lr=1e-2, warmup=1), 20, model.specs)
    update = jax.jit(step.make_train_step(functools.partial(preference.loss, c, model), preference.totals, tx, seed=0,
                                          clip=1.0, ema=0.0))  # fmt: skip
    state = step.start(weights, jax.tree.map(lambda w: None, weights), tx, False)
    for _ in range(8):
        state, metrics = update(state, jax.tree.map(lambda x: x[None], batch))
    assert metrics["accuracy"] == 1.0 and metrics["loss"] < 0.5
