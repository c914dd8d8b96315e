"""Losses against a teacher: as written down in numpy with float64, zero where nothing differs, and blind to padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.distillation import Hidden, Logits, Relations
from jaxlm.models.model import Seen
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import Readout
from jaxlm.objectives import distill
from jaxlm.objectives.outputs import Predicted

ALONE = Layout()
RNG = np.random.default_rng(0)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]])


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * (np.log(p) - np.log(q))).sum(-1)


def divergence(kind: str, p: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    m = beta * p + (1 - beta) * q
    return dict(forward=kl(p, q), reverse=kl(q, p), jsd=beta * kl(p, m) + (1 - beta) * kl(q, m))[kind]


def predicted(z: np.ndarray, weights: np.ndarray) -> Predicted:
    return Predicted(jnp.asarray(z, jnp.float32), jnp.asarray(weights, jnp.float32))


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("top_k", [0, 3, 7])
def test_logits_are_compared_as_written_down(kind, top_k):
    """With T² and a temperature, over all classes or over the likeliest and the rest as one."""
    c = Logits(divergence=kind, temperature=1.7, beta=0.3, top_k=top_k)
    t, s = 2 * RNG.standard_normal((2, 2, 5, 7))
    weights = RNG.random((2, 5))
    p, q = softmax(t / 1.7), softmax(s / 1.7)
    if top_k == 3:
        order = np.argsort(-p, -1)[..., :3]
        p, q = (np.take_along_axis(x, order, -1) for x in (p, q))
        p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
    wanted = 1.7**2 * (divergence(kind, p, q, 0.3) * weights).sum()
    found = distill.logits(c, predicted(t, weights), predicted(s, weights), None, ALONE)
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("top_k", [0, 3, 7])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(kind, top_k):
    c = Logits(divergence=kind, top_k=top_k)
    z = predicted(3 * RNG.standard_normal((2, 5, 7)), np.ones((2, 5)))
    loss = lambda x: distill.logits(c, z, z._replace(logits=x), None, ALONE)  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(z.logits)
    np.testing.assert_allclose(value, 0, atol=2e-6)
    np.testing.assert_allclose(gradient, 0, atol=2e-6)


def test_the_padding_of_two_vocabularies_is_not_compared():
    """Heads of 9 and of 12 rows for 7 tokens: as if both had 7, whatever the logits of the others."""
    x, y = (jnp.asarray(RNG.standard_normal((2, 5, 4)), jnp.float32) for _ in range(2))
    w, v = (jnp.asarray(RNG.standard_normal((12, 4)), jnp.float32) for _ in range(2))
    weights = jnp.ones((2, 5))

    def loss(rows: int, others: int) -> jax.Array:
        both = [Predicted(Readout(h, head), weights) for h, head in ((x, w[:rows]), (y, v[:others]))]
        return distill.logits(Logits(divergence="jsd"), *both, 7, ALONE)

    np.testing.assert_allclose(loss(9, 12), loss(7, 7), rtol=1e-5)
    np.testing.assert_allclose(loss(12, 9), loss(7, 7), rtol=1e-5)


def seen(width: int, heads: int, segments: np.ndarray = SEGMENTS, seed: int = 0) -> tuple[Seen, list[dict]]:
    rng = np.random.default_rng(seed)
    B, T = segments.shape
    shapes = dict(hidden=(B, T, width), q=(B, T, heads, width // heads), k=(B, T, heads, width // heads))
    layers = [{name: rng.standard_normal(shape) for name, shape in shapes.items()} for _ in range(2)]
    arrays = [{name: jnp.asarray(x, jnp.float32) for name, x in layer.items()} for layer in layers]
    return Seen(arrays, jnp.asarray(segments)), layers


@pytest.mark.parametrize("measure", ["mse", "cosine"])
@pytest.mark.parametrize("projected", [False, True])
def test_hidden_states_are_compared_as_written_down(measure, projected):
    """On real tokens alone, the mean over pairs of layers, through a map where the widths differ."""
    (mine, s), (theirs, t) = seen(4, 2, seed=1), seen(6 if projected else 4, 2, seed=2)
    pairs = ((0, 1), (1, 0))
    maps = {str(i): RNG.standard_normal((4, 6)) for i in range(2)} if projected else {}
    wanted = 0.0
    for i, (a, b) in enumerate(pairs):
        x, y = s[a]["hidden"], t[b]["hidden"]
        x = x @ maps[str(i)] if projected else x
        cosine = 1 - (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))
        apart = np.square(x - y).mean(-1) if measure == "mse" else cosine
        wanted += apart[SEGMENTS > 0].sum() / 2
    maps32 = {name: jnp.asarray(w, jnp.float32) for name, w in maps.items()}
    found = distill.hidden(Hidden(measure=measure), pairs, maps32, mine, theirs, ALONE)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_relations_are_compared_as_written_down():
    """Of relation heads that neither side attends with, within each text of a row."""
    c, heads = Relations(of=("q", "k")), 3
    (mine, s), (theirs, t) = seen(12, 2, seed=1), seen(6, 2, seed=2)
    wanted = 0.0
    for name in c.of:
        for b, row in enumerate(SEGMENTS):
            for h in range(heads):
                x, y = (side[1][name][b].reshape(6, heads, -1)[:, h] for side in (s, t))
                for i in np.flatnonzero(row):
                    same = row == row[i]
                    new, old = (softmax(v[i] @ v[same].T / np.sqrt(v.shape[-1])) for v in (x, y))
                    wanted += kl(old, new) / (heads * 2)
    found = distill.relations(c, (1, 1), heads, mine, theirs, ALONE)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_states_of_padding_change_nothing():
    (mine, _), (theirs, _) = seen(4, 2, seed=1), seen(4, 2, seed=2)
    spoiled = Seen([{name: jnp.where(SEGMENTS.reshape(2, 6, *[1] * (x.ndim - 2)) > 0, x, 1e3)
                     for name, x in layer.items()} for layer in theirs.layers], theirs.segments_BT)  # fmt: skip
    for other in (theirs, spoiled):
        values = [distill.hidden(Hidden(), ((0, 0),), {}, mine, other, ALONE),
                  distill.relations(Relations(of=("q",)), (0, 0), 2, mine, other, ALONE)]  # fmt: skip
        if other is theirs:
            first = values
    np.testing.assert_array_equal(first, values)
