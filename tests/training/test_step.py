"""One update: the same however the batch is cut, and none at all where a number isn't finite."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config, spec, tree
from jaxlm.core.spec import Spec, normal, ones, stacked
from jaxlm.models import MODELS, bert, llama
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout, batch_sharding
from jaxlm.objectives import causal, next_sentence
from jaxlm.runtime.mesh import make_mesh, on_mesh, replicated
from jaxlm.training import optimizers, step

B, T, V = 8, 16, 32
LLAMA = llama.Config(vocab=V, layers=1, width=8, heads=2, kv_heads=1, head_width=4, ffn=16)
BERT = bert.Config(vocab=V, layers=1, width=8, heads=2, ffn=16, positions=T, dropout=0.0)
CASES = {
    "causal": (LLAMA, causal.objective, causal.Config(label_smoothing=0.1, z_loss=1e-2), 1.0),
    "two losses": (BERT, next_sentence.objective, next_sentence.Config(), 1.0),
}


def make_batch(name: str) -> dict[str, np.ndarray]:
    """Rows with very unequal numbers of targets: a mean of means would be far off."""
    rng = np.random.default_rng(0)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    batch = {"tokens": tokens, "positions": positions, "segments": np.ones((B, T), np.int32)}
    n = 8 if name == "two losses" else T
    weights = (np.arange(n)[None] < np.array([1, 1, 2, 1, n, n - 1, n, 3])[:, None]).astype(np.float32)
    batch |= {"targets": rng.integers(0, V, (B, n)).astype(np.int32), "weights": weights}
    if name == "two losses":
        batch |= {
            "at": rng.integers(0, T, (B, n)).astype(np.int32),
            "types": (positions > 6).astype(np.int32),
            "is_next": rng.integers(0, 2, B).astype(np.int32),
            "rows": (np.arange(B) != 2).astype(np.float32),
        }
    return batch


def cut(batch: dict, micro: int) -> dict:
    return {k: v.reshape(micro, B // micro, *v.shape[1:]) for k, v in batch.items()}


class Setup:
    """A step of a small model."""

    def __init__(self, name: str = "causal"):
        model_config, self.objective, settings, clip = CASES[name]
        family = MODELS.of(model_config)
        specs = family.specs(model_config) | self.objective.specs(settings, model_config.width)
        layout = Layout(execution=config.Execution(dtype="float32", scan=True))
        model = Model(family, model_config, specs, layout)
        self.loss = lambda p, b, k: self.objective.loss(settings, model, p, b, k)
        # an update in proportion to the gradient: a wrong factor shows, which Adam would hide
        c = config.Optim(name="sgd", lr=0.3, warmup=0, schedule="constant", weight_decay=0.0)
        self.optimizer = optimizers.make(c, 100, specs)
        rng = np.random.default_rng(1)
        weights = tree.map_named(lambda _, s: (rng.standard_normal(s.shape) / 3).astype(np.float32), specs)
        frozen = jax.tree.map(lambda _: None, weights)
        self.state = jax.device_get(jax.jit(lambda w: step.start(w, frozen, self.optimizer, False))(weights))
        f = step.make_train_step(self.loss, self.objective.totals, self.optimizer, seed=0, clip=clip, ema=0.0)
        self.donating_step = jax.jit(f, donate_argnums=0)

    def step(self, state, batch):
        return self.donating_step(jax.device_put(jax.device_get(state)), batch)


setup = functools.cache(Setup)


# ------------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize(("name", "parts"), [("causal", (1, 4)), ("two losses", (1, 2))])
def test_cutting_a_batch_changes_neither_loss_nor_update(name, parts):
    s, batch = setup(name), make_batch(name)
    (one, metrics), *others = (jax.device_get(s.step(s.state, cut(batch, micro))) for micro in parts)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one.params, s.state.params)
    assert max(jax.tree.leaves(moved)) > 1e-3
    for state, again in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), again, metrics)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state.params, one.params)


def test_the_loss_is_the_mean_over_targets_and_not_over_micro_batches():
    s, batch = setup("causal"), make_batch("causal")
    batch["segments"][0, 5:] = 0
    sums = jax.jit(lambda b: s.loss(s.state.all_params, b, None)["tokens"])
    total, whole = batch["weights"].sum(), sums(batch)
    _, metrics = s.step(s.state, cut(batch, 4))
    np.testing.assert_allclose(metrics["loss"], whole["loss"] / total, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], whole["accuracy"] / total, rtol=1e-5)
    assert metrics["weight/tokens"] == total
    assert metrics["tokens"] == B * T - (T - 5), "padding is none"
    assert step.num_tokens({"segments": np.array([1, 2, 0]), "source_segments": np.array([1, 1, 1, 0])}) == 2 + 3
    assert {"loss", "nll", "accuracy", "grad_norm", "lr", "finite", "weight/tokens", "tokens"} == set(metrics)
    parts = cut(batch, 4)
    means = [sums({k: v[i] for k, v in parts.items()})["loss"] / parts["weights"][i].sum() for i in range(4)]
    assert abs(np.mean(means) - metrics["loss"]) > 0.01, "the batch could not tell a mean of means"


def test_two_losses_are_each_divided_by_their_own_weight():
    s, batch = setup("two losses"), make_batch("two losses")
    sums = jax.jit(lambda b: s.loss(s.state.all_params, b, None))(batch)
    _, m = s.step(s.state, cut(batch, 2))
    np.testing.assert_allclose(m["pairs/loss"], sums["pairs"]["loss"] / 7, rtol=1e-5)
    np.testing.assert_allclose(m["masked/nll"], sums["masked"]["nll"] / batch["weights"].sum(), rtol=1e-5)
    np.testing.assert_allclose(m["loss"], m["pairs/loss"] + m["masked/loss"], rtol=1e-6)


# ------------------------------------------------------------------------------- a toy, whose updates are known by hand

TOY = {"w": Spec((2, 2), ("embed", "ffn"), ones), "b": Spec((2,), (None,), ones)}


def toy(c: config.Optim | None = None, *, clip: float = 0.0, ema: float = 0.0):
    """Loss: Σ x·(Σw + Σb), weight: Σ n. So the gradient of every element is Σx / Σn."""
    c = c or config.Optim(name="sgd", momentum=0.0, lr=0.5, warmup=0, schedule="constant", weight_decay=0.0)
    optimizer = optimizers.make(c, 100, TOY)

    def loss(p, b, key):
        return {"tokens": {"loss": (b["x"] * (p["w"].sum() + p["b"].sum())).sum(), "accuracy": b["n"].sum() / 2}}

    weights = lambda b: {"tokens": b["n"].sum()}  # noqa: E731
    f = step.make_train_step(loss, weights, optimizer, seed=0, clip=clip, ema=ema)
    return jax.jit(f), step.init_state(TOY, optimizer, jax.random.key(0), ema > 0)


def batch_of(x: float, n: float = 2.0) -> dict:
    return {"x": np.full((1, 1), x, np.float32), "n": np.full((1, 1), n, np.float32)}


def test_sgd_by_hand():
    f, state = toy()
    state, m = f(state, batch_of(3.0))
    np.testing.assert_allclose(state.params["w"], 1 - 0.5 * 1.5)
    np.testing.assert_allclose(
        [m["loss"], m["grad_norm"], m["lr"], m["accuracy"]], [9.0, 1.5 * 6**0.5, 0.5, 0.5], rtol=1e-6
    )
    assert state.step == 1


@pytest.mark.parametrize(("clip", "size"), [(0.0, 1.5 * 6**0.5), (1.0, 1.0), (100.0, 1.5 * 6**0.5)])
def test_clipping_by_the_global_norm(clip, size):
    f, before = toy(clip=clip)
    after, m = f(before, batch_of(3.0))
    moved = np.concatenate(
        [np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (before.params, after.params)), strict=True)]
    )
    np.testing.assert_allclose(np.linalg.norm(moved), 0.5 * size, rtol=1e-5)
    np.testing.assert_allclose(m["grad_norm"], 1.5 * 6**0.5, rtol=1e-6)  # as it was before clipping


def test_the_rate_is_that_of_the_step_after_an_update_was_left_out():
    """And the one that is logged."""
    c = config.Optim(name="sgd", momentum=0.0, lr=0.5, warmup=0, schedule="linear", final=0.0, weight_decay=0.0)
    f, state = toy(c)
    rates = []
    for x in (2.0, float("nan"), 2.0, 2.0):
        after, m = f(state, batch_of(x))
        rates.append((float((state.params["w"] - after.params["w"]).max()), float(m["lr"])))
        state = after
    np.testing.assert_allclose([rates[i][0] for i in (0, 2, 3)], [rates[i][1] for i in (0, 2, 3)], rtol=1e-4)
    assert rates[1][0] == 0


def test_layers_that_stay_do_not_count_in_the_norm():
    """However large their gradients are, or none at all."""
    specs = {"blocks": stacked(2, {"w": Spec((2,), (None,), ones)})}
    c = config.Optim(name="sgd", momentum=0.0, lr=1.0, warmup=0, schedule="constant", weight_decay=0.0, top_layers=1)
    optimizer = optimizers.make(c, 100, specs)
    size = np.array([[1000.0], [3.0]], np.float32)

    def loss(p, b, key):
        return {"tokens": {"loss": (p["blocks"]["w"] * size * b["x"][..., None]).sum()}}

    f = jax.jit(step.make_train_step(loss, lambda b: {"tokens": b["n"].sum()}, optimizer, seed=0, clip=1.0, ema=0.0))
    before = step.init_state(specs, optimizer, jax.random.key(0), False)
    after, m = f(before, batch_of(1.0, 1.0))
    moved = before.params["blocks"]["w"] - after.params["blocks"]["w"]
    np.testing.assert_allclose(moved, [[0, 0], [0.5**0.5] * 2], rtol=1e-5)
    np.testing.assert_allclose(m["grad_norm"], 3 * 2**0.5, rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_update_that_is_not_finite_is_left_out(bad):
    c = config.Optim(lr=0.1, warmup=5)
    f, state = toy(c, clip=1.0, ema=0.9)
    state, _ = f(state, batch_of(1.0))
    after, m = f(state, batch_of(bad))
    assert m["finite"] == 0 and after.step == 2
    clocks = [int(s.opt[1][1].count) for s in (state, after)]
    assert clocks == [1, 2]
    kept = after.replace(step=state.step, opt=state.opt[:1])
    jax.tree.map(np.testing.assert_array_equal, kept, state.replace(opt=after.opt[:1]))
    again, m = f(after, batch_of(1.0))
    assert m["finite"] == 1 and again.step == 3
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(again))
    assert not np.array_equal(again.params["w"], after.params["w"])


def test_a_batch_without_a_target_updates_nothing_and_says_so():
    f, state = toy()
    after, m = f(state, batch_of(0.0, 0.0))
    assert m["weight/tokens"] == 0 and m["finite"] == 0
    np.testing.assert_array_equal(after.params["w"], state.params["w"])


def test_frozen_weights_stay_and_have_no_state():
    c = config.Optim(lr=0.1, warmup=0, freeze=("^b$",), weight_decay=0.5)
    f, state = toy(c)
    assert state.params["b"] is None and state.frozen["w"] is None
    assert not any(x.shape == (2,) for x in jax.tree.leaves(state.opt))
    after, m = f(state, batch_of(1.0))
    np.testing.assert_array_equal(after.all_params["b"], 1.0)
    assert (after.all_params["w"] != 1).all()
    np.testing.assert_allclose(m["grad_norm"], 0.5 * 2, rtol=1e-6)  # of the four elements that are trained


def test_average_of_the_weights():
    f, state = toy(ema=0.5)
    values, average = [], np.ones((2, 2))
    for i in range(12):
        state, _ = f(state, batch_of(float(i)))
        values.append(state.params["w"])
        decay = min(0.5, (1 + i) / (10 + i))  # young averages forget faster
        average = decay * average + (1 - decay) * values[-1]
        np.testing.assert_allclose(state.ema["w"], average, rtol=1e-5)
    np.testing.assert_array_equal(state.eval_params["w"], state.ema["w"])
    assert state.ema["w"].shape == (2, 2) and not np.allclose(state.ema["w"], values[-1])


def test_without_an_average_the_weights_themselves_are_validated():
    _, state = toy()
    assert state.ema is None and state.eval_params["w"] is state.params["w"]


# ------------------------------------------------------------------------------------------------------------ programs


def test_the_state_is_donated_and_the_step_compiles_once():
    s, rng = setup("causal"), np.random.default_rng(1)
    state, batch = (
        s.step(s.state, cut(make_batch("causal"), 4))[0],
        make_batch("causal"),
    )
    programs = s.donating_step._cache_size()
    for _ in range(3):
        batch["targets"] = rng.integers(0, V, (B, T)).astype(np.int32)
        before = jax.tree.leaves(state)
        state, _ = s.donating_step(state, cut(batch, 4))
        assert all(x.is_deleted() for x in before), "a buffer was copied instead of reused"
    assert s.donating_step._cache_size() == programs


def test_a_run_learns_its_batch():
    s, batch, losses = setup("causal"), cut(make_batch("causal"), 4), []
    state = s.state
    for _ in range(60):
        state, m = s.step(state, batch)
        losses.append(float(m["loss"]))
    assert losses[-1] < 0.6 * losses[0]


def test_dropout_changes_with_step_and_micro_batch_and_repeats_with_the_seed():
    keys = []

    def loss(p, b, key):
        jax.debug.callback(lambda k: keys.append(tuple(np.ravel(k).tolist())), jax.random.key_data(key), ordered=True)
        return {"tokens": {"loss": (b["x"] * p["w"].sum()).sum()}}

    optimizer = optimizers.make(config.Optim(warmup=0), 10, {"w": TOY["w"]})
    state = step.init_state({"w": TOY["w"]}, optimizer, jax.random.key(0), False)
    batch = {k: np.repeat(v, 2, 0) for k, v in batch_of(1.0).items()}

    def run(seed: int) -> list:
        keys.clear()
        f = step.make_train_step(loss, lambda b: {"tokens": b["n"].sum()}, optimizer, seed=seed, clip=0.0, ema=0.0)
        s, f = state, jax.jit(f)
        for _ in range(2):
            s, _ = f(s, batch)
        jax.effects_barrier()
        return list(keys)

    first, again, other = run(0), run(0), run(1)
    assert first == again and len(set(first)) == 4 and not set(first) & set(other)


def test_shardings_match_the_state():
    """Leaf for leaf, whatever is frozen or averaged."""
    c = config.Mesh(fsdp=4, tensor=2)
    mesh, layout = make_mesh(c), Layout.of(c, config.Execution())
    specs = llama.specs(LLAMA) | {"b": Spec((8,), (None,), normal(1))}
    optimizer = optimizers.make(dataclasses.replace(config.Optim(), freeze=("^b$", "embed")), 200, specs)
    layout = dataclasses.replace(layout, store={**layout.store, "kv": ()})
    homes = step.shardings(specs, layout.shardings(specs, mesh), optimizer, True, replicated(mesh))
    state = jax.eval_shape(lambda: step.init_state(specs, optimizer, jax.random.key(0), True))
    assert jax.tree.structure(state) == jax.tree.structure(homes)
    jax.tree.map(lambda x, home: home.shard_shape(x.shape), state, homes)
    up = tree.flatten(homes.ema)["blocks/up"]
    assert up.spec == tree.flatten(homes.params)["blocks/up"].spec and up.shard_shape((1, 8, 16)) == (1, 2, 8)
    assert spec.count(specs) == sum(x.size for x in jax.tree.leaves((state.params, state.frozen)))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_says_what_the_fsdp_axis_shards(zero):
    """State at rest, and what adds up the gradients of micro-batches in the compiled program; with a frozen weight."""
    c = config.Mesh(fsdp=8, zero=zero, axis_type="explicit")  # else the compiler may shard sums that needn't be whole
    mesh, layout = make_mesh(c), Layout.of(c, config.Execution())
    shape = Spec((16, 24), ("embed", "ffn"), normal(1))
    specs = {"a": shape, "w": shape}
    optimizer = optimizers.make(config.Optim(freeze=("^a$",)), 200, specs)
    weights, moments = layout.shardings(specs, mesh), layout.shardings(specs, mesh, layout.moments)
    homes = step.shardings(specs, weights, optimizer, True, replicated(mesh), moments)
    whole, part = (16, 24), (2, 24)
    at_rest = part if zero == 3 else whole
    assert homes.params["a"] is None and homes.frozen["a"].shard_shape(whole) == at_rest
    assert homes.params["w"].shard_shape(whole) == at_rest and homes.ema["w"].shard_shape(whole) == part
    moved = [h.shard_shape(whole) for h in jax.tree.leaves(homes.opt) if h.spec]
    assert moved == [part] * 2  # Adam's

    def loss(p, batch, key):
        return {"rows": {"loss": jnp.sin(batch["x"] @ layout.gather(p, specs)["w"].astype(jnp.float32)).sum()}}

    shardings = step.UpdateShardings.of(zero, weights, moments, optimizer)
    f = step.make_train_step(
        loss, lambda b: {"rows": jnp.full((), 24.0)}, optimizer, seed=0, clip=1.0, ema=0.9, shardings=shardings
    )
    state = jax.eval_shape(lambda: step.init_state(specs, optimizer, jax.random.key(0), True))
    x = jax.ShapeDtypeStruct((3, 8, 16), jnp.float32, sharding=batch_sharding(layout, mesh, (3, 8, 16), -1))
    with on_mesh(mesh):
        program = jax.jit(f, in_shardings=(homes, None), out_shardings=(homes, None)).lower(state, {"x": x}).compile()
    (loop,) = [line for line in program.as_text().splitlines() if " while(" in line]
    carried = loop.partition(" while(")[0]
    assert ("f32[2,24]" in carried) == (zero > 1), carried  # gradients, as they add up
