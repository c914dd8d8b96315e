"""Products in fp8 are those of the rounded numbers, forwards and backwards; what isn't a layer's matrix has none."""

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
from jaxlm.nn import block_stack, fp8, losses
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import is_leaf
from jaxlm.runtime import mesh
from jaxlm.runtime.mesh import Described

LARGEST = {fp8.E4M3: 448.0, fp8.E5M2: 57344.0}
H100, A100 = (Described("gpu", kind) for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"))


def rounded(x: np.ndarray, kind) -> np.ndarray:
    """NumPy's rounding with the largest power of two that keeps the tensor in range."""
    by = 2.0 ** np.floor(np.log2(LARGEST[kind] / np.abs(x).max()))
    return (x * by).astype(jnp.dtype(kind)).astype(np.float64) / by


def drawn(*shape: int, size: float = 1.0) -> np.ndarray:
    return (size * np.random.default_rng(len(shape)).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("kind", [fp8.E4M3, fp8.E5M2])
@pytest.mark.parametrize("top", [1e-20, 0.875, 0.876, 1.0, 448.0, 450.0, 3e7])
def test_the_largest_magnitude_comes_to_the_upper_end_of_the_range(kind, top):
    made = fp8.scaled(jnp.asarray([top, -top / 3, 0.0], jnp.float32), kind)
    numbers = np.asarray(made.numbers, np.float64)
    assert LARGEST[kind] / 2 <= np.abs(numbers).max() <= LARGEST[kind]
    np.testing.assert_allclose(numbers * float(made.unit), [top, -top / 3, 0], rtol=0.125)
    assert np.frexp(float(made.unit))[0] == 0.5  # a power of two: scaling rounds nothing


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_makes_the_whole_product_so(wrong):
    assert np.isnan(fp8.scaled(jnp.asarray([1.0, wrong]), fp8.E5M2).unit)
    assert float(fp8.scaled(jnp.zeros(2), fp8.E4M3).numbers[0]) == 0


@pytest.mark.parametrize(
    ("eq", "x_shape", "w_shape", "back"),
    [
        ("btd,df->btf", (2, 3, 8), (8, 5), ("btf,df->btd", "btd,btf->df")),
        ("btd,dhc->bthc", (2, 3, 8), (8, 2, 3), ("bthc,dhc->btd", "btd,bthc->dhc")),
        ("bthc,hcd->btd", (2, 3, 2, 4), (2, 4, 6), ("btd,hcd->bthc", "bthc,btd->hcd")),
    ],
)
def test_a_product_and_its_gradients_are_those_of_rounded_factors(eq, x_shape, w_shape, back):
    x, w = drawn(*x_shape), drawn(*w_shape, size=0.02)

    def product(x, w):
        return Layout().einsum(eq, x, fp8.Fp8Matrix(w, fp8.Activations()), None, None, None)

    y, pull = jax.vjp(product, x, w)
    g = drawn(*y.shape, size=3e-5)
    x8, w8, g8 = rounded(x, fp8.E4M3), rounded(w, fp8.E4M3), rounded(g, fp8.E5M2)
    dx, dw = pull(jnp.asarray(g))
    for got, expected in ((y, (eq, x8, w8)), (dx, (back[0], g8, w8)), (dw, (back[1], x8, g8))):
        exact = np.einsum(*expected)
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
def test_a_product_on_a_mesh_is_that_of_one_device(axis_type):
    x, w, g = drawn(4, 2, 8), drawn(8, 2, 6), drawn(4, 2, 2, 6)
    s, axes = Spec(w.shape, ("embed", "heads", None), spec.zeros), ("batch", "seq", "heads", None)

    def product(x, w):
        shard = dataclasses.replace(layout, fp8=fp8.Activations())
        return shard.einsum("btd,dhc->bthc", x, shard.gather(w, s), *axes)

    def both(x, w, g):
        y, back = jax.vjp(product, x, w)
        return y, *back(g)

    layout = Layout(execution=config.Execution(dtype="float32"))
    alone = both(x, w, g)
    sizes = config.Mesh(data=2, fsdp=2, tensor=2, axis_type=axis_type)
    layout = Layout.of(sizes, config.Execution(dtype="float32"))
    made = mesh.make_mesh(sizes)
    homes = [NamedSharding(made, p) for p in (
        layout.spec(("batch", "seq", None)), layout.spec(s.axes, layout.store), layout.spec(axes))]  # fmt: skip
    with mesh.on_mesh(made):
        got = jax.jit(both)(*(jax.device_put(a, home) for a, home in zip((x, w, g), homes, strict=True)))
    for a, b in zip(jax.device_get(got), alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_matrices_that_read_the_same_round_it_once():
    x, w = drawn(4, 8), drawn(8, 3, size=0.1)

    def layer(x, w):
        seen = fp8.Activations()
        return sum(Layout().einsum("td,df->tf", x, fp8.Fp8Matrix(v, seen), None, None) for v in (w, 2 * w, 3 * w))

    program = str(jax.make_jaxpr(layer)(x, w))
    assert program.count("new_dtype=float8_e4m3fn") == 1 + 3


SPECS = {
    "w": Spec((3, 4, 4), ("layers", "embed", "ffn"), spec.zeros),
    "router": Spec((3, 4, 4), ("layers", "embed", "router"), spec.zeros, role="router"),
    "kv_b": Spec((3, 4, 4), ("layers", None, "heads"), spec.zeros, role="absorbed"),
    "experts": Spec((3, 4, 4, 4), ("layers", "experts", "embed", "ffn"), spec.zeros),
    "norm": Spec((3, 4), ("layers", "embed"), spec.ones, role="norm"),
}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(("first", "last", "expected"), [(0, 0, "111"), (1, 0, "011"), (0, 2, "100"), (1, 1, "010")])
def test_matrices_of_the_layers_between_are_multiplied_in_fp8(scan, first, last, expected):
    found: list[str] = []

    def block(p, x, rows, key, kind, cache):
        assert not any(is_leaf(p[name]) for name in SPECS if name != "w")
        found.append(str(int(is_leaf(p["w"]))))
        return x, None

    execution = config.Execution(matmul="fp8", scan=scan, fp8_skip_first=first, fp8_skip_last=last)
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
        (Described("tpu", "TPU v5 lite"), {}, 2, 1, r"TPU v5 lite has no fp8 products"),
        (H100, {}, None, 1, r"for models whose layers this package runs"),
        (H100, dict(fp8_skip_first=1, fp8_skip_last=1), 2, 1, r"2 of 2 layers leave none for fp8; skip fewer"),
        (H100, dict(fp8_skip_last=1), 4, 2, r"stages of a pipeline must be alike; set them to 0"),
        (H100, dict(matmul="dtype", fp8_skip_last=1), 2, 1, r"nothing is multiplied in fp8; set matmul=fp8"),
    ],
)
def test_what_can_not_be_had_is_refused(device, changes, layers, stages, says):
    with mesh.on_devices([device]), pytest.raises(ValueError, match=says):
        fp8.choose(config.Execution(**{"matmul": "fp8"} | changes), layers, stages)


def test_the_choice_says_where_it_is_emulated():
    skipping = config.Execution(matmul="fp8", fp8_skip_last=1)
    with mesh.on_devices([H100]):
        words = fp8.choose(skipping, 4, 1)
    assert words.endswith("but for the first 0 and the last 1") and words.startswith("fp8 products in layers")
    assert fp8.choose(skipping, 4, 1) == f"{words}, emulated on this CPU"
    assert fp8.choose(config.Execution(), 4, 1) == ""


STEPS, ROWS, LENGTH, VOCAB = 300, 8, 32, 64


def curve(**execution) -> np.ndarray:
    """The losses of a small model on text of a Markov chain."""
    c = llama.Config(vocab=VOCAB, layers=2, width=32, heads=2, kv_heads=2, head_width=16, ffn=64)
    specs = llama.specs(c)
    model = Model(llama, c, specs, Layout(execution=config.Execution(scan=True, **execution)))
    rng, optimizer = np.random.default_rng(0), optax.adam(3e-3)
    following = rng.integers(0, VOCAB, (VOCAB, 4))  # each token has four that come next
    tokens = np.zeros((STEPS, ROWS, LENGTH + 1), np.int32)
    tokens[:, :, 0] = rng.integers(0, VOCAB, (STEPS, ROWS))
    for t in range(LENGTH):
        tokens[:, :, t + 1] = following[tokens[:, :, t], rng.integers(0, 4, (STEPS, ROWS))]
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))

    def loss(w, tokens):
        batch = dict(tokens=tokens[:, :-1], positions=positions, segments=np.ones((ROWS, LENGTH), np.int32))
        readout = model.readout(w, model.forward(w, batch).x_BTD)
        ones = jnp.ones((ROWS, LENGTH))
        return losses.cross_entropy(readout, tokens[:, 1:], ones, shard=model.shard).loss / (ROWS * LENGTH)

    def step(state, tokens):
        w, moments = state
        value, gradients = jax.value_and_grad(loss)(w, tokens)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(w, updates), moments), value

    w = jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape) / 8 + (s.role == "norm"), jnp.float32), specs,
        is_leaf=spec.is_spec,
    )  # fmt: skip
    run = jax.jit(lambda w, tokens: jax.lax.scan(step, (w, optimizer.init(w)), tokens)[1])
    return np.asarray(run(w, jnp.asarray(tokens)))


@pytest.mark.slow
def test_a_small_model_learns_as_well_as_in_bfloat16():
    wide, narrow = (curve(dtype="bfloat16", matmul=matmul).reshape(-1, 50).mean(1) for matmul in ("dtype", "fp8"))
    assert wide[-1] < 1.6 < wide[0]  # the chain's own is log 4 = 1.39
    np.testing.assert_allclose(narrow, wide, atol=0.05)
    assert narrow[-1] != wide[-1]
