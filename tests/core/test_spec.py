"""A weight's initial value depends on the seed and its own path, and has the variance it was declared with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.core.spec import Spec, abstract, count, fan_in, init, normal, ones, stacked, zeros

SPECS = {
    "embed": Spec((64, 32), ("vocab", "embed"), normal(0.02)),
    "blocks": stacked(
        3,
        {
            "q": Spec((32, 4, 8), ("embed", "heads", None), fan_in(0)),
            "o": Spec((4, 8, 32), ("heads", None, "embed"), fan_in(0, 1, scale=0.5)),
            "norm": Spec((32,), (None,), ones),
        },
    ),
    "bias": Spec((32,), (None,), zeros),
}


def test_shapes_axes_and_what_is_a_matrix():
    q, norm = SPECS["blocks"]["q"], SPECS["blocks"]["norm"]
    assert (q.shape, q.axes) == ((3, 32, 4, 8), ("layers", "embed", "heads", None))
    assert [s.is_matrix for s in (q, norm, SPECS["embed"], SPECS["bias"])] == [True, False, True, False]
    assert count(SPECS) == sum(x.size for x in jax.tree.leaves(init(SPECS, jax.random.key(0))))


def test_abstract_is_what_init_makes():
    made = jax.eval_shape(lambda: init(SPECS, jax.random.key(0)))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), made, abstract(SPECS)))


@pytest.mark.parametrize(
    ("path", "std"),
    [(("embed",), 0.02), (("blocks", "q"), 32**-0.5), (("blocks", "o"), 0.5 * 32**-0.5)],
)
def test_standard_deviation(path, std):
    w = init(SPECS, jax.random.key(1))
    for key in path:
        w = w[key]
    assert np.std(w) == pytest.approx(std, rel=0.06)


def test_every_layer_and_every_weight_draws_its_own():
    q = init(SPECS, jax.random.key(0))["blocks"]["q"]
    assert not np.allclose(q[0], q[1]) and not np.allclose(q[1], q[2])
    two = init({"a": SPECS["embed"], "b": SPECS["embed"]}, jax.random.key(0))
    assert not np.allclose(two["a"], two["b"])


def test_another_weight_or_its_absence_changes_no_other():
    key = jax.random.key(0)
    more = init(SPECS | {"head": SPECS["embed"], "a": SPECS["bias"]}, key)
    fewer = init({"embed": SPECS["embed"]}, key)
    whole = init(SPECS, key)
    np.testing.assert_array_equal(more["embed"], whole["embed"])
    np.testing.assert_array_equal(more["blocks"]["q"], whole["blocks"]["q"])
    np.testing.assert_array_equal(fewer["embed"], whole["embed"])


def test_seed_decides():
    a, b, c = (init(SPECS, jax.random.key(s))["embed"] for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)


@pytest.mark.parametrize("spec", [P(None, "x", "y"), P(None, ("x", "y")), P()])
def test_the_same_on_every_mesh(spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    make = lambda: init(SPECS, jax.random.key(0))["blocks"]["q"]  # noqa: E731
    sharded = jax.jit(make, out_shardings=NamedSharding(mesh, spec))()
    np.testing.assert_array_equal(sharded, jax.jit(make)())
    assert sharded.dtype == jnp.float32
