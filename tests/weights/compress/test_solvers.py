"""Solvers against their formulas written out in float64: one input after another, without blocks and factors."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlm.core.compression import Awq, Format, Gptq, Magnitude, Nearest, Smooth, SparseGpt, Sparsity, Wanda
from jaxlm.nn.leaf import dense
from jaxlm.weights.compress import rounding
from jaxlm.weights.compress.hessian import inverse_factor
from jaxlm.weights.compress.solve import solve
from jaxlm.weights.compress.statistics import Statistics

INT8 = Format("int8")
GROUPS = Format("int4", 32)
ZERO = Format("int4", 64, zero_point=True)


@functools.cache
def inputs(seed: int = 0, n: int = 160, tokens: int = 400) -> np.ndarray:
    """Correlated inputs of unequal size, one of them always zero."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, n)) @ rng.standard_normal((n, n)) / np.sqrt(n) + rng.standard_normal(
        (tokens, n)
    )
    mixed *= np.exp(rng.standard_normal(n))
    mixed[:, 5] = 0
    return mixed.astype(np.float32)


def weight(seed: int = 0, n: int = 160, outs: int = 6) -> np.ndarray:
    return np.random.default_rng(seed + 100).standard_normal((n, outs)).astype(np.float32)


def record(seed: int = 0, n: int = 160) -> Statistics:
    return Statistics.of(jnp.asarray(inputs(seed, n)))


@functools.cache
def compiled(c):
    return jax.jit(lambda w, s: solve(c, w, 1, 1, s))


