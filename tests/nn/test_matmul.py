"""Layers multiply their matrices in few bits where a run asks for it: on meshes as on one device, in loops as unrolled,
and not on devices that can't; what isn't a layer's matrix is left alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from jaxlm.core import config, spec
from jaxlm.core.spec import Spec
from jaxlm.models import llama
from jaxlm.models.model import Model
from jaxlm.nn import block_stack, losses, matmul
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import is_leaf
from jaxlm.runtime import mesh
from jaxlm.runtime.mesh import Described

WAYS = sorted(matmul.WAYS)
B200, H100, A100 = (Described("gpu", f"NVIDIA {name}") for name in ("B200", "H100 80GB HBM3", "A100-SXM4-80GB"))
V4, V5E, V6E, V7X = (Described("tpu", kind) for kind in ("TPU v4", "TPU v5 lite", "TPU v6 lite", "TPU7x"))


def drawn(*shape: int, size: float = 1.0) -> np.ndarray:
    return (size * np.random.default_rng(len(shape)).standard_normal(shape)).astype(np.float32)


# outputs that a mesh cuts; inputs that it cuts, with blocks of 32 that neither devices nor rows end
STREAM, HEADS = ("batch", "seq", None), ("batch", "seq", "heads", None)
CUT = {
    "q": ("btd,dhc->bthc", (4, 2, 40), (40, 2, 6), ("embed", "heads", None), STREAM, HEADS),
    "o": ("bthc,hcd->btd", (4, 2, 2, 20), (2, 20, 8), ("heads", None, "embed"), HEADS, STREAM),
}


@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
@pytest.mark.parametrize("which", CUT)
@pytest.mark.parametrize("way", WAYS)
def test_a_product_on_a_mesh_is_that_of_one_device(way, which, axis_type):
    eq, x_shape, w_shape, stored, read, axes = CUT[which]
    x, w = drawn(*x_shape), drawn(*w_shape)
    g, s = drawn(*np.einsum(eq, x, w).shape), Spec(w.shape, stored, spec.zeros)

    def product(x, w):
        shard = dataclasses.replace(layout, narrow=matmul.Activations(matmul.WAYS[way]))
        return shard.einsum(eq, x, shard.gather(w, s), *axes)

    def both(x, w, g):
        y, back = jax.vjp(product, x, w)
        return y, *back(g)

    layout = Layout(execution=config.Execution(dtype="float32"))
    alone = both(x, w, g)
    sizes = config.Mesh(data=2, fsdp=2, tensor=2, axis_type=axis_type)
    layout = Layout.of(sizes, config.Execution(dtype="float32"))
    made = mesh.make_mesh(sizes)
    homes = [NamedSharding(made, p) for p in (
        layout.spec(read), layout.spec(s.axes, layout.store), layout.spec(axes))]  # fmt: skip
    with mesh.on_mesh(made):
        got = jax.jit(both)(*(jax.device_put(a, home) for a, home in zip((x, w, g), homes, strict=True)))
    for a, b in zip(jax.device_get(got), alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("way", "dtype", "each"), [("fp8", "float8_e4m3fn", 1), ("mxfp8", "float8_e4m3fn", 2), ("int8", "int8", 1)]
)
def test_matrices_that_read_the_same_round_it_once(way, dtype, each):
    """MXFP8 rounds a matrix along its inputs and along the dimension that the other factor's gradient contracts."""
    x, w = drawn(4, 8), drawn(8, 3, size=0.1)

    def layer(x, w):
        seen = matmul.Activations(matmul.WAYS[way])
        return sum(Layout().einsum("td,df->tf", x, matmul.NarrowMatrix(v, seen), None, None) for v in (w, 2 * w, 3 * w))

    program = str(jax.make_jaxpr(lambda x, w: jax.vjp(layer, x, w)[0])(x, w))
    assert program.count(f"new_dtype={dtype}") == each * (1 + 3)


SPECS = {
    "w": Spec((3, 4, 4), ("layers", "embed", "ffn"), spec.zeros),
    "router": Spec((3, 4, 4), ("layers", "embed", "router"), spec.zeros, role="router"),
    "kv_b": Spec((3, 4, 4), ("layers", None, "heads"), spec.zeros, role="absorbed"),
    "experts": Spec((3, 4, 4, 4), ("layers", "experts", "embed", "ffn"), spec.zeros),
    "norm": Spec((3, 4), ("layers", "embed"), spec.ones, role="norm"),
}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(("first", "last", "expected"), [(0, 0, "111"), (1, 0, "011"), (0, 2, "100"), (1, 1, "010")])
def test_matrices_of_the_layers_between_are_multiplied_in_few_bits(scan, first, last, expected):
    found: list[str] = []

    def block(p, x, rows, key, kind, cache):
        assert not any(is_leaf(p[name]) for name in SPECS if name != "w")
        found.append(str(int(is_leaf(p["w"]))))
        return x, None

    execution = config.Execution(matmul="int8", scan=scan, matmul_skip_first=first, matmul_skip_last=last)
    weights = jax.tree.map(lambda s: jnp.zeros(s.shape), SPECS, is_leaf=spec.is_spec)
    shard = Layout(execution=execution)
    jax.eval_shape(lambda: block_stack.run_blocks(block, weights, SPECS, jnp.ones(4), shard=shard, key=None)[0])
    # a loop is traced once for the layers that it runs over, and alike layers of two loops may be traced once
    assert set(found) == set(expected) and (scan or "".join(found) == expected)


