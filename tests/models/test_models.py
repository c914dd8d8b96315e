"""Every architecture: equal to a published one, causal where it should be, blind to padding and neighbours."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config, spec, tree
from jaxlm.models import MODELS, bert, gpt2, llama
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.layout import Layout
from jaxlm.nn.rope import Rope
from jaxlm.runtime.mesh import AXES

V, T = 48, 12
SMALL = {
    "gpt2": gpt2.Config(vocab=V, layers=2, width=16, heads=4, positions=T),
    "llama": llama.Config(
        vocab=V, layers=2, width=16, heads=4, kv_heads=2, head_width=6, ffn=32, rope=Rope(theta=500.0)
    ),
    "bert": bert.Config(vocab=V, layers=2, width=16, heads=4, ffn=32, positions=T, dropout=0.0),
}
SMALL["llama_tied"] = dataclasses.replace(SMALL["llama"], tied=True)
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def make_model(name: str, c=None, **execution) -> Model:
    family, c = MODELS[name.partition("_")[0]], c or SMALL[name]
    layout = Layout(execution=config.Execution(**{"dtype": "float32", "scan": True} | execution))
    return Model(family, c, family.specs(c), layout)


def make_weights(model: Model):
    """Biases and norm scales random too, so that none can be forgotten."""
    rng = np.random.default_rng(0)

    def one(path: str, s: spec.Spec) -> np.ndarray:
        is_scale = path.rpartition("/")[2].startswith(("norm", "transform_norm")) and not path.endswith("bias")
        width = np.sqrt(s.shape[-1] if s.is_matrix else 10)
        return (is_scale + rng.standard_normal(s.shape) / width).astype(np.float32)

    return tree.map_named(one, model.specs)


def all_logits(model: Model, weights, batch: dict) -> jax.Array:
    return losses.logits(model.readout(weights, model.forward(weights, batch).x_BTD), model.shard)


def make_batch(length: int = T, rows: int = 2, **more) -> dict:
    rng = np.random.default_rng(0)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return {"tokens": rng.integers(0, V, (rows, length)).astype(np.int32), "positions": positions} | more


@pytest.mark.parametrize("name", SMALL)
def test_logits_equal_hugging_face(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = {k: np.asarray(v) for k, v in file.items()}
    model = make_model(name)
    flat = {k.removeprefix("weights:"): v.astype(np.float32) for k, v in golden.items() if k.startswith("weights:")}
    assert {k: v.shape for k, v in flat.items()} == {
        k: s.shape for k, s in tree.flatten(model.specs, spec.is_spec).items()
    }
    weights = tree.map_named(lambda path, _: jnp.asarray(flat[path]), model.specs)
    batch = make_batch() | {k: golden[k] for k in ("tokens", "types", "segments") if k in golden}
    real = batch.get("segments", np.ones_like(batch["tokens"])) > 0

    @jax.jit
    def run(w, b):
        x_BTD = model.forward(w, b).x_BTD
        pooled = model.pooled(w, x_BTD) if name == "bert" else None
        return losses.logits(model.readout(w, x_BTD), model.shard), pooled

    ours, pooled = run(weights, batch)
    np.testing.assert_allclose(ours[real], golden["logits"][real], atol=1e-4, rtol=1e-4)
    if name == "bert":
        np.testing.assert_allclose(pooled, golden["pooled"], atol=1e-5, rtol=1e-4)


@functools.cache
def jacobian(name: str, window: int | None = None):
    """`(weights, embedded tokens, batch) → [T, D, T, D]`, as one program for all that is asked of a model."""
    model = make_model(name, dataclasses.replace(SMALL[name], window=window) if window else None)

    def run(weights, x_TD, batch):
        return jax.jacrev(lambda x_TD: model.forward(weights | {"embed": x_TD}, batch).x_BTD[0])(x_TD)

    return jax.jit(run)


ONE_DOCUMENT = np.ones((1, T), np.int32)


def reach(name: str, segments: np.ndarray = ONE_DOCUMENT, window: int | None = None, change=lambda w: w) -> np.ndarray:
    """[T, T]: how strongly the hidden state at each position depends on the token embedded at each position."""
    weights, batch = change(make_weights(make_model(name))), make_batch(rows=1)
    embedded = weights["embed"][batch["tokens"][0]]
    number = np.arange(T, dtype=np.int32)[None]
    positions = np.where(segments > 0, number - (segments[0][:, None] == segments).argmax(1)[None], 0).astype(np.int32)
    alone = dict(tokens=number, positions=positions, segments=segments)
    return np.abs(np.asarray(jacobian(name, window)(weights, embedded, alone))).max((1, 3))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_causality_by_gradient(name):
    t = np.arange(T)
    strength = reach(name)
    before = t[:, None] >= t[None]
    expected = np.ones_like(before) if name == "bert" else before
    assert (strength[~expected] == 0).all(), "a position sees what it must not"
    assert (strength[expected] > 1e-6).all(), "a position is blind to what it should see"


def test_window_limits_each_layer():
    """A layer that adds nothing leaves the other's window to be seen."""

    def without(layer: int):
        def change(weights):
            blocks = dict(weights["blocks"])
            for path in ("o", "down"):
                blocks[path] = np.where(
                    np.arange(2).reshape(2, *[1] * (blocks[path].ndim - 1)) == layer, 0, blocks[path]
                )
            return weights | {"blocks": {n: w.astype(np.float32) for n, w in blocks.items()}}

        return change

    first, second, both = (reach("llama", window=3, change=f) for f in (without(1), without(0), lambda w: w))
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    for strength, far in ((first, 3), (second, 3), (both, 5)):  # each layer looks back over two more positions
        seen = (distance >= 0) & (distance < far)
        assert (strength[~seen] == 0).all() and (strength[seen] > 1e-7).all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_no_token_sees_padding_or_another_document(name):
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0]], np.int32)
    strength = reach(name, segments)
    same = segments[0][:, None] == segments[0][None]
    if name != "bert":
        same &= np.arange(T)[:, None] >= np.arange(T)[None]
    assert (strength[~same] == 0).all() and (strength[same] > 1e-7).all()


