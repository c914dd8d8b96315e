"""Cross entropy without logits: equal to the plain one, in value and gradient, in parts, in shards, in bfloat16."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core import config
from jaxlm.nn import losses
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import Readout, cross_entropy, logits
from jaxlm.runtime.mesh import make_mesh, on_mesh

B, T, D, V = 4, 8, 6, 40
RNG = np.random.default_rng(0)
X, W, BIAS = (RNG.standard_normal(s).astype(np.float32) for s in ((B, T, D), (V, D), (V,)))
TARGETS = RNG.integers(0, V, (B, T)).astype(np.int32)
WEIGHTS = (RNG.random((B, T)) * (RNG.random((B, T)) < 0.7)).astype(np.float32)


@pytest.fixture(autouse=True)
def strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield


def layout(chunk: int = 0) -> Layout:
    return Layout(execution=config.Execution(dtype="float32", loss_chunk=chunk))


def ours(x, w, b, *, chunk: int = 0, softcap=None, ids_in_use=None, **kw):
    return cross_entropy(Readout(x, w, b, softcap, ids_in_use), TARGETS, WEIGHTS, shard=layout(chunk), **kw)


def reference(x, w, b, label_smoothing=0.0, z_loss=0.0, softcap=None):
    """optax, on the whole logits."""
    z = x @ w.T + (0 if b is None else b[None, None])
    z = z if softcap is None else softcap * jnp.tanh(z / softcap)
    soft = optax.smooth_labels(jax.nn.one_hot(TARGETS, V), label_smoothing)
    loss = optax.softmax_cross_entropy(z, soft) + z_loss * jnp.square(jax.nn.logsumexp(z, -1))
    nll = optax.softmax_cross_entropy_with_integer_labels(z, TARGETS)
    return tuple((v * WEIGHTS).sum() for v in (loss, nll, (z.argmax(-1) == TARGETS).astype(jnp.float32)))


def values_and_grads(f, *arrays):
    """Sums, and gradients of 3 × the loss, so that the factor that comes from outside is seen."""
    scaled = lambda *a: ((out := tuple(f(*a)))[0] * 3, out)  # noqa: E731
    argnums = tuple(i for i, a in enumerate(arrays) if a is not None)
    (_, out), grads = jax.jit(jax.value_and_grad(scaled, argnums, has_aux=True))(*arrays)
    return out, grads


@functools.cache
def expected(bias: bool, **kw):
    return values_and_grads(lambda *a: reference(*a, **kw), X, W, BIAS if bias else None)


SMOOTH = {"label_smoothing": 0.1, "z_loss": 0.02}


@pytest.mark.parametrize("smooth", [{}, SMOOTH, SMOOTH | {"softcap": 2.0}], ids=["plain", "smoothed", "capped"])
@pytest.mark.parametrize(("chunk", "bias"), [(0, BIAS), (8, None), (7, BIAS), (1, BIAS), (1000, BIAS)])
def test_equals_optax(chunk, bias, smooth):
    got = values_and_grads(lambda *a: ours(*a, chunk=chunk, **smooth), X, W, bias)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)  # noqa: E731
    jax.tree.map(close, got, expected(bias is not None, **smooth))


@pytest.mark.parametrize(("kind", "size"), [("NVIDIA H100 80GB HBM3", 1.3e9), ("TPU v5 lite", 2**28), ("?", 2**28)])
def test_an_accelerator_makes_logits_for_a_share_of_its_memory(monkeypatch, kind, size):
    monkeypatch.setattr(losses, "platform", lambda: "tpu")  # where the target's logit is a sum over the row
    monkeypatch.setattr(losses, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    assert losses._chunk(1 << 20, 50_304, 0) == pytest.approx(size / 4 / 50_304, rel=0.05)
    got = values_and_grads(ours, X, W, BIAS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), got, expected(True))


def test_without_gradients_it_is_the_same():
    got = jax.jit(lambda *a: tuple(ours(*a, chunk=5)))(X, W, BIAS)
    np.testing.assert_allclose(got, expected(True)[0], rtol=1e-5)


MESHES = {
    "rows and vocabulary": config.Mesh(data=2, fsdp=2, tensor=2),
    "rows, positions and vocabulary": config.Mesh(data=2, context=2, tensor=2),
}


@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
@pytest.mark.parametrize("name", MESHES)
def test_shards_of_tokens_and_vocabulary_equal_the_whole(name, axis_type):
    smooth = {"label_smoothing": 0.1, "z_loss": 0.02}
    c = MESHES[name]
    mesh = make_mesh(dataclasses.replace(c, axis_type=axis_type))
    with on_mesh(mesh):
        got = values_and_grads(lambda *a: ours(*a, chunk=3, **smooth), X, W, BIAS)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)  # noqa: E731
    jax.tree.map(close, got, expected(True, **smooth))


def test_padding_of_the_vocabulary_has_no_share_of_smoothing():
    """By hand: one token whose logits are 0, of three ids and one row of padding, smoothed by 0.3. Each id's share is
    0.1: the loss is log 4 whatever the shares are, and gradients are 1/4 less 0.8, 0.1, 0.1 and 0."""
    x, w = jnp.ones((1, 1, 1)), jnp.zeros((4, 1))

    def loss(w):
        r, zeros, ones = Readout(x, w, None, None, 3), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))
        return cross_entropy(r, zeros, ones, shard=layout(), label_smoothing=0.3).loss

    value, slope = jax.jit(jax.value_and_grad(loss))(w)
    np.testing.assert_allclose(value, np.log(4), rtol=1e-6)
    np.testing.assert_allclose(slope[:, 0], [0.25 - 0.8, 0.25 - 0.1, 0.25 - 0.1, 0.25], rtol=1e-6)
    value = jax.jit(loss)(jnp.asarray([[0.0], [0.0], [0.0], [2.0]]))  # 0.8·log Z + 2·0.1·log Z, for Z = 3 + e²
    np.testing.assert_allclose(value, np.log(3 + np.exp(2.0)), rtol=1e-6)


def test_a_sharded_vocabulary_knows_its_padding():
    smooth = {"label_smoothing": 0.1, "ids_in_use": 33}
    expected = values_and_grads(lambda *a: ours(*a, **smooth), X, W, BIAS)
    with on_mesh(make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))):
        got = values_and_grads(lambda *a: ours(*a, chunk=3, **smooth), X, W, BIAS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), got, expected)


def test_positions_that_do_not_divide_over_context_are_refused():
    mesh = make_mesh(config.Mesh(context=8))
    with (
        on_mesh(mesh),
        pytest.raises(ValueError, match=r"loss: 6 target positions .* mesh\.context; pad them"),
    ):
        cross_entropy(Readout(X[:, :6], W), TARGETS[:, :6], WEIGHTS[:, :6], shard=layout())


@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_extreme_logits_stay_finite(scale):
    got = values_and_grads(lambda *a: ours(*a, z_loss=1e-4), scale * X, scale * W, BIAS)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(got))


def test_bfloat16_forms_its_sums_in_float32():
    x, w = (a.astype(jnp.bfloat16) for a in (X, W))
    (loss, nll, _), grads = values_and_grads(lambda *a: ours(*a, chunk=8), x, w, BIAS)
    expected = jax.jit(reference)(x.astype(jnp.float32), w.astype(jnp.float32), BIAS)
    assert loss.dtype == nll.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)  # the very logits of bfloat16 operands
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]


def test_tokens_without_weight_contribute_nothing():
    _, (dx, _, _) = values_and_grads(ours, X, W, BIAS)
    assert (dx[WEIGHTS == 0] == 0).all() and (jnp.abs(dx[WEIGHTS > 0]).max(-1) > 0).all()


def test_no_program_holds_the_logits_of_a_batch():
    """Neither forward nor backward: no float array in the compiled step has tokens × vocabulary elements."""
    B, T, D, V = 4, 64, 8, 512
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((B, T, D), (V, D))]

    def f(x, w):
        shard = layout(chunk=32)
        zeros = jnp.zeros((B, T), jnp.int32)
        return cross_entropy(Readout(x, w), zeros, jnp.ones((B, T)), shard=shard, z_loss=1e-4).loss

    def largest(f) -> int:
        text = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*shapes).compile().as_text()
        sizes = [
            np.prod([int(n) for n in s.split(",") if n]) for s in re.findall(r"(?:f32|bf16|pred)\[([\d,]*)\]", text)
        ]
        return int(max(sizes))

    whole = lambda x, w: logits(Readout(x, w), layout()).max(-1).sum()  # noqa: E731
    assert largest(whole) >= B * T * V, "the measure is blind"
    assert largest(f) <= 32 * V


def test_logits_are_float32():
    z = logits(Readout(jnp.asarray(X, jnp.bfloat16), jnp.asarray(W, jnp.bfloat16), jnp.asarray(BIAS)), layout())
    assert z.dtype == jnp.float32 and z.shape == (B, T, V)
