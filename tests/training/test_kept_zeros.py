"""Zeros of pruned weights stay zeros under any optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core import config
from jaxlm.core.spec import Spec, zeros
from jaxlm.training import optimizers
from jaxlm.training.kept_zeros import keep_zeros


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor", "muon"])
def test_zeros_stay_under_every_optimizer(name):
    specs = {"blocks": {n: Spec((2, 8, 8), ("layers", "embed", "ffn"), zeros) for n in ("up", "down")}}
    made = optimizers.make(
        config.Optim(name=name, warmup=0), 4, specs, wrap=lambda tx, steps: keep_zeros(tx, {"blocks/up"})
    )
    rng = np.random.default_rng(0)
    draw = lambda: jnp.asarray(rng.standard_normal((2, 8, 8)), jnp.float32)  # noqa: E731
    kept = draw() > 0
    params = {"blocks": {"up": jnp.where(kept, draw(), 0), "down": jnp.where(kept, draw(), 0)}}
    state, first = made.tx.init(params), params
    step = jax.jit(made.tx.update)
    for _ in range(3):
        updates, state = step({"blocks": {"up": draw(), "down": draw()}}, state, params)
        params = optax.apply_updates(params, updates)
    assert (np.asarray(params["blocks"]["up"] == 0) == ~np.asarray(kept)).all()
    assert (np.asarray(params["blocks"]["down"]) != 0).mean() > 0.9
    assert (np.asarray(params["blocks"]["up"]) != np.asarray(first["blocks"]["up"]))[np.asarray(kept)].all()
