"""Formulas of merging: mergekit's numbers, and laws that hold whatever the stretches are."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from support.merge_rows import NAME, ROWS, models

from jaxlm.weights import merging
from jaxlm.weights.merging import METHODS, Settings, Stretch

GOLDEN = Path(__file__).parents[1] / "golden" / "merge.npz"
USUAL = {"dare_linear": 0.5, "dare_ties": 0.5, "breadcrumbs": 0.5}


def merged(s: Settings, base: np.ndarray | None, thetas: list[np.ndarray], step: int = 1 << 20) -> np.ndarray:
    """Merges tensors of memory, read in stretches of `step` numbers."""
    method, size = METHODS[s.method], thetas[0].size
    thetas = thetas[: method.most]
    base = base if method.needs_base else None

    def read():
        for start in range(0, size, step):
            rows = np.stack([x.reshape(-1)[start : start + step] for x in thetas])
            yield Stretch(start, None if base is None else base.reshape(-1)[start : start + step], rows)

    s = merging.resolved(s, len(thetas), base is not None)
    stretches = list(merging.merge(s, merging.Tensor(NAME, size, read)))
    return np.concatenate(stretches).reshape(thetas[0].shape)


@pytest.mark.parametrize("row", ROWS)
def test_every_method_gives_mergekits_numbers(row):
    s, shapes = ROWS[row]
    golden = np.load(GOLDEN)
    for shape in shapes:
        base, *thetas = models(shape)
        expected = golden[f"{row}/{len(shape)}"]
        np.testing.assert_allclose(merged(s, base, thetas), expected, rtol=0, atol=1e-6)
        assert np.abs(expected - base).max() > 0.1  # the row says something


@pytest.mark.parametrize("row", ROWS)
def test_stretches_change_nothing(row):
    s, [shape, *_] = ROWS[row]
    base, *thetas = models(shape)
    base, thetas = np.round(base, 1), [np.round(x, 1) for x in thetas]  # many changes of equal magnitude
    at_once = merged(s, base, thetas)
    for step in (1, 7, 100):
        np.testing.assert_allclose(merged(s, base, thetas, step), at_once, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_merged_with_itself_is_itself(method):
    for shape in ((24, 18), (1,)):
        theta, *_ = models(shape)
        same = merged(Settings(method, density=USUAL.get(method)), theta, [theta] * 3).astype(np.float32)
        np.testing.assert_array_equal(same, theta)


def test_linear_of_two_is_their_mean_and_slerp_keeps_their_length():
    _, a, b, _ = models((24, 18))
    a, b = (x / np.linalg.norm(x) for x in (a, b))
    angle = np.arccos((a.astype(np.float64) * b).sum())
    np.testing.assert_allclose(merged(Settings("linear"), None, [a, b]), (a.astype(np.float64) + b) / 2, atol=1e-15)
    for t in (0.0, 0.25, 1.0):
        between = merged(Settings("slerp", t=t), None, [a, b])
        assert np.linalg.norm(between) == pytest.approx(1, abs=1e-6)
        assert np.arccos(min((between * a).sum(), 1)) == pytest.approx(t * angle, abs=1e-3)


def test_slerp_of_what_has_no_arc_is_a_line():
    _, a, *_ = models((31,))
    for b in (a * np.float32(2), -a, np.zeros_like(a)):
        np.testing.assert_allclose(merged(Settings("slerp"), None, [a, b]), (a + b) / 2, atol=1e-7)


def test_ties_keeps_exactly_the_share_and_of_equals_the_first():
    base = np.zeros(10, np.float32)
    theta = np.array([1, -2, 2, 2, 0, 1, -2, 2, 1, 0], np.float32)
    kept = merged(Settings("ties", density=0.3), base, [theta])
    np.testing.assert_array_equal(kept, [0, -2, 2, 2, 0, 0, 0, 0, 0, 0])
    middle = merged(Settings("breadcrumbs", density=0.4, gamma=0.2), base, [theta])
    np.testing.assert_array_equal(middle, [1, 0, 0, 2, 0, 0, -2, 2, 0, 0])
    everything = merged(Settings("ties", density=1e-9), base, [theta])
    assert np.count_nonzero(everything) == 1


def test_cuts_are_those_of_a_sort():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 5000)) * 10.0 ** rng.integers(-30, 30, (2, 5000))).astype(np.float32)
    x[0, :50] = 0
    tensor = merging.Tensor("w", 5000, lambda: iter([Stretch(0, np.zeros(5000, np.float32), x.copy())]))
    for count in (1, 2, 1234, 4999, 5000):
        for row, [cut] in zip(x, merging.find_cuts(tensor, 2, [count]), strict=True):
            magnitudes = np.sort(np.abs(row))[::-1]
            assert np.uint32(cut.bits).view(np.float32) == magnitudes[count - 1]
            assert cut.equal == count - (magnitudes > magnitudes[count - 1]).sum()


def test_what_dare_keeps_depends_on_seed_model_tensor_and_position_alone():
    whole = merging.random_kept(1, 0, "w", 0, 4000, 0.3)
    for start in (0, 1, 2, 3, 5, 1000):
        np.testing.assert_array_equal(merging.random_kept(1, 0, "w", start, 77, 0.3), whole[start : start + 77])
    assert whole.mean() == pytest.approx(0.3, abs=0.03)
    for other in ((2, 0, "w"), (1, 1, "w"), (1, 0, "v")):
        assert 0.5 < (merging.random_kept(*other, 0, 4000, 0.3) == whole).mean() < 0.66


def test_dare_keeps_the_mean_change():
    theta = np.ones(200_000, np.float32)
    sparse = merged(Settings("dare_linear", density=0.1), np.zeros_like(theta), [theta])
    assert set(np.unique(sparse)) == {0, np.float32(10)} and sparse.mean() == pytest.approx(1, abs=0.02)


def test_models_that_share_no_direction_leave_the_base():
    base, theta, *_ = models((31,))
    apart = merged(Settings("model_stock"), base, [theta, 2 * base - theta])
    np.testing.assert_array_equal(apart, base)


@pytest.mark.parametrize(
    ("s", "count", "base", "message"),
    [
        (Settings("ties"), 2, False, "base: ties merges what models changed since their base; name that model"),
        (Settings("linear"), 2, True, "base: linear has none"),
        (Settings("slerp"), 3, False, "models: slerp merges 2, and here are 3"),
        (Settings("linear"), 1, False, "models: linear merges 2 or more, and here are 1"),
        (Settings("linear", weights=(1.0,)), 2, False, "weights: 1 for 2 models; give one for each"),
        (Settings("linear", weights=(1.0, -1.0)), 2, False, "weights: .* add up to 0"),
        (Settings("linear", t=0.0), 2, False, "t: linear has no such setting"),
        (Settings("ties", seed=1), 2, True, "seed: ties has no such setting"),
        (Settings("slerp", weights=(1.0, 1.0)), 2, False, "weights: slerp has no such setting"),
        (Settings("dare_ties"), 2, True, "density: dare_ties has no usual value of it; give one"),
    ],
)
def test_settings_that_do_not_fit_are_told(s, count, base, message):
    with pytest.raises(ValueError, match=message):
        merging.resolved(s, count, base)


def test_settings_come_with_the_methods_own_values():
    own = merging.resolved(Settings("ties"), 2, True)
    assert dataclasses.asdict(own) == dict(
        method="ties", weights=(1, 1), t=None, density=0.2, gamma=None, scale=1, rescale=None, seed=0
    )
