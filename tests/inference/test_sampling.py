"""Drawing a token: each filter and penalty does what it says, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.inference.sampling import Sampling, check, forbid_repeats, numeric_settings, penalise, pick

Z = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))


def shares(z, n: int = 20_000, top_k: int = 0, **setting) -> np.ndarray:
    s = Sampling(top_k=top_k, **({"temperature": 1.0} | setting))
    check(s, len(z))
    drawn = pick(jnp.broadcast_to(z, (n, len(z))), jax.random.split(jax.random.key(0), n), numeric_settings(s), top_k)
    assert drawn.dtype == jnp.int32
    return np.bincount(drawn, minlength=len(z)) / n


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (dict(temperature=0.0), [1, 0, 0, 0]),
        (dict(), [0.4, 0.3, 0.2, 0.1]),
        (dict(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (dict(top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (dict(top_k=1), [1, 0, 0, 0]),
        (dict(top_p=0.5), [4 / 7, 3 / 7, 0, 0]),  # the token that crosses is kept
        (dict(top_p=0.05), [1, 0, 0, 0]),
        (dict(top_k=3, top_p=0.6), [4 / 7, 3 / 7, 0, 0]),  # top-p of what top-k left: 4/9 and 7/9
        (dict(top_p=0.95), [0.4, 0.3, 0.2, 0.1]),
        (dict(min_p=0.6), [4 / 7, 3 / 7, 0, 0]),
        (dict(min_p=0.6, temperature=3.0), [0.4, 0.3, 0.2, 0.1]),  # after the temperature, which lifts them all
        (dict(min_p=0.6, top_k=3, temperature=1.0), [4 / 7, 3 / 7, 0, 0]),
    ],
    ids=str,
)
def test_sampling_follows_the_distribution(setting, expected):
    found = shares(Z, **setting)
    if setting.get("temperature", 0) == 3.0:
        expected = np.exp(np.log(expected) / 3) / np.exp(np.log(expected) / 3).sum()
    np.testing.assert_allclose(found, expected, atol=0.015)
    assert (found[np.array(expected) == 0] == 0).all()


def test_the_order_of_the_vocabulary_does_not_matter():
    np.testing.assert_allclose(shares(Z[jnp.array([2, 0, 3, 1])], top_k=3, top_p=0.6), [0, 4 / 7, 0, 3 / 7], atol=0.015)
    np.testing.assert_allclose(shares(Z[jnp.array([2, 0, 3, 1])], top_p=0.5), [0, 4 / 7, 0, 3 / 7], atol=0.015)


def test_rows_are_filtered_by_themselves():
    z = jnp.stack([Z, Z[::-1]])
    for top_k, setting in ((1, {}), (0, dict(top_p=0.3))):
        used = numeric_settings(Sampling(temperature=1.0, **setting))
        drawn = [pick(z, jax.random.split(jax.random.key(i)), used, top_k).tolist() for i in range(3)]
        assert drawn == [[0, 3]] * 3


def test_penalties():
    z = jnp.array([[2.0, -2.0, 1.0, 0.5]])
    seen, counts = jnp.array([[True, True, False, True]]), jnp.array([[2, 0, 0, 1]])
    used = numeric_settings(Sampling(repetition_penalty=2.0))
    np.testing.assert_allclose(penalise(z, used, seen, counts), [[1.0, -4.0, 1.0, 0.25]])
    used = numeric_settings(Sampling(presence_penalty=0.5, frequency_penalty=1.0))
    np.testing.assert_allclose(penalise(z, used, seen, counts), [[-0.5, -2.0, 1.0, -1.0]])


def test_repeats_are_forbidden_over_real_tokens_alone():
    history = jnp.array([[0, 0, 1, 2, 3, 0, 9, 9], [1, 2, 3, 1, 2, 0, 9, 9]])  # 9 lies beyond what is read
    real = jnp.array([[False, False] + 6 * [True], 8 * [True]])

    def forbidden(n: int) -> list[list[int]]:
        z = forbid_repeats(jnp.zeros((2, 10)), history, real, 6, n)
        return [np.flatnonzero(np.isinf(row)).tolist() for row in z]

    assert forbidden(1) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert forbidden(2) == [[], []]  # padding before 1 is no 0
    history = history.at[:, 5].set(jnp.array([2, 3]))
    assert forbidden(2) == [[3], [1]] and forbidden(3) == [[], [1]] and forbidden(5) == [[], []]


def test_only_what_is_used_is_computed():
    assert numeric_settings(Sampling(top_p=0.5, min_p=0.1)) == {}  # greedy
    assert numeric_settings(Sampling(temperature=1.0, top_p=0.5)) == {"temperature": 1.0, "top_p": 0.5}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(temperature=-1.0), "temperature: -1.0 is out of range"),
        (dict(temperature=float("nan")), "temperature: nan is out of range"),
        (dict(top_k=-1), "top_k: -1 is out of range"),
        (dict(top_k=33), "top_k: 33 is out of range; the vocabulary has 32"),
        (dict(top_p=0.0), "top_p: 0.0 is out of range"),
        (dict(top_p=1.1), "top_p: 1.1 is out of range"),
        (dict(min_p=-0.1), "min_p"),
        (dict(tokens=0), "tokens: 0 is out of range"),
        (dict(repetition_penalty=0.0), "repetition_penalty"),
        (dict(stop_ids=(32,)), "stop_ids: 32 is not a token"),
        (dict(stop=("",)), "stop: an empty text"),
        (dict(samples=2), "samples: greedy answers are all the same"),
        (dict(beams=2, temperature=1.0), "beams: beam search does not go with temperature"),
        (dict(beams=2, samples=3), "beams: beam search does not go with 3 samples"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=f"sampling.{message}"):
        check(Sampling(**setting), 32)
