"""Optimizers equal their published forms, touch what they were told to, and schedules go where they say."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core import config, spec, tree
from jaxlm.core.spec import Spec, fan_in, normal, ones, stacked, table
from jaxlm.models import deepseek, llama, modernbert, t5
from jaxlm.nn.layout import Layout
from jaxlm.nn.moe import Moe
from jaxlm.runtime.mesh import make_mesh, on_mesh, replicated
from jaxlm.training import optimizers, rate_scales, step

SPECS = {
    "embed": table(24, 16, normal(1), "vocab"),
    "blocks": stacked(
        3,
        {
            "q": Spec((16, 4, 8), ("embed", "heads", None), fan_in(0)),
            "o": Spec((4, 8, 16), ("heads", None, "embed"), fan_in(0, 1)),
            "up": Spec((16, 32), ("embed", "ffn"), fan_in(0)),
            "norm": Spec((16,), (None,), ones),
        },
    ),
    "norm": Spec((16,), (None,), ones),
}
FLAT = {
    "w": Spec((8, 6), ("embed", "ffn"), normal(1)),
    "b": Spec((6,), (None,), ones),
}


def numbers(specs, seed: int = 0):
    rng = np.random.default_rng(seed)
    return tree.map_named(lambda _, s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32), specs)


def make(c: config.Optim, specs=SPECS, steps: int = 100) -> optimizers.Optimizer:
    return optimizers.make(c, steps, specs)


CONSTANT = config.Optim(lr=0.03, schedule="constant", warmup=0)


def run(tx: optax.GradientTransformation, weights, n: int = 4):
    state, specs = tx.init(weights), jax.tree.map(lambda x: Spec(x.shape, (None,) * x.ndim, ones), weights)
    update = jax.jit(tx.update)
    for i in range(n):
        updates, state = update(numbers(specs, 10 + i), state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights


# ------------------------------------------------------------------------------------------------- the published forms

MASK = {"w": True, "b": False}
ALIASES = {
    "adamw": optax.adamw(0.03, 0.9, 0.95, weight_decay=0.1, mask=MASK),
    "lion": optax.lion(0.03, 0.9, 0.95, weight_decay=0.1, mask=MASK),
    "sgd": optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1, MASK), optax.scale(-0.03)),
    "adafactor": optax.adafactor(0.03),
}


@pytest.mark.parametrize("name", ALIASES)
def test_equals_optax(name):
    c = dataclasses.replace(CONSTANT, name=name, weight_decay=0.0 if name == "adafactor" else 0.1)
    weights = numbers(FLAT)
    got, expected = run(make(c, FLAT).tx, weights), run(ALIASES[name], weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_sgd_without_momentum_is_the_gradient():
    c = dataclasses.replace(CONSTANT, name="sgd", momentum=0.0, weight_decay=0.0)
    got, expected = run(make(c, FLAT).tx, numbers(FLAT)), run(optax.sgd(0.03), numbers(FLAT))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)


def test_adamw_equals_pytorch():
    golden = np.load(Path(__file__).parents[1] / "golden" / "adamw.npz")
    tx = make(CONSTANT, {"w": Spec((4, 3), ("embed", "ffn"), ones)}).tx
    weights = {"w": jnp.asarray(golden["first"])}
    state = tx.init(weights)
    for gradient, after in zip(golden["gradients"], golden["after"], strict=True):
        updates, state = tx.update({"w": jnp.asarray(gradient)}, state, weights)
        weights = optax.apply_updates(weights, updates)
        np.testing.assert_allclose(weights["w"], after, atol=2e-6)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_stacked_layers_and_experts_are_updated_as_separate_ones(name):
    """However small the numbers of one of them are. Of 160 layers, too, which are a side as long as those that
    Adafactor factors its moments over."""
    c = dataclasses.replace(CONSTANT, name=name)
    one = {
        "wide": Spec((130, 140), ("embed", "ffn"), fan_in(0)), "norm": Spec((4,), (None,), ones),
        "expert": Spec((3, 4, 8), ("experts", "embed", "ffn"), fan_in(1)),
    }  # fmt: skip
    many = {"many": Spec((4, 130), ("embed", "ffn"), fan_in(0))}
    specs = stacked(2, one) | stacked(160, many)
    weights, gradients = numbers(specs), numbers(specs, 1)
    smaller = lambda x: x * 0.1 ** np.arange(x.shape[0]).clip(0, 2).reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731
    weights, gradients = jax.tree.map(smaller, weights), jax.tree.map(lambda x: smaller(smaller(x)), gradients)
    weights["expert"] *= jnp.arange(1.0, 4.0).reshape(1, 3, 1, 1)

    def updates(specs, weights, gradients):
        tx = make(c, specs).tx
        return jax.jit(lambda w, g: tx.update(g, tx.init(w), w)[0])(weights, gradients)

    whole = updates(specs, weights, gradients)
    alone = dict.fromkeys(specs, (1,)) | {"expert": (1, 2)}
    plain = {n: s._replace(shape=s.shape[-2:], axes=s.axes[-2:]) for n, s in (one | many).items()}
    cut = lambda t: {name: x[alone[name]][None] for name, x in t.items()}  # noqa: E731
    separate = updates(stacked(1, plain), cut(weights), cut(gradients))
    for name, u in cut(whole).items():
        np.testing.assert_allclose(u, separate[name], rtol=1e-4, atol=1e-9, err_msg=name)


# ---------------------------------------------------------------------------------------------------------------- muon

MUON = dataclasses.replace(CONSTANT, name="muon", weight_decay=0.0, muon_lr=0.5)


def muon_updates(specs=SPECS, c=MUON, weights=None):
    optimizer = make(c, specs)
    weights = numbers(specs) if weights is None else weights
    return jax.jit(lambda w: optimizer.tx.update(numbers(specs, 1), optimizer.tx.init(w), w)[0])(weights)


@pytest.mark.parametrize(
    ("path", "inputs", "outputs"), [("q", (16,), (4, 8)), ("o", (4, 8), (16,)), ("up", (16,), (32,))]
)
def test_muon_makes_each_layers_matrix_orthogonal(path, inputs, outputs):
    u = np.asarray(muon_updates()["blocks"][path])
    rows, columns = int(np.prod(outputs)), int(np.prod(inputs))
    for layer in u:
        matrix = layer.reshape(columns, rows)
        values = np.linalg.svd(matrix, compute_uv=False) / (0.5 * max(1, rows / columns) ** 0.5)
        assert values.min() > 0.5 and values.max() < 1.5


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    optimizer = make(dataclasses.replace(MUON, weight_decay=0.2, adamw_paths=("blocks/up",), no_decay=("embed",)))
    assert optimizer.groups == {
        "blocks/norm": "adamw, no decay",
        "blocks/o": "muon, decay 0.2",
        "blocks/q": "muon, decay 0.2",
        "blocks/up": "adamw, decay 0.2",
        "embed": "adamw, no decay",
        "norm": "adamw, no decay",
    }
    updates = muon_updates(c=dataclasses.replace(MUON, adamw_paths=("blocks/up",)))
    alone = make(dataclasses.replace(CONSTANT, weight_decay=0.0)).tx
    expected = alone.update(numbers(SPECS, 1), alone.init(numbers(SPECS)), numbers(SPECS))[0]
    for path in ("embed", "norm"):
        np.testing.assert_allclose(updates[path], expected[path], rtol=1e-5)
    np.testing.assert_allclose(updates["blocks"]["up"], expected["blocks"]["up"], rtol=1e-5)


def test_muon_decays_by_its_own_rate():
    w = numbers(SPECS)
    with_decay = muon_updates(c=dataclasses.replace(MUON, weight_decay=0.2))
    without = muon_updates()
    np.testing.assert_allclose(
        with_decay["blocks"]["q"] - without["blocks"]["q"], -0.5 * 0.2 * w["blocks"]["q"], atol=1e-5
    )
    np.testing.assert_allclose(with_decay["embed"] - without["embed"], -0.03 * 0.2 * w["embed"], atol=1e-5)


def test_muon_sharded_equals_unsharded():
    c = config.Mesh(fsdp=4, tensor=2)
    mesh, layout = make_mesh(c), Layout.of(c, config.Execution())
    with on_mesh(mesh):
        got = muon_updates(weights=jax.device_put(numbers(SPECS), layout.shardings(SPECS, mesh)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, muon_updates())


# -------------------------------------------------------------------------------------- which weights, and their decay


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_only_matrices_that_are_not_spared_are_decayed(name):
    c = dataclasses.replace(CONSTANT, name=name, weight_decay=0.5, no_decay=("embed",))
    optimizer, weights = make(c), numbers(SPECS)
    zero = jax.tree.map(jnp.zeros_like, weights)
    updates = optimizer.tx.update(zero, optimizer.tx.init(weights), weights)[0]
    moved = {path for path, u in tree.flatten(updates).items() if jnp.abs(u).max() > 0}
    assert moved == {"blocks/q", "blocks/o", "blocks/up"}
    rate = 0.02 if name == "muon" else 0.03
    np.testing.assert_allclose(updates["blocks"]["up"], -rate * 0.5 * weights["blocks"]["up"], rtol=1e-5)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_frozen_weights_have_no_optimizer_state_and_the_rest_moves_as_before(name):
    optimizer = make(dataclasses.replace(CONSTANT, name=name, freeze=("embed", "blocks/q")))
    trainable, frozen = tree.partition(numbers(SPECS), optimizer.trainable)
    assert set(tree.flatten(frozen)) == {"embed", "blocks/q"}
    assert optimizer.groups["embed"] == "frozen"
    state = optimizer.tx.init(trainable)
    largest = max(x.size for x in jax.tree.leaves(state))
    assert largest <= 3 * 16 * 32 and not any(x.shape == (24, 16) for x in jax.tree.leaves(state))
    gradients = tree.partition(numbers(SPECS, 1), optimizer.trainable)[0]
    updates = optimizer.tx.update(gradients, state, trainable)[0]
    assert set(tree.flatten(updates)) == {"blocks/norm", "blocks/o", "blocks/up", "norm"}
    whole = make(dataclasses.replace(CONSTANT, name=name))
    expected = whole.tx.update(numbers(SPECS, 1), whole.tx.init(numbers(SPECS)), numbers(SPECS))[0]
    np.testing.assert_allclose(updates["blocks"]["up"], expected["blocks"]["up"], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freeze": ("lora",)}, r"optim\.freeze: pattern 'lora' matches no parameter; there are: blocks/norm"),
        ({"no_decay": ("bias",)}, r"optim\.no_decay: pattern 'bias'"),
        ({"name": "muon", "adamw_paths": ("x",)}, r"optim\.adamw_paths: pattern 'x'"),
        ({"freeze": (".",)}, r"optim\.freeze: every parameter is frozen"),
        ({"warmup": 100}, r"optim\.warmup: 100 steps do not fit into train\.steps 100"),
    ],
)
def test_what_cannot_be_meant_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make(dataclasses.replace(CONSTANT, **change))


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_moments_live_with_their_weights(name):
    c = config.Mesh(fsdp=4, tensor=2)
    mesh, layout = make_mesh(c), Layout.of(c, config.Execution())
    specs = llama.specs(llama.Config(vocab=32, layers=2, width=16, heads=4, kv_heads=2, head_width=4, ffn=16))
    optimizer = make(dataclasses.replace(CONSTANT, name=name), specs)
    homes = step.shardings(specs, layout.shardings(specs, mesh), optimizer, False, replicated(mesh))
    state = jax.eval_shape(optimizer.tx.init, spec.abstract(specs))
    assert jax.tree.structure(state) == jax.tree.structure(homes.opt)
    large = [h.spec for x, h in zip(jax.tree.leaves(state), jax.tree.leaves(homes.opt), strict=True) if x.ndim > 2]
    assert name == "adafactor" or (large and all("fsdp" in s for s in large))


# ------------------------------------------------------------------------------------------------------------ schedules

W, N = 10, 100


def rates(**c) -> np.ndarray:
    f = optimizers.schedule(config.Optim(**{"lr": 1.0, "warmup": W, "final": 0.1, "decay": 0.2} | c), N)
    return np.asarray(jax.vmap(f)(jnp.arange(N)))


@pytest.mark.parametrize(
    ("name", "middle", "end"),
    [
        ("constant", 1.0, 1.0),
        ("linear", 1 - 0.9 * 45 / 89, 0.1),
        ("cosine", 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 45 / 89)), 0.1),
        ("inverse_sqrt", (10 / 55) ** 0.5, (10 / 99) ** 0.5),
        ("wsd", 1.0, 0.1),
    ],
)
def test_schedule(name, middle, end):
    r = rates(schedule=name)
    np.testing.assert_allclose(r[:W], np.arange(1, W + 1) / (W + 1), rtol=1e-5)  # the first update moves already
    np.testing.assert_allclose([r[W], r[55], r[-1]], [1.0, middle, end], rtol=1e-5)
    assert np.abs(np.diff(r)).max() <= 1 / (W + 1) + 1e-6, "a jump"
    assert (np.diff(r[W:]) <= 1e-6).all() and (r > 0).all()


def test_wsd_holds_until_its_last_share():
    r = rates(schedule="wsd")
    np.testing.assert_allclose(r[W:80], 1.0)
    np.testing.assert_allclose(r[80:], 1 - 0.9 * np.arange(1, 21) / 20, rtol=1e-5)


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
def test_schedules_without_warmup_start_at_the_peak(name):
    r = rates(schedule=name, warmup=0)
    assert r[0] == pytest.approx(1.0, abs=0.06 if name == "wsd" else 1e-6)
    assert np.isfinite(r).all()


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
def test_the_end_is_reached_even_after_a_long_warmup(name):
    r = rates(schedule=name, warmup=95)
    if name in ("linear", "cosine", "wsd"):
        assert r[-1] == pytest.approx(0.1, abs=1e-5)
    assert r.max() <= 1 + 1e-6


def test_a_learning_rate_of_zero_moves_nothing():
    updates = muon_updates(c=dataclasses.replace(MUON, lr=0.0))
    assert not any(np.any(u) for u in jax.tree.leaves(updates))


def test_muon_follows_the_schedule():
    c = dataclasses.replace(MUON, schedule="linear", lr=0.2, final=0.0)
    optimizer, w = make(c, steps=3), numbers(SPECS)
    state, sizes = optimizer.tx.init(w), []
    for _ in range(3):
        updates, state = optimizer.tx.update(numbers(SPECS, 1), state, w)
        sizes.append(float(jnp.abs(updates["blocks"]["q"]).max()))
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.2) and sizes[2] == 0


# -------------------------------------------------------------------------------------------------------------- height


def moved(c: config.Optim) -> dict[str, np.ndarray]:
    """One update of each weight, from the same gradients."""
    weights, grads = numbers(SPECS), numbers(SPECS, 1)
    o = make(dataclasses.replace(c, warmup=0, schedule="constant"))
    trainable, _ = tree.partition(weights, o.trainable)
    grads, _ = tree.partition(grads, o.trainable)
    updates, _ = o.tx.update(grads, o.tx.init(trainable), trainable)
    return tree.flatten(updates)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_lower_layers_learn_slower(name):
    plain, scaled = moved(config.Optim(name=name)), moved(config.Optim(name=name, layer_decay=0.5))
    for path in ("blocks/q", "blocks/norm"):
        for layer, share in enumerate((1 / 8, 1 / 4, 1 / 2)):
            np.testing.assert_allclose(scaled[path][layer], share * plain[path][layer], rtol=1e-6)
    np.testing.assert_allclose(scaled["embed"], plain["embed"] / 16, rtol=1e-6)
    np.testing.assert_array_equal(scaled["norm"], plain["norm"])


def test_only_the_top_layers_move():
    got = moved(config.Optim(top_layers=1, weight_decay=0.5, freeze=("blocks/up",)))
    assert not got["embed"].any() and not got["blocks/q"][:2].any()
    assert got["blocks/q"][2].all() and got["norm"].all() and "blocks/up" not in got
    with pytest.raises(ValueError, match=r"optim.top_layers: 4 of 3 layers"):
        make(config.Optim(top_layers=4, warmup=0))


def test_only_layers_that_are_named_move():
    got = moved(config.Optim(only_layers=(1,), weight_decay=0.5))
    assert not got["embed"].any() and not got["blocks/q"][::2].any()
    assert got["blocks/q"][1].all() and got["norm"].all()
    with pytest.raises(ValueError, match=r"optim.only_layers: there is no layer 3; the last of 3 is 2"):
        make(config.Optim(only_layers=(3,), warmup=0))
    with pytest.raises(ValueError, match=r"optim.only_layers: .* leave one out"):
        make(config.Optim(only_layers=(1,), top_layers=1, warmup=0))


@pytest.mark.parametrize("name", ["deepseek", "modernbert", "t5"])
def test_height_counts_the_layers_of_all_stacks(name):
    """Dense layers below those with experts, ModernBERT's first one; an encoder and a decoder each by itself."""
    tiny = dict(vocab=8, layers=4, width=8, heads=2)
    model, own = {
        "deepseek": (deepseek, dict(dense=2, ffn=8, moe=Moe(experts=2, top_k=1, ffn=8), latent=4)),
        "modernbert": (modernbert, dict(ffn=8)),
        "t5": (t5, dict(decoder_layers=2, ffn=8)),
    }[name]
    specs = model.specs(model.Config(**tiny, **own))
    scales = {p: np.ravel(x) for p, x in tree.flatten(rate_scales.depth_scales(
        config.Optim(layer_decay=0.5), specs)).items()}  # fmt: skip
    top = {p: np.ravel(x) for p, x in tree.flatten(rate_scales.depth_scales(config.Optim(top_layers=1), specs)).items()}
    own = config.Optim(only_layers=(0, 2))
    only = {p: np.ravel(x) for p, x in tree.flatten(rate_scales.depth_scales(own, specs)).items()}
    every, last, named = [0.0625, 0.125, 0.25, 0.5], [0, 0, 0, 1], [1, 0, 1, 0]
    stacks = {
        "deepseek": {"dense/norm1": slice(0, 2), "blocks/norm1": slice(2, 4), "blocks/router": slice(2, 4)},
        "modernbert": {"first/norm2": slice(0, 1), "blocks/norm2": slice(1, 4)},
        "t5": {"encoder/blocks/q": slice(0, 4), "decoder/blocks/q": slice(2, 4)},
    }[name]
    for path, layers in stacks.items():
        np.testing.assert_allclose(scales[path], every[layers])
        np.testing.assert_array_equal(top[path], last[layers])
        # A decoder's two layers are its own layers 0 and 1.
        np.testing.assert_array_equal(only[path], [1, 0] if path.startswith("decoder") else named[layers])
    assert (scales["embed"], top["embed"]) == (0.5**5, 0)
    with pytest.raises(ValueError, match=r"optim.top_layers: 5 of 4 layers"):
        rate_scales.depth_scales(config.Optim(top_layers=5), specs)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("name", r"optim\.name: unknown 'adam'; did you mean 'adamw'"),
        ("schedule", r"optim\.schedule: unknown 'adam'; known: constant"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(field, message):
    with pytest.raises(ValueError, match=message):
        optimizers.make(config.Optim(**{field: "adam"}, warmup=1), 10, SPECS)
