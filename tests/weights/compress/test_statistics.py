"""What a calibration records: sums against NumPy in float64, padding, merging, and models recorded without an edit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from support.tiny_models import SHAPES, random_weights

from jaxlm.core import config, tree
from jaxlm.core.spec import Spec, zeros
from jaxlm.core.weight_names import Name
from jaxlm.models import MODELS
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import Wrapped
from jaxlm.runtime.mesh import make_mesh, on_devices
from jaxlm.weights.compress.recording import observe
from jaxlm.weights.compress.statistics import Statistics, check
from jaxlm.weights.matrices import Matrix, matrices


def expected(x: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Computes a record in float64 from inputs `[N, I]`, one token after another."""
    x, n = x.astype(np.float64), weights.sum()
    outer = sum(w * np.outer(row, row) for w, row in zip(weights, x, strict=True))
    return dict(
        count=n,
        mean_square=np.diag(outer) / n,
        mean_abs=sum(w * abs(row) for w, row in zip(weights, x, strict=True)) / n,
        largest=abs(x[weights > 0]).max(0),
        hessian=outer / n,
    )


def agree(found: Statistics, wanted: dict[str, np.ndarray], rtol: float = 1e-5) -> None:
    for name, value in wanted.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=rtol, atol=1e-6, err_msg=name)


def drawn(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_batches_merge_to_the_record_of_all_tokens_and_padding_counts_for_nothing():
    x, weights = drawn((3, 4, 5)), np.random.default_rng(1).choice([0.0, 0.5, 1.0], (3, 4)).astype(np.float32)
    weights[2] = 0  # a batch of padding alone
    with_nan = np.where(weights[..., None] > 0, x, np.nan)
    found = Statistics.none(5)
    for batch, w in zip(with_nan, weights, strict=True):
        found = found.add(jnp.asarray(batch), jnp.asarray(w))
    agree(found, expected(x.reshape(-1, 5), weights.reshape(-1)))
    check(found, "q")


def test_many_tokens_in_few_digits_lose_nothing():
    x = jnp.full((1000, 2), 100.0, jnp.bfloat16)
    one = Statistics.of(x, jnp.full((1000,), 1e6, jnp.float32))
    agree(one.merge(one), dict(count=2e9, mean_square=[1e4, 1e4], hessian=np.full((2, 2), 1e4)))


def test_experts_have_a_record_each():
    x, goes = drawn((6, 3)), np.array([[1, 0, 1, 0, 0, 1], [0, 1, 0, 1, 1, 1]], np.float32)
    found = jax.vmap(Statistics.of, (None, 0))(jnp.asarray(x), jnp.asarray(goes))
    for i in range(2):
        agree(jax.tree.map(lambda a, i=i: a[i], found), expected(x, goes[i]))


def test_bad_records_are_refused_by_name():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="calibration: no token reached blocks/q, layer 1; give more text"):
        check(jax.vmap(Statistics.of, (None, 0))(x, jnp.array([[1.0, 1.0], [0.0, 0.0]])), "blocks/q")
    with pytest.raises(ValueError, match="calibration: inputs of q are NaN or infinite"):
        check(Statistics.of(x.at[0, 0].set(jnp.nan)), "q")
    with pytest.raises(ValueError, match=r"weights: \(3,\) are not those of inputs \(2, 3\); give \(2,\)"):
        Statistics.of(x, jnp.ones(3))
    with pytest.raises(ValueError, match="hessian: one of the records has none"):
        Statistics.of(x).merge(Statistics.of(x, hessian=False))


SEEN: dict[str, list[np.ndarray]] = {}


class Spy(Wrapped):
    """Keeps what is multiplied, where no program is compiled."""

    path: str = struct.field(pytree_node=False)

    def einsum(self, eq, x, shard, *axes):
        SEEN.setdefault(self.path, []).append(np.asarray(x))
        return super().einsum(eq, x, shard, *axes)

    def gathered(self, s, shard):
        return self.replace(base=shard.gather(self.base, s))


