"""AdaLoRA's allocator beside the paper's formulas in NumPy, and the loss that keeps its matrices orthogonal."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.adapted_models import batch_of, logits, make

from jaxlm.core import tree
from jaxlm.weights.adapters import AdaLora, adalora

C = AdaLora(rank=4, target_rank=1, warmup=0.2, final_tuning=0.3)
STEPS, RATE = 10, 0.1


def test_the_budget_falls_by_a_cube_between_warmup_and_final_tuning():
    found = [float(adalora.budget(C, STEPS, t)) for t in range(STEPS + 1)]
    assert found[:3] == [1, 1, 1] and found[7:] == [0.25] * 4
    np.testing.assert_allclose(found[3:7], [0.25 + 0.75 * (1 - (t - 2) / 5) ** 3 for t in range(3, 7)], rtol=1e-6)


def adapter() -> dict:
    keys = iter(jax.random.split(jax.random.key(0), 9))
    shape = dict(a=(2, 3, 4), b=(2, 4, 2, 2), e=(2, 4))
    return {site: {n: jax.random.normal(next(keys), s) for n, s in shape.items()} for site in ("x", "y")}


def gradients(step: int, params: dict) -> dict:
    return tree.map_named(lambda path, x: jnp.sin(x * 3 + step + len(path)), params)


def test_directions_are_kept_as_the_paper_says():
    params = {"adapter": adapter(), "head": jnp.ones(3)}
    tx = adalora.allocating(C, optax.sgd(RATE), STEPS)
    state, update = tx.init(params), jax.jit(tx.update)
    mine = {path: np.array(x) for path, x in tree.flatten(params).items()}
    average, strays, kept = (dict.fromkeys(mine, 0.0) for _ in range(3))
    for t in range(1, STEPS + 1):
        grads = gradients(t, params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)

        score = {}
        for path, g in tree.flatten(grads).items():
            now = np.abs(mine[path] * np.array(g))
            average[path] = 0.85 * average[path] + 0.15 * now
            strays[path] = 0.85 * strays[path] + 0.15 * np.abs(now - average[path])
            score[path] = average[path] * strays[path]
            mine[path] = mine[path] - RATE * np.array(g)
        triplets = {
            site: score[f"adapter/{site}/e"]
            + score[f"adapter/{site}/a"].mean(1)
            + score[f"adapter/{site}/b"].mean((2, 3))
            for site in ("x", "y")
        }
        if t <= 7:  # then the last 30 % settle
            every = np.sort(np.concatenate([s.ravel() for s in triplets.values()]))[::-1]
            least = every[round(float(adalora.budget(C, STEPS, t)) * every.size) - 1]
            kept = {site: s >= least for site, s in triplets.items()}
        for site, mask in kept.items():
            mine[f"adapter/{site}/e"] = mine[f"adapter/{site}/e"] * mask
        for path, x in tree.flatten(params).items():
            np.testing.assert_allclose(x, mine[path], atol=1e-5, err_msg=f"{path} after step {t}")
    ranks = adalora.ranks(params)
    assert sum(map(sum, ranks.values())) == 4 and len(set(ranks["x"] + ranks["y"])) > 1, "a quarter, not evenly"


def test_the_penalty_is_the_mean_distance_from_orthogonal():
    params = {"adapter": adapter()}
    norms = []
    for path, x in tree.flatten(params).items():
        if path.endswith("/a"):
            norms += [np.linalg.norm(m.T @ m - np.eye(4)) for m in np.array(x).reshape(2, 3, 4)]
        elif path.endswith("/b"):
            norms += [np.linalg.norm(m @ m.T - np.eye(4)) for m in np.array(x).reshape(2, 4, 4)]
    assert float(adalora.penalty(C, params)) == pytest.approx(0.5 * np.mean(norms), rel=1e-5)


def test_what_is_cut_off_says_nothing():
    """A direction whose e is zero adds nothing, whatever its a and b are."""
    model = make("llama", AdaLora(rank=4))
    weights = jax.jit(lambda key: model.adapter.init(model.adapter.specs(), key))(jax.random.key(0))
    other = tree.map_named(lambda path, x: x + 1 if path.startswith("adapter/") and path[-1] in "ab" else x, weights)
    run = jax.jit(lambda w: logits(model, w, batch_of("llama")))
    np.testing.assert_array_equal(run(weights), run(other))
