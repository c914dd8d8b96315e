"""Two factors stand in the model for the product that they are, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config
from jaxlm.core.spec import Spec, zeros
from jaxlm.nn.layout import Layout
from jaxlm.runtime import mesh
from jaxlm.weights.factored import Factored, factor_axes

FLOAT32 = config.Execution(dtype="float32")


def factors(lead: tuple, ins: tuple, outs: tuple, rank: int = 3) -> Factored:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((*lead, *ins, rank)), rng.standard_normal((*lead, rank, *outs))
    return Factored(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), ins=len(ins), outs=len(outs))


@pytest.mark.parametrize(
    ("eq", "ins", "outs", "axes", "made"),
    [
        ("btd,dhc->bthc", (8,), (4, 2), ("embed", "heads", None), ("batch", "seq", "heads", None)),
        ("bthc,hcd->btd", (4, 2), (8,), ("heads", None, "embed"), ("batch", "seq", None)),
    ],
)
def test_products_and_gradients_on_a_mesh_are_those_of_the_dense_matrix(eq, ins, outs, axes, made):
    w, x = factors((), ins, outs), np.random.default_rng(1).standard_normal((4, 4, *ins)).astype(np.float32)
    s = Spec((*ins, *outs), axes, zeros)

    def run(w, x, shard):
        def loss(w, x):
            y = shard.einsum(eq, x, shard.gather(w, s), *made)
            return jnp.square(y).sum(), y

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(w, x)

    plain = np.tensordot(np.asarray(w.a), np.asarray(w.b), 1)
    np.testing.assert_allclose(w.dense(), plain, rtol=1e-5)
    with mesh.on_devices(jax.devices()[:1]):
        (_, y), grads = run(w, x, Layout(execution=FLOAT32))
    np.testing.assert_allclose(y, np.einsum(eq, x, plain), atol=1e-4)
    settings = config.Mesh(data=2, fsdp=2, tensor=2)
    layout, devices = Layout.of(settings, FLOAT32), mesh.make_mesh(settings)
    on_a, on_b = factor_axes(axes, len(ins), len(outs))
    homes = layout.shardings(dict(a=Spec(w.a.shape, on_a, zeros), b=Spec(w.b.shape, on_b, zeros)), devices)
    with mesh.on_mesh(devices):
        there = w.replace(a=jax.device_put(w.a, homes["a"]), b=jax.device_put(w.b, homes["b"]))
        (_, cut), grads_cut = run(there, x, layout)
    np.testing.assert_allclose(cut, y, atol=1e-4)
    for found, wanted in zip(jax.tree.leaves(grads_cut), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_experts_are_one_matrix_each_where_a_layer_uses_them(kind):
    w, axes = factors((2,), (4,), (6,)), ("experts", "embed", "ffn")
    settings = config.Mesh(expert=2, fsdp=2, tensor=2, axis_type=kind)
    layout, devices = Layout.of(settings, FLOAT32), mesh.make_mesh(settings)
    with mesh.on_mesh(devices):
        made = jax.jit(lambda w: layout.gather(w, Spec((2, 4, 6), axes, zeros)))(w)
    assert "expert" in str(made.sharding.spec) and "tensor" in str(made.sharding.spec)
    np.testing.assert_allclose(made, w.dense(), rtol=1e-5)
