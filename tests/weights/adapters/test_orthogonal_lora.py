"""O-LoRA: its penalty by hand, and what an adapter that grows keeps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.adapted_models import batch_of, logits, make, shaken

from jaxlm.core import config, tree
from jaxlm.runtime.mesh import make_mesh, on_mesh
from jaxlm.weights.adapters import Dora, Lora, OrthogonalLora, orthogonal_lora

C = OrthogonalLora(rank=2, previous=3, orthogonality=0.7, norm=0.3)


def adapter() -> dict:
    keys = iter(jax.random.split(jax.random.key(0), 9))
    shape = dict(a=(2, 5, 2), b=(2, 2, 2, 3), previous_a=(2, 5, 3), previous_b=(2, 3, 2, 3))
    return {site: {n: jax.random.normal(next(keys), s) for n, s in shape.items()} for site in ("x", "y")}


def test_the_penalty_is_that_of_the_paper():
    """Every layer of every target by NumPy; it is zero, but for the norms, where subspaces are orthogonal."""
    params, by_hand = adapter(), 0.0
    for site in jax.device_get(params).values():
        for layer in range(2):
            by_hand += 0.7 * np.abs(site["previous_a"][layer].T @ site["a"][layer]).sum()
            by_hand += 0.3 * sum(np.linalg.norm(site[n][layer]) for n in "ab")
    assert float(orthogonal_lora.penalty(C, {"adapter": params})) == pytest.approx(by_hand, rel=1e-5)
    only = dataclasses.replace(C, norm=0.0)
    for site in params.values():
        site["a"] = site["a"].at[:, :3].set(0)
        site["previous_a"] = site["previous_a"].at[:, 3:].set(0)
    assert float(orthogonal_lora.penalty(only, {"adapter": params})) == 0
    assert float(orthogonal_lora.penalty(dataclasses.replace(only, previous=0), {"adapter": adapter()})) == 0
    still = {"adapter": {"x": {"a": jnp.zeros((2, 5, 2)), "b": jnp.zeros((2, 2, 3))}}}
    slope = jax.grad(lambda p: orthogonal_lora.penalty(dataclasses.replace(C, previous=0), p))(still)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope)), "a fresh b is zero"


def grown(before: config.Adapter, name: str, base: str = "float32"):
    """A model with a trained adapter, the model that grows from it, and the weights of both."""
    old = make(name, dataclasses.replace(before, base=base), scan=True)
    weights = jax.jit(lambda key: old.adapter.init(old.adapter.specs(), key))(jax.random.key(1))
    weights = shaken(old.adapter, weights)
    c = orthogonal_lora.settings_after(OrthogonalLora(rank=2, alpha=5.0, base=base, targets=before.targets), before)
    new = make(name, c, scan=True)

    def begin(weights, key):
        given = weights | {"adapter": new.adapter.grown(old.adapter, weights["adapter"])}
        return new.adapter.init(new.adapter.specs(), key, existing=given)

    return old, weights, new, jax.jit(begin)(weights, jax.random.key(1))


@pytest.mark.parametrize(("before", "name", "base"), [
    (OrthogonalLora(rank=3, previous=2, alpha=6.0, targets=("all",)), "llama", "nf4"),
    pytest.param(Lora(rank=4), "bert", "float32", marks=pytest.mark.slow),
    pytest.param(Lora(rank=4, rank_stabilized=True), "t5", "nf4", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_new_task_begins_as_the_old_model_and_leaves_it_as_it_is(before, name, base):
    old, weights, new, begun = grown(before, name, base)
    assert new.adapter.c.previous == (5 if isinstance(before, OrthogonalLora) else 4)
    batch, flat = batch_of(name), tree.flatten(begun["adapter"])
    expected = jax.jit(lambda w: logits(old, w, batch))(weights)

    def trained(p, frozen):
        w = tree.merge(p, frozen)
        z = logits(new, w, batch)
        return jnp.square(z).mean() + new.adapter.penalty(w), z

    parts = tree.partition(begun, new.adapter.trainable)
    (_, z), slope = jax.jit(jax.value_and_grad(trained, has_aux=True))(*parts)
    np.testing.assert_allclose(z, expected, atol=2e-5)
    moved = {path.rpartition("/")[2] for path in tree.flatten(slope)}
    assert moved == {"a", "b"} and all(path.startswith("adapter/") for path in tree.flatten(slope))
    for path in flat:
        if path.endswith("/b"):
            assert float(jnp.abs(tree.at(slope, f"adapter/{path}")).max()) > 0, path


def test_each_task_draws_other_directions_with_the_same_seed():
    drawn = []
    for previous in (0, 2, 4):
        s = make("llama", OrthogonalLora(rank=2, previous=previous)).adapter.specs()["adapter"]["blocks"]["q"]["a"]
        drawn.append(s.init(jax.random.key(0), s.shape))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert float(jnp.abs(drawn[a] - drawn[b]).min()) > 0
    assert [float(x.std()) for x in drawn] == pytest.approx([(3 * 32) ** -0.5] * 3, rel=0.2), "as LoRA's begin"


def test_it_grows_from_nothing_else():
    for other in (Dora(rank=2), config.Adapter()):
        assert orthogonal_lora.settings_after(C, other).previous == 0
    old, new = make("llama", Lora(targets=("q",))), make("llama", OrthogonalLora(previous=8))
    with pytest.raises(ValueError, match=r"^adapter\.targets: blocks/q blocks/v here, .* is on blocks/q; leave"):
        new.adapter.grown(old.adapter, {})


def test_a_mesh_gives_the_same_penalty():
    mesh = config.Mesh(data=2, fsdp=2, tensor=2, axis_type="explicit")
    c = OrthogonalLora(rank=2, previous=2, norm=0.1)
    one, there = make("llama", c), make("llama", c, mesh)
    specs = one.adapter.specs()
    keys = iter(jax.random.split(jax.random.key(0), 99))
    drawn = tree.map_named(lambda _, s: jax.random.normal(next(keys), s.shape), specs["adapter"])
    compute = jax.value_and_grad(functools.partial(orthogonal_lora.penalty, c))
    expected = compute({"adapter": drawn})
    made = make_mesh(mesh)
    with on_mesh(made):
        placed = jax.device_put({"adapter": drawn}, {"adapter": there.shard.shardings(specs, made)["adapter"]})
        got = jax.jit(compute)(placed)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6), jax.device_get(got), expected)
