"""Progressive columns, beside their equations by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.adapted_models import batch_of, logits, make, shaken

from jaxlm.core import config, tree
from jaxlm.nn.layout import Layout
from jaxlm.weights.adapters import Lora, Progressive
from jaxlm.weights.adapters import progressive as columns

D, N = 8, 2
SHARD = Layout.of(config.Mesh(), config.Execution(dtype="float32"))


def silu(x):
    return x / (1 + np.exp(-x))


def own(seed: int, before: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = dict(down=(D, N), down_bias=(N,), up=(N, D), up_bias=(D,)) | (
        {"lateral": (before, N, N)} if before else {}
    )
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def by_hand(each: list[dict[str, np.ndarray]], x: np.ndarray) -> np.ndarray:
    z: list[np.ndarray] = []
    for column in each:
        h = x @ column["down"] + column["down_bias"]
        for j, before in enumerate(z):
            h = h + before @ column["lateral"][j]
        z.append(silu(h))
    return x + z[-1] @ each[-1]["up"] + each[-1]["up_bias"]


def test_a_column_reads_those_before_and_alone_gives_the_output():
    each = [own(i, i) for i in range(4)]
    x = np.random.default_rng(9).normal(size=(2, 3, D)).astype(np.float32)
    c, adapter, stages = Progressive(), dict(each[0]), []
    for k in range(4):
        if k:
            adapter = columns.grown(Progressive(previous=k - 1), Progressive(previous=k - 1), None, adapter) | each[k]
            c = columns.settings_after(c, Progressive(previous=k - 1))
        assert c.previous == k
        leaf = columns.bind(c, None, jnp.zeros(()), adapter, {}, None)
        np.testing.assert_allclose(leaf.after(jnp.asarray(x), SHARD), by_hand(each[: k + 1], x), rtol=1e-4, atol=1e-4)
        stages.append(adapter)
    for k, then in enumerate(stages):  # and every earlier task is read out of the last as it was
        found = columns.column(adapter, k) if k < 3 else adapter
        jax.tree.map(np.testing.assert_array_equal, found, dict(then))


@pytest.mark.usefixtures("one_device")
def test_a_new_column_begins_as_the_base_and_is_drawn_anew():
    first = make("llama", Progressive(reduction=4))
    a = first.adapter.init(first.adapter.specs(), jax.random.key(0))
    learned = shaken(first.adapter, a)
    second = make("llama", columns.settings_after(Progressive(reduction=4), first.adapter.c))
    grown = second.adapter.grown(first.adapter, learned["adapter"])
    existing = {name: w for name, w in learned.items() if name != "adapter"} | {"adapter": grown}
    b = second.adapter.init(second.adapter.specs(), jax.random.key(0), existing=existing)
    batch = batch_of("llama")
    compute = jax.jit(
        lambda w, adapter: logits(dataclasses.replace(second, adapter=adapter), w, batch), static_argnums=1
    )
    base = {name: w for name, w in b.items() if name != "adapter"}
    np.testing.assert_array_equal(compute(b, second.adapter), compute(base, second.adapter))
    then = base | {"adapter": second.adapter.column(b["adapter"], 0)}
    before = compute(learned, first.adapter)
    np.testing.assert_array_equal(compute(then, second.adapter), before)
    assert np.abs(np.asarray(before) - compute(base, second.adapter)).max() > 1e-3
    for path, x in tree.flatten(b["adapter"]).items():
        if path.endswith("/down"):
            assert np.abs(x - tree.at(a["adapter"], path)).min() > 0
    frozen = [path for path in tree.flatten(b) if path.startswith("adapter/") and not second.adapter.trainable(path)]
    assert frozen and all("/previous_" in path for path in frozen)


def test_settings_of_what_comes_after():
    assert columns.settings_after(Progressive(previous=3), Lora()).previous == 0
    with pytest.raises(ValueError, match=r"adapter\.reduction: 8, and the columns before have 16; .*leave it out"):
        columns.settings_after(Progressive(reduction=8), Progressive())