def by_output(x: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """Returns each output's mean squared error over tokens."""
    return np.square(x.astype(np.float64) @ difference).mean(0)


def steps(f: Format, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns scale and zero point of each output of a group."""
    if f.kind == "int8":
        return abs(group).max(0) / 127, np.zeros(group.shape[1])
    low, high = np.minimum(group.min(0), 0), np.maximum(group.max(0), 0)
    scale = (high - low) / 15 if f.zero_point else abs(group).max(0) / 7
    scale = scale.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    return scale, np.clip(np.round(-low / scale), 0, 15) if f.zero_point else np.full(len(scale), 8.0)


def rounded(f: Format, row: np.ndarray, grid: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    scale, zero = grid
    low, high = (-127, 127) if f.kind == "int8" else (0, 15)
    return (np.clip(np.round(row / scale) + zero, low, high) - zero) * scale


def damped_inverse(x: np.ndarray, damp: float) -> np.ndarray:
    hessian = x.astype(np.float64).T @ x / len(x)
    squares = np.diag(hessian).copy()
    hessian += np.diag(np.where(squares == 0, squares[squares > 0].mean(), 0))
    return np.linalg.inv(hessian + damp * np.diag(hessian).mean() * np.eye(len(hessian)))


def eliminate(inverse: np.ndarray, i: int) -> None:
    """Takes input `i` out of the inverse Hessian of those that are left."""
    inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]


def reference_gptq(c: Gptq, w: np.ndarray, x: np.ndarray) -> np.ndarray:
    f, n, original = c.format, len(w), w.astype(np.float64)
    size, w, inverse = f.inputs or n, original.copy(), damped_inverse(x, c.damp)
    squares = np.square(x.astype(np.float64)).mean(0)
    squares[squares == 0] = squares[squares > 0].mean()
    order = np.argsort(-squares) if c.act_order else np.arange(n)
    made, grid, left = np.empty_like(w), None, list(order)
    for i in order:
        first = i // size * size
        if c.act_order or not f.inputs:
            grid = steps(f, original[first : first + size])
        elif i == first:
            grid = steps(f, w[first : first + size])
        made[i] = rounded(f, w[i], grid)
        left.remove(i)
        w[left] -= np.outer(inverse[left, i], w[i] - made[i]) / inverse[i, i]
        eliminate(inverse, i)
    plain = np.concatenate([rounded(f, g, steps(f, g)) for g in np.split(original, range(size, n, size))])
    return np.where(by_output(x, made - original) <= by_output(x, plain - original), made, plain)


@pytest.mark.parametrize(
    "c",
    [
        pytest.param(Gptq(INT8), id="int8", marks=pytest.mark.slow),
        pytest.param(Gptq(GROUPS), id="groups in order of squares"),
        pytest.param(Gptq(GROUPS, act_order=False), id="groups as they come"),
        pytest.param(Gptq(ZERO, act_order=False, damp=0.1), id="zero points", marks=pytest.mark.slow),
    ],
)
def test_gptq_is_within_a_hundredth_of_the_formula_and_never_worse_than_nearest(c):
    for seed in range(4):
        x, w = inputs(seed), weight(seed)
        found = compiled(c)(w, record(seed))
        wanted = by_output(x, reference_gptq(c, w, x) - w).sum()
        made = np.asarray(dense(found.weight), np.float64)
        assert by_output(x, made - w).sum() == pytest.approx(wanted, rel=0.01), seed
        assert float(found.error) == pytest.approx(wanted, rel=0.01)
        plain = by_output(x, np.asarray(dense(compiled(Nearest(c.format))(w, record(seed)).weight)) - w)
        assert (by_output(x, made - w) <= plain * (1 + 1e-4)).all(), "each output"
        assert float(found.plain_error) == pytest.approx(plain.sum(), rel=1e-3)
        assert wanted < 0.8 * plain.sum(), "and much better on these"
        assert float(found.power) == pytest.approx(by_output(x, w).sum(), rel=1e-3)
        assert float(found.damp) == np.float32(c.damp)


@pytest.mark.slow
@pytest.mark.parametrize("f", [Format("fp8"), Format("fp8", 128), Format("mxfp4")], ids=["fp8", "blocks", "mxfp4"])
def test_gptq_rounds_to_floats_too(f):
    for act_order in (True, False):
        c = Gptq(f, act_order=act_order)
        found = compiled(c)(weight(), record())
        x, w = inputs(), weight()
        plain = compiled(Nearest(f))(w, record())
        error = by_output(x, np.asarray(dense(found.weight)) - w)
        assert (error <= by_output(x, np.asarray(dense(plain.weight)) - w) * (1 + 1e-4)).all()
        assert float(found.error) < 0.9 * float(plain.error)


def test_inputs_of_rank_one_are_damped_until_they_can_be_factored():
    x = np.outer(np.random.default_rng(0).standard_normal(50), np.ones(160)).astype(np.float32)
    factor, damp = jax.jit(inverse_factor, static_argnums=1)(Statistics.of(jnp.asarray(x)).hessian, 1e-12)
    assert 1e-12 < float(damp) < 1e-3, "the damp that was used is told"
    hessian = x.astype(np.float64).T @ x / len(x)
    inverse = np.linalg.inv(hessian + float(damp) * np.diag(hessian).mean() * np.eye(160))
    np.testing.assert_allclose(np.diag(factor), np.diag(np.linalg.cholesky(inverse)), rtol=0.25)
    np.testing.assert_array_equal(factor, np.triu(factor))


def test_awq_scales_are_those_of_brute_force():
    for seed in range(4):
        x, w = inputs(seed), weight(seed)
        found = compiled(Awq(GROUPS))(w, record(seed))
        magnitudes, tried = abs(x.astype(np.float64)).mean(0), []
        for i in range(20):
            scale = np.maximum(magnitudes ** (i / 20), 1e-4)
            scale = scale / np.sqrt(scale.max() * scale.min())
            groups = np.split(w * scale[:, None], range(32, 160, 32))
            made = np.concatenate([rounded(GROUPS, g, steps(GROUPS, g)) for g in groups]) / scale[:, None]
            tried.append((by_output(x, made - w).sum(), i, scale))
        error, i, scale = min(tried, key=lambda t: t[0])
        assert i > 0, "the search has something to find"
        np.testing.assert_allclose(1 / found.weight.by, scale, rtol=1e-3)
        assert float(found.error) == pytest.approx(error, rel=0.01)
        assert float(found.error) <= float(found.plain_error) == pytest.approx(tried[0][0], rel=0.01)


def test_smoothquant_divides_inputs_by_its_formula_and_the_product_stays():
    x, w = inputs(), weight()
    w[7] = 0
    found = compiled(Smooth(alpha=0.75))(w, record())
    with np.errstate(divide="ignore"):
        scale = abs(x).max(0) ** 0.75 / abs(w).max(1) ** 0.25
    scale[[5, 7]] = 1
    np.testing.assert_allclose(1 / found.weight.by, scale, rtol=1e-5)
    step = abs(w * scale[:, None]).max(0) / 127 / scale[:, None]
    assert (abs(np.asarray(dense(found.weight)) - w) <= step * 0.501).all()
    assert float(found.error) / float(found.power) < 1e-3
    zero = rounding.smooth_scale(Smooth(), jnp.zeros(2), jnp.ones(2))
    np.testing.assert_array_equal(zero, [1, 1])


def least(score: np.ndarray, n: int) -> np.ndarray:
    """Returns where the `n` least scores of the first axis are, of each column."""
    gone = np.zeros(score.shape, bool)
    np.put_along_axis(gone, np.argsort(score, 0, kind="stable")[:n], True, 0)
    return gone


@pytest.mark.parametrize(
    "sparsity", [Sparsity(0.5), Sparsity(0.37), Sparsity(kept=2, of=4)], ids=["0.5", "0.37", "2:4"]
)
def test_wandas_mask_is_that_of_its_formula(sparsity):
    for seed in range(4):
        x, w = inputs(seed), weight(seed)
        score = abs(w.astype(np.float64)) * np.linalg.norm(x.astype(np.float64), axis=0)[:, None]
        if sparsity.of:
            gone = np.concatenate([least(s, 2) for s in np.split(score, 40)])
        else:
            gone = least(score, int(160 * sparsity.share))
        found = compiled(Wanda(sparsity))(w, record(seed))
        np.testing.assert_array_equal(found.mask, ~gone)
        np.testing.assert_array_equal(found.weight, np.where(gone, 0, w))
        assert float(found.error) == pytest.approx(by_output(x, np.where(gone, w, 0)).sum(), rel=1e-3)


def reference_sparse_gpt(c: SparseGpt, w: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    (n, outs), of, inverse = w.shape, c.sparsity.of, damped_inverse(x, c.damp)
    diagonal = np.diag(np.linalg.cholesky(inverse))[:, None]
    w = np.where(np.square(x).sum(0)[:, None] == 0, 0, w).astype(np.float64)
    gone, size = np.zeros((n, outs), bool), of or c.block
    for i in range(n):
        if i % size == 0:
            score = np.square(w[i : i + size] / diagonal[i : i + size])
            if of:
                gone[i : i + size] = least(score, of - c.sparsity.kept)
            else:
                count = int(score.size * c.sparsity.share)
                gone[i : i + size] = least(score.reshape(-1, 1), count).reshape(score.shape)
        error = np.where(gone[i], w[i], 0)
        w[i + 1 :] -= np.outer(inverse[i + 1 :, i], error) / inverse[i, i]
        w[i] -= error
        eliminate(inverse, i)
    return w, ~gone


@pytest.mark.parametrize(
    "c",
    [SparseGpt(Sparsity(0.5), block=48), SparseGpt(Sparsity(kept=2, of=4), block=48)],
    ids=["half, and a last block of 16", "2:4"],
)
def test_sparsegpt_is_within_a_hundredth_of_the_formula_and_never_worse_than_magnitude(c):
    for seed in range(4):
        x, w = inputs(seed), weight(seed)
        wanted, _ = reference_sparse_gpt(c, w, x)
        found = compiled(c)(w, record(seed))
        made = np.asarray(found.weight, np.float64)
        assert by_output(x, made - w).sum() == pytest.approx(by_output(x, wanted - w).sum(), rel=0.01)
        plain = compiled(Magnitude(c.sparsity))(w, record(seed))
        assert float(found.error) < 0.7 * float(plain.error) == pytest.approx(0.7 * float(found.plain_error), rel=1e-3)
        assert (made[~np.asarray(found.mask)] == 0).all()


@pytest.mark.parametrize(
    ("kept", "of"), [(2, 4), pytest.param(4, 8, marks=pytest.mark.slow), pytest.param(1, 5, marks=pytest.mark.slow)]
)
def test_a_pattern_holds_exactly(kept, of):
    w, sparsity = weight(), Sparsity(kept=kept, of=of)
    w[8:12] = 0  # ties
    for c in (Magnitude(sparsity), Wanda(sparsity), SparseGpt(sparsity, block=48)):
        found = compiled(c)(w, record())
        assert (np.asarray(found.mask).reshape(-1, of, 6).sum(1) == kept).all(), c
        assert (np.count_nonzero(np.asarray(found.weight).reshape(-1, of, 6), axis=1) <= kept).all(), c


def test_a_share_holds_to_a_number():
    w = weight()
    w[8:12] = 0  # ties
    mask = np.asarray(compiled(Magnitude(Sparsity(0.37)))(w, record()).mask)
    assert (~mask).sum() == int(160 * 6 * 0.37)
    assert abs(w)[~mask].max() <= abs(w)[mask].min()
    mask = np.asarray(compiled(Wanda(Sparsity(0.37)))(w, record()).mask)
    assert ((~mask).sum(0) == int(160 * 0.37)).all()


def apart(mixed: float, seed: int) -> np.ndarray:
    """Inputs that hang together by a little or not at all, so that nothing can be made up for by others."""
    noise = np.random.default_rng(seed).standard_normal((160, 160))
    return (np.sqrt(160) * np.eye(160) + mixed * noise).astype(np.float32)


def test_gptq_is_never_worse_than_nearest_in_any_output():
    luck = 0
    for seed in range(6):
        x, w = apart(0.05, seed), weight(seed)
        s = Statistics.of(jnp.asarray(x))
        found, plain = (compiled(c)(w, s) for c in (Gptq(GROUPS, act_order=False), Nearest(GROUPS)))
        ours, theirs = (by_output(x, np.asarray(dense(r.weight)) - w) for r in (found, plain))
        assert (ours <= theirs * (1 + 1e-5)).all()
        luck += (ours >= theirs * (1 - 1e-5)).sum()
    assert luck > 3, "rounding to the nearest is the better of the two in some"


def test_sparsegpt_is_never_worse_than_magnitude():
    for seed in range(6):
        found = compiled(SparseGpt(Sparsity(0.5), block=48))(weight(seed), Statistics.of(jnp.asarray(apart(0, seed))))
        assert float(found.error) <= float(found.plain_error) * (1 + 1e-5)
        assert int((~found.mask).sum()) == 160 * 6 // 2


@pytest.mark.parametrize(
    "c",
    [
        pytest.param(Gptq(GROUPS, act_order=False), id="gptq"),
        pytest.param(Awq(GROUPS, ratios=2), id="awq", marks=pytest.mark.slow),
        pytest.param(SparseGpt(Sparsity(kept=2, of=4)), id="sparsegpt", marks=pytest.mark.slow),
    ],
)
def test_stacked_layers_with_many_dimensions_are_those_alone(c):
    w = jnp.stack([jnp.asarray(weight(i, 40, 6)).reshape(2, 20, 3, 2) for i in range(2)])
    records = [record(i, 40) for i in range(2)]
    found = jax.jit(lambda w, s: solve(c, w, 2, 2, s))(w, jax.tree.map(lambda *x: jnp.stack(x), *records))
    assert found.error.shape == (2,)
    for i in range(2):
        alone = compiled(c)(w[i].reshape(40, 6), records[i])
        layer = jax.tree.map(lambda x, i=i: x[i], found)
        assert dense(layer.weight).shape == (2, 20, 3, 2)
        np.testing.assert_allclose(dense(layer.weight).reshape(40, 6), dense(alone.weight), atol=1e-4)
        np.testing.assert_allclose(layer.error, alone.error, rtol=1e-3)


def test_what_does_not_fit_is_refused():
    w = jnp.asarray(weight())
    bare = Statistics.of(jnp.asarray(inputs()), hessian=False)
    for c, s, said in (
        (Wanda(), None, "statistics: Wanda needs the record of a weight's inputs; calibrate first"),
        (Gptq(), bare, "statistics: this method needs the Hessian; record it with hessian=True"),
        (Gptq(Format("nf4")), record(), "format: nf4 is rounded to the nearest alone"),
        (
            Magnitude(Sparsity(kept=2, of=7)),
            None,
            "kept: 2 of 7 doesn't fit a weight of 160 inputs; 7 must divide them",
        ),
        (Magnitude(Sparsity(kept=4, of=4)), None, "kept: 4 of 4 is no pattern; it must be such as 2 of 4"),
        (Wanda(), record(0, 40), r"statistics: of inputs \(40,\), but the weight's are \(160,\)"),
    ):
        with pytest.raises(ValueError, match=said):
            solve(c, w, 1, 1, s)
    without = jax.jit(lambda w: solve(Nearest(INT8), w, 1, 1))(w)
    wanted = np.square(np.asarray(dense(without.weight), np.float64) - weight()).sum()
    assert float(without.error) == pytest.approx(wanted, rel=1e-4)
