"""Factors of a matrix are the best of their rank for the inputs that were recorded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.compression import Svd
from jaxlm.nn.leaf import dense
from jaxlm.weights.compress import low_rank
from jaxlm.weights.compress.solve import solve
from jaxlm.weights.compress.statistics import Statistics


def inputs(tokens: int, width: int, seed: int = 0) -> np.ndarray:
    """Correlated inputs of unlike sizes."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, width)) @ rng.standard_normal((width, width))
    return mixed * np.exp(rng.uniform(-2, 2, width))


@pytest.mark.parametrize(("shape", "rank"), [((8, 5), 2), ((5, 8), 5), ((1, 4), 1)])
def test_the_error_is_the_sum_of_the_squares_of_what_went(shape, rank):
    x, w = inputs(200, shape[0]), np.random.default_rng(1).standard_normal(shape)
    record = Statistics.of(jnp.asarray(x, jnp.float32))
    found = low_rank.factored(jnp.asarray(w, jnp.float32), rank, record.needed_hessian())
    L = np.linalg.cholesky(x.T @ x / len(x))  # the published way, in float64
    d = np.linalg.svd(L.T @ w, compute_uv=False)
    assert float(found.error) == pytest.approx(np.square(d[rank:]).sum(), rel=1e-3, abs=1e-4 * np.square(d).sum())
    assert float(found.whole) == pytest.approx(np.square(d).sum(), rel=1e-4)
    made = np.asarray(found.a, np.float64) @ np.asarray(found.b, np.float64)
    measured = np.square(x @ (w - made)).sum() / len(x)
    assert measured == pytest.approx(np.square(d[rank:]).sum(), rel=1e-3, abs=1e-4 * np.square(d).sum())
    recorded = float(record.error(jnp.asarray(w - made, jnp.float32)).sum())
    assert recorded == pytest.approx(measured, rel=1e-2, abs=1e-3 * np.square(d).sum())


def test_nothing_of_the_rank_is_nearer():
    x, w = inputs(100, 6), np.random.default_rng(1).standard_normal((6, 5))
    H = jnp.asarray(x.T @ x / len(x), jnp.float32)
    best = float(low_rank.factored(jnp.asarray(w, jnp.float32), 2, H).error)
    plain = low_rank.factored(jnp.asarray(w, jnp.float32), 2)
    rng = np.random.default_rng(2)
    found = low_rank.factored(jnp.asarray(w, jnp.float32), 2, H)
    a, b = np.asarray(found.a, np.float64), np.asarray(found.b, np.float64)
    others = [np.asarray(plain.a) @ np.asarray(plain.b)]
    others += [(a + s * rng.standard_normal(a.shape)) @ (b + s * rng.standard_normal(b.shape))
               for s in (0.01, 0.1, 1) for _ in range(20)]  # fmt: skip
    errors = [np.square(x @ (w - other)).sum() / len(x) for other in others]
    assert min(errors) >= best * (1 - 1e-3) and errors[0] > 1.2 * best


def test_inputs_that_depend_on_each_other_or_are_never_there_do_no_harm():
    x, w = inputs(200, 6), np.random.default_rng(1).standard_normal((6, 5)).astype(np.float32)
    x[:, 3], x[:, 5] = 0, x[:, 0] + x[:, 1]
    H = jnp.asarray(x.T @ x / len(x), jnp.float32)
    found = low_rank.factored(jnp.asarray(w), 4, H)
    assert all(np.isfinite(np.asarray(part)).all() for part in jax.tree.leaves(found))
    made = np.asarray(found.a) @ np.asarray(found.b)
    np.testing.assert_allclose(x @ made, x @ w, atol=2e-3 * np.abs(x @ w).max())  # of four directions all are kept
    zero = low_rank.factored(jnp.asarray(w), 2, jnp.zeros((6, 6)))
    assert not np.asarray(zero.a).any() and float(zero.whole) == 0


def test_many_matrices_at_once_are_those_alone_and_ranks_are_checked():
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((3, 6, 4)).astype(np.float32), [inputs(50, 6, i) for i in range(3)]
    H = jnp.asarray(np.stack([a.T @ a / 50 for a in x]), jnp.float32)
    many = jax.jit(jax.vmap(lambda w, h: low_rank.factored(w, 2, h)))(jnp.asarray(w), H)
    for i in range(3):
        alone = low_rank.factored(jnp.asarray(w[i]), 2, H[i])
        np.testing.assert_allclose(many.a[i] @ many.b[i], alone.a @ alone.b, atol=1e-3)
    for rank in (0, 5):
        with pytest.raises(ValueError, match=rf"rank: {rank} is none of a matrix of 6 x 4; give 1 to 4"):
            low_rank.factored(jnp.asarray(w[0]), rank)


def test_a_weight_of_full_rank_is_the_same_and_errors_are_those_of_the_inputs_and_the_damp():
    x, w = inputs(30, 12), np.random.default_rng(1).standard_normal((2, 12, 2, 3)).astype(np.float32)
    records = [Statistics.of(jnp.asarray(part, jnp.float32)) for part in (x, x[:8])]  # of the second H is singular
    record = jax.tree.map(lambda *parts: jnp.stack(parts), *records)
    run = jax.jit(lambda c, w, s: solve(c, w, 1, 2, s), static_argnums=0)
    whole = run(Svd(6), jnp.asarray(w), record)
    assert whole.weight.a.shape == (2, 12, 6) and whole.weight.b.shape == (2, 6, 2, 3)
    np.testing.assert_allclose(dense(whole.weight), w, atol=1e-5)
    found = run(Svd(2), jnp.asarray(w), record)
    for layer, part in enumerate((x, x[:8])):
        H, flat = part.T @ part / len(part), w[layer].reshape(12, 6).astype(np.float64)
        damp = 0.01 * np.trace(H) / 12
        d = np.linalg.svd(np.linalg.cholesky(H + damp * np.eye(12)).T @ flat, compute_uv=False)
        apart = np.asarray(dense(found.weight), np.float64)[layer].reshape(12, 6) - flat
        wanted = np.square(d[2:]).sum() - damp * np.square(apart).sum()
        assert float(found.damp[layer]) == pytest.approx(damp, rel=1e-4)
        assert float(found.error[layer]) == pytest.approx(wanted, rel=1e-3)
        assert float(found.error[layer]) < float(found.plain_error[layer])
    with pytest.raises(ValueError, match="rank: 7 is none of a matrix of 12 x 6"):
        solve(Svd(7), jnp.asarray(w), 1, 2, record)