LENGTHS = {"one block of queries": (20, 20), "several blocks": (90, 90), "scores computed again": (290, 290)}


def packed_and_alone(lengths: tuple[int, ...]) -> tuple[dict, list[dict]]:
    """One row of documents (and three places of padding), and each document as a row of its own."""
    rng, total = np.random.default_rng(1), sum(lengths) + 3
    row = {k: np.zeros((1, total), np.int32) for k in ("tokens", "segments", "positions")}
    alone, start = [], 0
    for i, n in enumerate(lengths):
        document = {
            "tokens": rng.integers(0, V, (1, n)).astype(np.int32),
            "segments": np.full((1, n), i + 1, np.int32),
            "positions": np.arange(n, dtype=np.int32)[None],
        }
        for k, v in document.items():
            row[k][:, start : start + n] = v
        alone.append(document)
        start += n
    return row, alone


# Blocks of queries whose scores are kept, with every mask: `nn/test_attention.py`, against another implementation.
CASES = [
    ("llama", None, "one block of queries"),
    ("llama", 150, "scores computed again"),
    slow("llama", 37, "several blocks"),
    slow("bert", None, "several blocks"),
    slow("gpt2", None, "several blocks"),
    slow("llama", None, "several blocks"),
    slow("bert", None, "one block of queries"),
    slow("bert", None, "scores computed again"),
    slow("llama", None, "scores computed again"),
]


@pytest.mark.parametrize(("name", "window", "length"), CASES)
def test_packed_equals_unpacked(name, window, length):
    """Logits and gradients. Padding follows the last document, so the packed row also shows that it weighs nothing."""
    row, alone = packed_and_alone(LENGTHS[length])
    c = dataclasses.replace(SMALL[name], layers=1, width=8)
    c = dataclasses.replace(c, **({"window": window} if name == "llama" else {"positions": 1024}))
    model = make_model(name, c)
    weights = make_weights(model)
    rng = np.random.default_rng(2)
    pull = rng.standard_normal((1, row["tokens"].shape[1], V)).astype(np.float32)
    pull[row["segments"] == 0] = 0

    @jax.jit
    def run(w, batch, pull_BTV):
        z_BTV, back = jax.vjp(lambda w: all_logits(model, w, batch), w)
        return z_BTV, back(pull_BTV)[0]

    z, gradients = run(weights, row, pull)
    parts, start = [], 0
    for document in alone:
        n = document["tokens"].shape[1]
        # Of the same shape where that is also the same way to compute: padding then makes one program do.
        more = row["tokens"].shape[1] - n if length == "one block of queries" else 0
        padded = [np.pad(x, ((0, 0), (0, more))) for x in document.values()]
        pulled = np.pad(pull[:, start : start + n], ((0, 0), (0, more), (0, 0)))
        part, own = run(weights, dict(zip(document, padded, strict=True)), pulled)
        parts.append((part[:, :n], own))
        start += n
    np.testing.assert_allclose(z[:, :start], np.concatenate([p[0] for p in parts], 1), atol=2e-4, rtol=2e-4)
    summed = jax.tree.map(lambda *g: sum(g), *[p[1] for p in parts])
    scale = max(np.abs(g).max() for g in jax.tree.leaves(summed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale, rtol=1e-3), gradients, summed)


