"""Losses of preferences and their gradients equal those of plain formulas over all logits."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_models import random_weights

from jaxlm.core import config, tree
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
    return Model(llama, c, specs, layout), random_weights(specs)


PLAIN = preference.Config()


@functools.cache
def jitted(c: preference.Config = PLAIN) -> tuple[Any, Any]:
    """The loss with its gradient, and the reference, as functions of (weights, batch) that compile once a shape."""
    model, _ = make()

    def loss(weights: dict, batch: dict) -> tuple[jax.Array, dict]:
        sums = preference.loss(c, model, weights, batch, None)["pairs"]
        return sums["loss"], sums

    return jax.jit(jax.value_and_grad(loss, has_aux=True)), jax.jit(functools.partial(preference.reference, c, model))


def rows(method: str, n: int = B) -> tuple[dict, list]:
    """A batch, and its answers as (ids, where the answer begins): all methods' are the first ones of KTO's."""
    rng, out, texts = np.random.default_rng(0), [], []
    for _ in range(n):
        prompt = rng.integers(0, V, 3).tolist()
        answers = [rng.integers(0, V, k).tolist() for k in (3, 2, 4)][: 3 if method == "kto" else 2]
        texts.append([([*prompt, *a], 3) for a in answers])
        record = dict(texts=texts[-1], reference=rng.normal(-8, 1, 3)[: len(answers)])
        out.append(preference.example(preference.Config(), record, RowShape(T), None, rng))
    return {name: np.stack([r[name] for r in out]) for name in out[0]}, texts


@functools.cache
def logs_alone() -> tuple[np.ndarray, dict]:
    """The log probability of each answer `[pairs, answers]` from its logits in a row of its own, and its Jacobian."""
    model, weights = make()
    texts = [text for several in rows("kto")[1] for text in several]
    longest = max(len(ids) for ids, _ in texts)
    ids_AT = np.array([ids + [0] * (longest - len(ids)) for ids, _ in texts])  # no token sees what is behind it
    answer_AT = np.array([[begin <= t < len(ids) for t in range(1, longest)] for ids, begin in texts])
    positions_AT = np.broadcast_to(np.arange(longest - 1), answer_AT.shape)

    def logs(weights: dict) -> jax.Array:
        x_ATD = model.forward(weights, dict(tokens=ids_AT[:, :-1], positions=positions_AT)).x_BTD
        p_ATV = jax.nn.log_softmax(losses.logits(model.readout(weights, x_ATD), model.shard), -1)
        p_AT = jnp.take_along_axis(p_ATV, ids_AT[:, 1:, None], -1)[..., 0]
        return (p_AT * answer_AT).sum(-1).reshape(B, -1)

    found, jacobian = jax.jit(lambda w: (logs(w), jax.jacrev(logs)(w)))(weights)
    return np.asarray(found), jacobian


def by_hand(c: preference.Config, logs_BN: jax.Array, reference_BN: np.ndarray, texts: list) -> jax.Array:
    """From the log probability of each answer."""
    total = jnp.zeros(())
    found = [(list(logs), [len(ids) - begin for ids, begin in pair]) for logs, pair in zip(logs_BN, texts, strict=True)]
    gains = [[a - r for a, r in zip(logs, row)] for (logs, _), row in zip(found, reference_BN)]  # noqa: B905
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
    _, weights = make()
    c = preference.Config(method=method, beta=0.3, label_smoothing=0.1, sft=0.5)
    batch, texts = rows(method)
    (loss, _), gradient = jitted(c)[0](weights, batch)
    logs_BN, jacobian = logs_alone()
    plain = jax.jit(jax.value_and_grad(lambda logs_BN: by_hand(c, logs_BN, batch["reference"], texts)))
    expected, slope_BN = plain(logs_BN[:, : len(texts[0])])
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    for (path, a), of_logs in zip(tree.flatten(gradient).items(), tree.flatten(jacobian).values(), strict=True):
        b = np.tensordot(slope_BN, of_logs[:, : len(texts[0])], 2)
        np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max() + 1), err_msg=path)


def test_what_a_router_adds_to_the_loss_is_part_of_it():
    """Of each pair once; rows of padding add nothing."""
    real, weights = make()
    aux_B = 0.1 * np.arange(1.0, B + 2, dtype=np.float32)
    batch, _ = rows("dpo")
    batch = {name: np.concatenate([x, np.zeros_like(x[:1])]) for name, x in batch.items()}

    def pairs(aux_B):
        model = SimpleNamespace(
            forward=lambda *args, **more: real.forward(*args, **more).replace(aux_B=aux_B),
            readout=real.readout, shard=real.shard,
        )  # fmt: skip
        return preference.loss(preference.Config(), model, weights, batch, None)["pairs"]

    with_router, without = jax.jit(lambda: (pairs(jnp.asarray(aux_B)), pairs(None)))()
    np.testing.assert_allclose(with_router["aux"], aux_B[:B].sum(), rtol=1e-6)
    np.testing.assert_allclose(with_router["loss"] - without["loss"], aux_B[:B].sum(), rtol=1e-5)


def test_the_reference_is_what_the_model_finds_at_first():
    """Then no answer has gained anything: the loss is log 2."""
    (loss, reference), (_, weights) = jitted(), make()
    batch, _ = rows("dpo")
    batch["reference"] = np.asarray(reference(weights, batch))
    (_, sums), _ = loss(weights, batch)
    np.testing.assert_allclose(sums["loss"], B * np.log(2), rtol=1e-6)
    assert float(np.abs(sums["margin"])) < 1e-5


@pytest.mark.parametrize("axis_type", [pytest.param("auto", marks=pytest.mark.slow), "explicit"])
def test_a_mesh_and_micro_batches_give_the_same(axis_type):
    (loss, _), (_, weights) = jitted(), make()
    batch, _ = rows("dpo", 8)
    halves = [loss(weights, {k: v[i : i + 4] for k, v in batch.items()}) for i in (0, 4)]
    expected = sum(float(half[0][0]) for half in halves), jax.tree.map(np.add, halves[0][1], halves[1][1])
    c = config.Mesh(data=2, fsdp=2, tensor=2, axis_type=axis_type)
    mesh, (there, _) = make_mesh(c), make(c)
    homes = there.shard.shardings(there.specs, mesh)
    with on_mesh(mesh):
        placed = jax.device_put(weights, homes)
        rows_home = {k: NamedSharding(mesh, there.shard.spec(("batch", None)[: v.ndim])) for k, v in batch.items()}
        whole = lambda w, b: preference.loss(preference.Config(), there, w, b, None)["pairs"]["loss"]  # noqa: E731
        got = jax.jit(jax.value_and_grad(whole))(placed, jax.device_put(batch, rows_home))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), jax.device_get(got[1]), expected[1])


def test_rows_too_long_lose_the_beginning_of_the_prompt_and_empty_rows_weigh_nothing():
    record = dict(texts=[(list(range(1, 29)), 23), (list(range(1, 9)), 5)], reference=[0.0, 0.0])
    row = preference.example(preference.Config(), record, RowShape(T), None, np.random.default_rng(0))
    assert row["tokens"][:12].tolist() == list(range(16, 28)) and row["targets"][11] == 28
    assert row["weights"][:12].tolist() == [0] * 7 + [1] * 5
    (loss, _), (_, weights) = jitted(), make()
    one = {k: np.stack([v, *[np.zeros_like(v)] * 3]) for k, v in row.items()}
    four = {k: np.stack([v] * 4) for k, v in row.items()}
    (once, _), _ = loss(weights, one)
    (all_four, _), _ = loss(weights, four)
    np.testing.assert_allclose(4 * once, all_four, rtol=1e-6)
    assert float(preference.totals(one)["pairs"]) == 1


@pytest.mark.parametrize("answers", [1, 2])
def test_answers_share_one_prompt_and_lose_their_ends(answers):
    """The preferred answer is short, the other one long: both keep the same prompt."""
    prompt, good, bad = list(range(1, 9)), [9, 10], list(range(11, 31))
    texts = [([*prompt, *answer], len(prompt)) for answer in ((good, bad), (bad, good))[answers - 1]]
    row = preference.example(
        PLAIN, dict(texts=texts, reference=[0.0, 0.0]), RowShape(T), None, np.random.default_rng(0)
    )
    for segment, answer in ((answers, good), (3 - answers, bad)):
        mine = row["segments"] == segment
        ids = [*row["tokens"][mine].tolist(), row["targets"][mine][-1]]
        assert ids == [*prompt[1:], *answer[:6]], "12 targets: of 13 tokens an answer may have half"
        assert row["targets"][mine & (row["weights"] > 0)].tolist() == answer[:6]


@pytest.mark.parametrize(("change", "why"), [(dict(beta=0.0), "beta"), (dict(label_smoothing=0.6), "label_smoothing")])
def test_settings(change, why):
    with pytest.raises(ValueError, match=f"objective.{why}"):
        preference.check(dataclasses.replace(preference.Config(), **change), None)


def test_training_prefers():
    model, weights = make()
    c, (batch, _) = preference.Config(beta=0.5), rows("dpo")
    batch["reference"] = np.asarray(jitted()[1](weights, batch))
    from jaxlm.training import optimizers

    tx = optimizers.make(config.Optim(lr=1e-2, warmup=1), 20, model.specs)
    update = jax.jit(step.make_train_step(functools.partial(preference.loss, c, model), preference.totals, tx, seed=0,
                                          clip=1.0, ema=0.0))  # fmt: skip
    state = step.start(weights, jax.tree.map(lambda w: None, weights), tx, False)
    for _ in range(8):
        state, metrics = update(state, jax.tree.map(lambda x: x[None], batch))
    assert metrics["accuracy"] == 1.0 and metrics["loss"] < 0.5
