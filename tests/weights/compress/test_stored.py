"""What a configuration says of a compressed weight gives the arrays that solvers make of it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_models import random_weights

from jaxlm.core import config, tree
from jaxlm.core.compression import Awq, Compression, Format, Nearest, Svd, stored
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.runtime import mesh
from jaxlm.weights import stored as weights
from jaxlm.weights.adapters.adapted import Adapted
from jaxlm.weights.adapters.lora import Lora
from jaxlm.weights.compress.solve import solve
from jaxlm.weights.compress.statistics import Statistics

SHAPES = dict(layers=2, width=64, heads=4, kv_heads=2, head_width=16, vocab=50)
TEXTS = ("int8", "int4:32", "int4:32:zero:scaled", "fp8", "fp8:128", "mxfp4:32", "nf4:64", "int8:scaled", "svd:3")


def adapted(text: str, family: str = "llama", **more) -> Adapted:
    module = MODELS[family]
    c = module.Config(**SHAPES | more)
    whole = Adapted(config.Adapter(), module, c)
    return dataclasses.replace(whole, compression=Compression(tuple(f"{path}={text}" for path in whole.matrices)))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("text", TEXTS)
def test_specs_are_those_of_what_solvers_make(text, family) -> None:
    a = adapted(text, family)
    specs = a.specs()
    for path, m in a.matrices.items():
        how = a.compressed[path]
        assert str(how) == text
        method = Svd(how.rank) if how.rank else Awq(how.format) if how.scaled else Nearest(how.format)
        abstract = jax.ShapeDtypeStruct(m.spec.shape, jnp.float32)
        lead = m.spec.shape[: m.lead]
        inputs = abstract.size // m.spec.shape[0] // (m.spec.shape[1] if m.experts else 1)
        for n in m.out_shape:
            inputs //= n
        record = jax.eval_shape(partial(Statistics.none, inputs, lead))
        made = jax.eval_shape(partial(solve, method, ins=m.ins, outs=m.outs), abstract, statistics=record).weight
        arrays, wanted = weights.arrays(made), tree.at(specs, path)
        assert {n: (x.shape, x.dtype) for n, x in arrays.items()} == {
            n: (s.shape, jnp.dtype(s.dtype)) for n, s in wanted.items()
        }
        assert all(len(s.axes) == len(s.shape) for s in wanted.values())
        bound = weights.bound(m, how, arrays)
        assert jax.tree.structure(bound) == jax.tree.structure(made)


def test_a_format_that_is_not_known_is_refused_by_name() -> None:
    for text, what in (
        ("int3:64", "'int3:64' is no format that this version knows"),
        ("int4:77", "group: int4 has no groups of 77"),
        ("int8:32", "group: int8 has no groups of 32"),
        ("int4:32:sparse", "no format has 'sparse'"),
        ("svd:0", "'svd:0' is no format that this version knows"),
    ):
        with pytest.raises(ValueError, match=r"compression.weights: blocks/q: ") as found:
            Compression((f"blocks/q={text}",)).by_path()
        assert what in str(found.value)
    with pytest.raises(ValueError, match="is not PATH=FORMAT"):
        Compression(("blocks/q",)).by_path()
    with pytest.raises(ValueError, match="have no matrix blocks/qq"):
        _ = dataclasses.replace(adapted("int8"), compression=Compression(("blocks/qq=int8",))).compressed


def test_texts_of_formats_read_back() -> None:
    for text in (*TEXTS, "zeros"):
        assert str(stored(text)) == text
    assert stored("int4").format == Format("int4")


def test_whole_matrices_of_few_bits_are_not_trained() -> None:
    a = adapted("int8")
    assert not any(a.trainable(path) for path in tree.flatten(a.specs()) if path.startswith("blocks/q/"))
    with pytest.raises(ValueError, match="is stored as int8, which can't be trained"):
        a.check_trained()
    adapted("zeros").check_trained()
    factors = adapted("svd:3")
    factors.check_trained()
    assert all(factors.trainable(path) for path in tree.flatten(factors.specs()))
    frozen = dataclasses.replace(factors, c=Lora())
    assert not any(frozen.trainable(path) for path in tree.flatten(factors.specs()))


@pytest.mark.parametrize(
    "text", ["int4:32:scaled", "svd:8", *(pytest.param(t, marks=pytest.mark.slow) for t in ("fp8:128", "nf4:64"))]
)
def test_few_bits_and_factors_rest_cut_on_a_mesh_and_give_the_same_states(text) -> None:
    a = adapted(text, layers=1)
    c, family = a.config, a.family
    whole = jax.device_put(random_weights(a.base))
    ids = jnp.arange(16, dtype=jnp.int32).reshape(4, 4)
    batch = dict(tokens=ids, segments=jnp.ones_like(ids), positions=jnp.broadcast_to(ids[:1], ids.shape))
    one = Layout(execution=config.Execution(dtype="float32"))

    @jax.jit
    def run(whole, batch):
        few = a.initial_values(whole)
        return few, Model(family, c, a.base, one, a).forward(few, batch).x_BTD

    with mesh.on_devices(jax.devices()[:1]):
        few, alone = run(whole, batch)
    settings = config.Mesh(data=2, fsdp=2, tensor=2)
    devices = mesh.make_mesh(settings)
    layout = Layout.of(settings, config.Execution(dtype="float32"))
    homes = layout.shardings(a.specs(), devices)
    assert any("tensor" in str(home.spec) for home in tree.flatten(homes["blocks"]["q"]).values())
    with mesh.on_mesh(devices):
        there = jax.device_put(few, homes)
        cut = jax.jit(lambda w, batch: Model(family, c, a.base, layout, a).forward(w, batch).x_BTD)(there, batch)
    np.testing.assert_allclose(cut, alone, atol=1e-4)
