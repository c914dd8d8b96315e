"""The laws of `jaxlm.testing` hold for what is here, and a family or an objective that breaks one is told."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.flax_decoders import Config, NnxLm

from jaxlm.core import config
from jaxlm.data import packing
from jaxlm.models import llama, t5
from jaxlm.models.flax_bridge import from_nnx
from jaxlm.objectives import causal
from jaxlm.testing import check_adapter, check_family, check_objective
from jaxlm.weights import adapters

SMALL = llama.Config(vocab=264, layers=2, width=16, heads=2, kv_heads=2, head_width=8, ffn=16)
T5 = t5.Config(vocab=264, layers=1, width=16, heads=2, head_width=8, ffn=16)
ONES = np.ones(33, np.int32)
WINDOWS = [
    packing.Window(tokens=np.arange(i, i + 33, dtype=np.int32), segments=ONES, positions=np.arange(33, dtype=np.int32))
    for i in range(40, 44)
]


def altered(family, **members):
    """Returns the family with other members."""
    return types.SimpleNamespace(**{name: getattr(family, name) for name in dir(family)} | members)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "c"), [(llama, SMALL), (t5, T5)], ids=["decoder", "encoder-decoder"])
def test_a_family_keeps_every_law(family, c):
    laws = check_family(family, c, mesh=config.Mesh(fsdp=4, tensor=2))
    assert {"causality", "packed = alone", "cached = at once", "a mesh = one device"} <= set(laws)


def test_a_family_that_sees_the_next_token_is_told():
    def forward(c, specs, params, batch, **more):
        return llama.forward(c, specs, params, {**batch, "segments": batch["segments"]}, **more).replace(
            x_BTD=llama.forward(c, specs, params, {**batch, "tokens": jnp.roll(batch["tokens"], -1, 1)}, **more).x_BTD
        )

    with pytest.raises(AssertionError, match="a position sees the next"):
        check_family(altered(llama, forward=forward), dataclasses.replace(SMALL, layers=1))


@pytest.mark.slow
def test_a_family_that_forgets_segments_is_told():
    def forward(c, specs, params, batch, **more):
        return llama.forward(c, specs, params, {k: v for k, v in batch.items() if k != "segments"}, **more)

    with pytest.raises(AssertionError, match="packed = alone"):
        check_family(altered(llama, forward=forward), SMALL)


def test_an_objective_keeps_every_law():
    small = dataclasses.replace(SMALL, layers=1)
    assert "losses are sums" in check_objective(causal.objective, causal.Config(), WINDOWS, llama, small)


@pytest.mark.slow
def test_an_objective_whose_loss_is_a_mean_is_told():
    def loss(*arguments):
        total = causal.totals(arguments[3])["tokens"]
        return jax.tree.map(lambda x: x / total, causal.loss(*arguments))

    wrong = dataclasses.replace(causal.objective, loss=loss)
    with pytest.raises(AssertionError, match="sums over rows"):
        check_objective(wrong, causal.Config(), WINDOWS, llama, dataclasses.replace(SMALL, layers=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "ia3", "prefix"])
def test_an_adapter_keeps_every_law(name):
    laws = check_adapter(adapters.METHODS[name], adapters.METHODS[name].Config(), llama, SMALL)
    assert "every trained weight learns" in laws and ("merged = bound" in laws) == (name != "prefix")


@pytest.mark.slow
def test_a_flax_module_of_one_s_own_keeps_the_laws_that_a_run_can_ask_for():
    laws = check_family(from_nnx(NnxLm, Config), Config(), mesh=config.Mesh(fsdp=4, tensor=2))
    assert {"causality", "packed = alone", "cached = at once", "a mesh = one device"} <= set(laws)
    assert not any("unrolled" in law for law in laws), "the module loops over its layers as it is written"