def with_dropout(name: str, **execution):
    """(function of (weights, key), weights) of a model with dropout, run in one way or another."""
    model = make_model(name, dataclasses.replace(SMALL[name], dropout=0.2), **execution)
    batch = make_batch()

    def f(w, key):
        return jnp.square(losses.logits(model.readout(w, model.forward(w, batch, key=key).x_BTD), model.shard)).mean()

    return f, make_weights(model)


@functools.cache
def program(name: str, **execution):
    """`key → (value, gradients)`."""
    f, weights = with_dropout(name, **execution)
    run = jax.jit(jax.value_and_grad(f))
    return functools.cache(lambda key: run(weights, jax.random.key(key)))


# What is scanned and rematerialized at once is compared in `test_every_family.py` too; dropout's keys in unlike ways
# to run the layers are the same code for every family.
WAYS = [
    ("llama", {"scan": False, "remat": "dots"}),
    slow("gpt2", {"scan": False, "remat": "full"}),
    slow("llama", {"remat": "full"}),
    slow("bert", {"scan": False, "remat": "full"}),
    slow("gpt2", {"scan": False}),
    *[slow(name, {"scan": False}) for name in ("llama", "bert")],
    *[slow(name, {"remat": "full"}) for name in ("gpt2", "bert")],
    *[slow(name, {"remat": "dots"}) for name in ("gpt2", "llama", "bert")],
    slow("llama", {"scan": False, "remat": "full"}),
]


@pytest.mark.parametrize(("name", "execution"), WAYS)
def test_scanned_or_not_rematerialized_or_not_it_computes_the_same(name, execution):
    """Loss, gradients and dropout."""
    got, expected = program(name, **execution)(3), program(name)(3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), got, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_dropout_follows_its_key(name):
    if name == "llama":
        value = lambda key: program(name)(key)[0]  # noqa: E731
    else:  # of which nothing else by default asks for gradients
        f, weights = with_dropout(name)
        value = jax.jit(lambda key: f(weights, jax.random.key(key)))
    assert float(value(3)) != float(value(4))


@pytest.mark.parametrize("name", [slow("gpt2"), "llama", slow("bert")])
def test_bfloat16_is_close_and_keeps_float32_weights(name):
    """Up to the rounding of eight bits; loss and gradients come back in float32."""
    (value, grads), (expected, whole) = program(name, dtype="bfloat16")(3), program(name)(3)
    np.testing.assert_allclose(value, expected, rtol=0.03)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    grads, whole = jax.device_get((grads, whole))
    scale = max(float(np.linalg.norm(g)) for g in jax.tree.leaves(whole))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(whole), strict=True):
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b) + 2e-3 * scale
    out = jax.eval_shape(make_model(name, dtype="bfloat16").forward, make_weights(make_model(name)), make_batch())
    assert out.x_BTD.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"heads": 3}, r"model\.heads: 3 is not a multiple of model\.kv_heads 2"),
        ("gpt2", {"width": 18}, r"model\.width: 18 is not a multiple of model\.heads 4"),
        ("bert", {"width": 18}, r"model\.width: 18 is not a multiple of model\.heads 4"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, change, message):
    with pytest.raises(ValueError, match=message):
        make_model(name, dataclasses.replace(SMALL[name], **change))


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_of_a_published_size_is_sharded(name):
    """At the default size no large weight is left whole by the standard tables."""
    mesh = jax.make_mesh((1, 1, 1, 4, 1, 1, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 7)
    specs = MODELS[name].specs(dataclasses.replace(MODELS[name].Config(), vocab=32768))
    Layout().check_sharded(specs, mesh, (), 1 << 16)


@pytest.mark.parametrize(
    ("name", "c", "count"),
    [("gpt2", gpt2.Config(), 124_439_808), ("bert", bert.Config(), 110_104_890)],
)
def test_parameters_as_published(name, c, count):
    """GPT-2 small, and BERT base with its pooler and masked-LM head (and 1538 more for next sentences)."""
    assert spec.count(MODELS[name].specs(c)) == count