@functools.cache
def model(name: str, scan: bool = True, remat: str = "none", **shape):
    """Returns (weights, function of them that gives states, matrices) of a model of two layers on two padded rows."""
    family = MODELS[name]
    c = family.Config(**SHAPES[name] | dict(layers=2) | shape)
    specs, shard = family.specs(c), Layout(execution=config.Execution(dtype="float32", scan=scan, remat=remat))
    real = np.array([[1] * 5 + [0] * 3, [1] * 8], np.int32)
    tokens = np.random.default_rng(0).integers(0, 264, real.shape, np.int32)
    batch = dict(tokens=tokens, segments=real, positions=np.tile(np.arange(8, dtype=np.int32), (2, 1)))
    if name == "t5":
        batch |= dict(source=np.concatenate([tokens, tokens], 1), source_segments=np.concatenate([real, real], 1))

    def forward(params):
        return family.forward(c, specs, params, jax.tree.map(jnp.asarray, batch), shard=shard).x_BTD

    return random_weights(specs), forward, matrices(family, c), batch


def spied(params, forward, found) -> dict[str, list[np.ndarray]]:
    SEEN.clear()
    for path in found:
        params = tree.put(params, path, Spy(base=jnp.asarray(tree.at(params, path)), path=path))
    forward(params)
    return dict(SEEN)


@pytest.mark.parametrize(
    ("name", "execution"),
    [
        ("llama", dict(scan=True, remat="full")),
        pytest.param("llama", dict(scan=False), marks=pytest.mark.slow),
        pytest.param("bert", dict(scan=True), marks=pytest.mark.slow),
        pytest.param("t5", dict(scan=True), marks=pytest.mark.slow),
    ],
)
def test_every_matrix_of_a_model_is_recorded_layer_by_layer(one_device, name, execution):
    params, forward, found, batch = model(name, **execution)
    plain, unrolled, *_ = model(name, scan=False)
    inputs = spied(plain, unrolled, found)
    weights = {}
    for path, layers in inputs.items():
        source = layers[0].shape[1] == 16
        weights[path] = jnp.asarray(batch["source_segments" if source else "segments"], jnp.float32)
    out, records = jax.jit(lambda p: observe(forward, p, found, weights))(params)
    np.testing.assert_allclose(out, unrolled(plain), atol=2e-5)
    assert records.keys() == found.keys() == inputs.keys() and len(found) >= 6
    for path, record in records.items():
        width = np.prod(found[path].in_shape)
        assert record.hessian.shape == (2, width, width)
        for i, x in enumerate(inputs[path]):
            w = np.asarray(weights[path]).reshape(-1)
            agree(jax.tree.map(lambda a, i=i: a[i], record), expected(x.reshape(len(w), width), w), rtol=2e-4)
        check(record, path)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
def test_on_a_mesh_the_record_is_that_of_one_device(axis_type):
    params, forward, found, batch = model("llama", scan=True, kv_heads=2)
    weights = jnp.asarray(batch["segments"], jnp.float32)
    alone = jax.jit(lambda p: observe(forward, p, found, weights)[1])(params)
    with on_devices(jax.devices()[:4]):
        mesh = make_mesh(config.Mesh(data=1, fsdp=2, tensor=2, axis_type=axis_type))
    with jax.set_mesh(mesh):
        shared = jax.jit(lambda p: observe(forward, p, found, weights)[1])(params)
    for path, record in alone.items():
        agree(shared[path], {k: getattr(record, k) for k in ("count", "mean_square", "largest", "hessian")}, 1e-4)


def test_what_cannot_be_recorded_is_refused():
    params, forward, found, _ = model("llama", scan=False)
    with pytest.raises(ValueError, match=r"weights: blocks/q has inputs of \(2, 8\) tokens; give it weights of that"):
        observe(forward, params, {"blocks/q": found["blocks/q"]}, jnp.ones((2, 7)))
    experts = Matrix("blocks/up", Spec((1, 2, 4, 4), ("layers", "experts", "embed", "ffn"), zeros), 1, Name("up"))
    with pytest.raises(ValueError, match="recorded: inputs of blocks/up can't be recorded, as experts are"):
        observe(forward, params, {"blocks/up": experts}, jnp.ones((2, 8)))