def test_first_layers_apart_do_not_hide_a_pattern():
    kinds = [block_stack._Kind(own, i > 0) for i, own in enumerate("abababa")]
    assert block_stack._loops(kinds) == [(0, 1, 1), (1, 7, 2)]


@pytest.mark.parametrize(
    ("device", "changes", "layers", "stages", "says"),
    [
        (A100, {}, 2, 1, r"execution\.matmul: fp8 needs .* NVIDIA A100-SXM4-80GB has no fp8 products; leave it at"),
        (V5E, {}, 2, 1, r"TPU v5 lite has no fp8 products"),
        (
            H100,
            dict(matmul="mxfp8"),
            2,
            1,
            r"mxfp8 needs a GPU from Blackwell on, and NVIDIA H100 80GB HBM3 has no mxfp8",
        ),
        (V7X, dict(matmul="mxfp8"), 2, 1, r"TPU7x has no mxfp8 products"),
        (
            V4,
            dict(matmul="int8"),
            2,
            1,
            r"execution\.matmul: int8 needs a TPU v5e, .*, and TPU v4 has no int8 products",
        ),
        (B200, dict(matmul="mxfp8"), 4, 2, r"mxfp8 is not for stages of a pipeline; set mesh\.stage to 1, or take fp8"),
        (H100, {}, None, 1, r"for models whose layers this package runs"),
        (H100, dict(matmul_skip_first=1, matmul_skip_last=1), 2, 1, r"2 of 2 layers leave none for fp8; skip fewer"),
        (H100, dict(matmul_skip_last=1), 4, 2, r"stages of a pipeline must be alike; set them to 0"),
        (
            H100,
            dict(matmul="dtype", matmul_skip_last=1),
            2,
            1,
            r"nothing is multiplied in few bits; set matmul to fp8, mx",
        ),
    ],
)
def test_what_can_not_be_had_is_refused(device, changes, layers, stages, says):
    with mesh.on_devices([device]), pytest.raises(ValueError, match=says):
        matmul.choose(config.Execution(**{"matmul": "fp8"} | changes), layers, stages)


@pytest.mark.parametrize(
    ("way", "able"), [("fp8", (H100, B200, V7X)), ("mxfp8", (B200,)), ("int8", (A100, H100, B200, V5E, V6E))]
)
def test_the_choice_says_where_it_is_emulated(way, able):
    skipping = config.Execution(matmul=way, matmul_skip_last=1)
    for device in able:
        with mesh.on_devices([device]):
            words = matmul.choose(skipping, 4, 1)
        assert words.endswith("but for the first 0 and the last 1") and words.startswith(f"{way} products in layers")
        assert matmul.choose(skipping, 4, 1) == f"{words}, emulated on this CPU"
    assert matmul.choose(config.Execution(), 4, 1) == ""


STEPS, ROWS, LENGTH, VOCAB = 300, 8, 32, 64


def small(**execution) -> tuple[Model, dict]:
    """A small model and its weights."""
    c = llama.Config(vocab=VOCAB, layers=2, width=32, heads=2, kv_heads=2, head_width=16, ffn=64)
    specs, rng = llama.specs(c), np.random.default_rng(0)
    w = jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape) / 8 + (s.role == "norm"), jnp.float32), specs,
        is_leaf=spec.is_spec,
    )  # fmt: skip
    return Model(llama, c, specs, Layout(execution=config.Execution(**execution))), w


def loss_of(model: Model):
    positions, ones = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)), jnp.ones((ROWS, LENGTH))

    def loss(w, tokens):
        batch = dict(tokens=tokens[:, :-1], positions=positions, segments=np.ones((ROWS, LENGTH), np.int32))
        readout = model.readout(w, model.forward(w, batch).x_BTD)
        return losses.cross_entropy(readout, tokens[:, 1:], ones, shard=model.shard).loss / (ROWS * LENGTH)

    return loss


def curve(**execution) -> np.ndarray:
    """The losses of a small model on text of a Markov chain."""
    model, w = small(scan=True, **execution)
    rng, optimizer, loss = np.random.default_rng(0), optax.adam(3e-3), loss_of(model)
    following = rng.integers(0, VOCAB, (VOCAB, 4))  # each token has four that come next
    tokens = np.zeros((STEPS, ROWS, LENGTH + 1), np.int32)
    tokens[:, :, 0] = rng.integers(0, VOCAB, (STEPS, ROWS))
    for t in range(LENGTH):
        tokens[:, :, t + 1] = following[tokens[:, :, t], rng.integers(0, 4, (STEPS, ROWS))]

    def step(state, tokens):
        w, moments = state
        value, gradients = jax.value_and_grad(loss)(w, tokens)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(w, updates), moments), value

    run = jax.jit(lambda w, tokens: jax.lax.scan(step, (w, optimizer.init(w)), tokens)[1])
    return np.asarray(run(w, jnp.asarray(tokens)))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_small_model_learns_as_well_as_in_bfloat16(way):
    wide, narrow = (curve(dtype="bfloat16", matmul=matmul).reshape(-1, 50).mean(1) for matmul in ("dtype", way))
    assert wide[-1] < 1.6 < wide[0]  # the chain's own is log 4 = 1.39
    np.testing.assert_allclose(narrow, wide, atol=0.05)
    assert narrow[-1] != wide[-1]


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_layers_in_a_loop_are_those_of_layers_unrolled(way):
    found = []
    for scan in (True, False):
        model, w = small(dtype="float32", matmul=way, scan=scan)
        tokens = np.random.default_rng(1).integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
        found.append(jax.jit(jax.grad(loss_of(model)))(w, tokens))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(a).max()))
