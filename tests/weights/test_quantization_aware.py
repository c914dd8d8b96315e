"""Matrices that are trained for few bits: used as rounded, with the gradients of what they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_models import SHAPES, random_weights

from jaxlm.core import config
from jaxlm.core.compression import Compression
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.weights.adapters.adapted import Adapted

BATCH = dict(
    tokens=jnp.arange(8, dtype=jnp.int32).reshape(1, 8), segments=jnp.ones((1, 8), jnp.int32),
    positions=jnp.arange(8, dtype=jnp.int32)[None],
)  # fmt: skip


@pytest.mark.parametrize("text", ["int4:32", pytest.param("fp8", marks=pytest.mark.slow)])
def test_training_sees_what_rounding_to_the_nearest_leaves(one_device, text):
    family = MODELS["llama"]
    c = family.Config(**SHAPES["llama"])
    weights = jax.device_put(random_weights(family.specs(c)))
    layout = Layout(execution=config.Execution(dtype="float32"))
    plain = Adapted(config.Adapter(), family, c)
    aware = dataclasses.replace(plain, compression=Compression(aware=text))
    few = dataclasses.replace(plain, compression=Compression(tuple(f"{path}={text}" for path in plain.matrices)))

    def states(adapted: Adapted, weights):
        model = Model(family, c, plain.base, layout, adapted if adapted.changes else None)
        return model.forward(weights, BATCH).x_BTD

    @jax.jit
    def run(weights):
        loss = lambda adapted, w: jnp.square(states(adapted, w)).sum()  # noqa: E731
        small = few.initial_values(weights)
        rounded = few.merged(small)
        grads = jax.grad(lambda w: loss(aware, w))(weights), jax.grad(lambda w: loss(plain, w))(rounded)
        return (
            [states(aware, weights), states(few, small), states(plain, weights)],
            grads,
            aware.merged(weights),
            rounded,
        )

    (seen, wanted, whole), grads, merged, rounded = run(weights)
    np.testing.assert_allclose(seen, wanted, atol=1e-5)
    assert np.abs(np.asarray(seen - whole)).max() > 1e-3
    # Gradients are those of the rounded weights, and go to all numbers.
    for n in ("q", "down"):
        np.testing.assert_allclose(grads[0]["blocks"][n], grads[1]["blocks"][n], atol=1e-4, rtol=1e-4)
        np.testing.assert_array_equal(merged["blocks"][n], rounded["blocks"][n])


def test_a_format_that_nothing_is_rounded_to_is_refused():
    for text in ("int3", "zeros", "int8:scaled"):
        with pytest.raises(ValueError, match=r"compression.aware: "):
            Compression(aware=text).aware_format()
