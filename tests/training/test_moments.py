"""What optimizers remember has names that don't depend on how their chains nest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config, spec
from jaxlm.training import moments, optimizers

SPECS = {
    "embed": spec.table(8, 4, spec.zeros, "vocab"),
    "blocks": {"up": spec.Spec((2, 4, 6), ("layers", "embed", "ffn"), spec.zeros)},
}


def slots(**optim) -> dict[moments.Slot, tuple[str, jax.Array]]:
    made = optimizers.make(config.Optim(**dict(warmup=0) | optim), 2, SPECS)
    trained = {name: w for name, w in spec.init(SPECS, jax.random.key(0)).items() if made.trainable(name)}
    return moments.slots(made.tx.init({name: trained.get(name) for name in SPECS}))


def test_names_are_those_of_the_state_and_the_weight_alone():
    plain, nested = slots(), slots(layer_decay=0.5)
    assert plain.keys() == nested.keys() and {path for path, _ in plain.values()} != {p for p, _ in nested.values()}
    assert {slot.part for slot in plain} == {"ScaleByAdamState/count", "ScaleByAdamState/mu", "ScaleByAdamState/nu"}
    assert {slot.weight for slot in plain} == {"", "embed", "blocks/up"}
    assert {slot.weight for slot in slots(freeze=("embed",))} == {"", "blocks/up"}
    muon = {(slot.record, slot.weight) for slot in slots(name="muon") if slot.weight}
    assert muon == {("MuonState", "blocks/up"), ("ScaleByAdamState", "embed")}
    assert slots(name="sgd", momentum=0.0) == {}


@pytest.mark.parametrize(
    ("optim", "orders"),
    [
        (dict(name="adamw"), {"mu": 1, "nu": 2}),
        (dict(name="lion"), {"mu": 1}),
        (dict(name="sgd"), {"trace": 1}),
        (dict(name="muon"), {"mu": 1, "nu": 2}),
    ],
    ids=lambda x: x.get("name"),
)
def test_averages_are_of_the_stated_power_of_the_gradient(optim, orders):
    """Twice the gradient gives twice the average, or four times."""
    made = optimizers.make(config.Optim(**dict(warmup=0) | optim), 2, SPECS)
    weights = spec.init(SPECS, jax.random.key(0))
    gradient = jax.tree.map(lambda w: jnp.linspace(-1, 2, w.size).reshape(w.shape), weights)

    def after(scale: float) -> dict[moments.Slot, tuple[str, jax.Array]]:
        state, scaled = made.tx.init(weights), jax.tree.map(lambda g: scale * g, gradient)
        for _ in range(2):
            _, state = made.tx.update(scaled, state, weights)
        return moments.slots(state)

    one, two = after(1.0), after(2.0)
    assert moments.unmapped(one) is None and {slot.field for slot in one if slot.weight} == set(orders)
    for slot, (_, value) in one.items():
        if slot.weight:
            order = moments.ORDERS[slot.record, slot.field]
            assert order == orders[slot.field]
            np.testing.assert_allclose(two[slot][1], 2.0**order * value, rtol=1e-5)


def test_factored_moments_are_not_those_of_single_weights():
    assert moments.unmapped(slots(name="adafactor")) == "FactoredState"
