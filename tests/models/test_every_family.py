"""What holds for every architecture: packed = alone, cached = at once, scanned = unrolled, any mesh = one device."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.hf_rows import ROWS

from jaxlm.core import config, spec, tree
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.layout import Layout
from jaxlm.runtime.mesh import NamedSharding, make_mesh, on_mesh

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"
# The variants that have most to get wrong; of the other architectures, the first.
TELLING = ("llama_3.1", "mistral_wide_tied", "smollm3_window", "qwen2_window", "qwen3_window", "gemma2", "gemma3")


@functools.cache
def published(name: str) -> dict:
    with np.load(GOLDEN / f"{name}.npz") as golden:
        return json.loads(str(golden["config"]))


def cases() -> list[str]:
    """One row for each `model_type`."""
    chosen: dict[str, str] = {}
    for name in ROWS:
        kind = published(name)["model_type"]
        if kind not in chosen or name in TELLING:
            chosen[kind] = name
    return list(chosen.values())


def family_of(kind: str):
    return next(f for f in MODELS.values() if kind in f.MODEL_TYPES)


def by_default(usual: tuple[str, ...], names: list[str]) -> list:
    """All names, of which those not `usual` are slow tests."""
    return [name if name in usual else pytest.param(name, marks=pytest.mark.slow) for name in names]


CASES = cases()
# By default one architecture of each family, and of those that run their layers in every way, the two whose layers are
# of several kinds: the others do that in `training/test_meshes.py`.
USUAL = (
    "gpt2",
    "qwen3_window",
    "gemma2",
    "olmo2",
    "bert",
    "modernbert",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "t5",
    "bart",
)
EACH = by_default(("gemma2", "modernbert"), CASES)
GENERATING = [name for name in CASES if ROWS[name].inputs not in ("encoder", "types")]


def test_every_family_is_tested_by_default():
    assert sorted(family_of(published(name)["model_type"]).__name__ for name in USUAL) == sorted(
        f.__name__ for f in MODELS.values()
    )


# Layers of a model by default here, where published ones have more: one of each kind.
FEW = dict(qwen3_window=2, gemma2=2, gpt_oss=2, deepseek_v3=2)
# And where they run in every way: two kinds in turn, twice, which are a loop over pairs.
IN_TURN = dict(gemma2=4)


def make_model(name: str, layout: Layout | None = None, layers: int | None = None, **execution) -> Model:
    values = published(name)
    family = family_of(values["model_type"])
    c = family.from_hf(values)
    c = dataclasses.replace(c, layers=layers) if layers else c
    layout = layout or Layout(execution=config.Execution(**{"dtype": "float32", "scan": False} | execution))
    return Model(family, c, family.specs(c), layout)


def make_weights(model: Model) -> dict:
    """Of the initial ones' size, but no bias is zero and no scale one."""
    rng = np.random.default_rng(0)

    def one(s: spec.Spec) -> np.ndarray:
        size = {"norm": 0.2, "table": 0.5}.get(s.role, 0.3)
        return (rng.normal(0, size, s.shape) + (s.role == "norm")).astype(np.float32)

    return jax.tree.map(one, model.specs, is_leaf=spec.is_spec)


def documents(model: Model, lengths: tuple[int, ...], rows: int = 1) -> list[dict]:
    """Batches of one document a row; an encoder-decoder's has a source of another length."""
    rng, out = np.random.default_rng(1), []
    for n in lengths:
        count = lambda n: np.broadcast_to(np.arange(n, dtype=np.int32), (rows, n))  # noqa: E731
        draw = lambda n: rng.integers(4, model.config.vocab, (rows, n)).astype(np.int32)  # noqa: E731
        one = dict(tokens=draw(n), positions=count(n), segments=np.ones((rows, n), np.int32))
        if model.family.kind == "encoder_decoder":
            m = n + 2
            one |= dict(source=draw(m), source_positions=count(m), source_segments=np.ones((rows, m), np.int32))
        out.append(one)
    return out


def packed(parts: list[dict]) -> dict:
    """All documents in one row."""
    number = lambda key, i: i + 1 if key.endswith("segments") else 1  # noqa: E731
    return {key: np.concatenate([p[key] * number(key, i) for i, p in enumerate(parts)], 1) for key in parts[0]}


def padded(batch: dict, length: int) -> dict:
    """With padding behind each row, and behind its source."""
    sources = {True: length + 4, False: length}
    return {k: np.pad(v, ((0, 0), (0, sources[k.startswith("source")] - v.shape[1]))) for k, v in batch.items()}


def all_logits(model: Model, weights: dict, batch: dict) -> jax.Array:
    return losses.logits(model.readout(weights, model.forward(weights, batch).x_BTD), model.shard)


@functools.cache
def at_once(name: str):
    """(model, weights, `(weights, batch) → logits`), of which both tests below use one program: two rows of `LENGTH`.

    Layers are looped over; with a cache they are unrolled.
    """
    model = make_model(name, layers=FEW.get(name), scan=True)
    return model, make_weights(model), jax.jit(lambda w, b: all_logits(model, w, b))


LENGTH = 15


@pytest.mark.parametrize("name", by_default(USUAL, CASES))
def test_packed_equals_alone(name):
    """Two texts in a row of their own and in one row, always with padding, of which there are unlike numbers."""
    model, weights, run = at_once(name)
    parts = documents(model, (6, 6))
    together = padded(packed(parts), LENGTH)
    together = run(weights, {k: np.repeat(v, 2, 0) for k, v in together.items()})[0, :12]
    alone = [padded(p, LENGTH) for p in parts]
    alone = run(weights, {k: np.concatenate([p[k] for p in alone]) for k in alone[0]})[:, :6]
    np.testing.assert_allclose(together, alone.reshape(together.shape), atol=2e-5, rtol=1e-4)
    assert np.isfinite(together).all()


@pytest.mark.parametrize("name", by_default(USUAL, GENERATING))
def test_with_a_cache_equals_at_once(name):
    """Prompts of 5 and 3 tokens padded on the left, then one token at a time, past every window.

    Where there are windows, the last three at once, for which the cache has slack.
    """
    model, weights, run = at_once(name)
    T, prompt = 12, 5
    batch = documents(model, (T,), rows=2)[0]
    start = np.array([[0], [2]])  # of each row
    batch["segments"] = (np.arange(T)[None] >= start).astype(np.int32)
    batch["positions"] = np.maximum(np.arange(T, dtype=np.int32)[None] - start, 0).astype(np.int32)
    if "source" in batch:  # of unlike lengths, and said with the first call alone
        batch["source_segments"] = batch["source_segments"] * (np.arange(T + 2)[None] < [[T + 2], [5]])
    expected = np.asarray(run(weights, padded(batch, LENGTH)))[:, :T]

    @jax.jit
    def read(weights, batch, cache):
        out = model.forward(weights, batch, cache=cache)
        return losses.logits(model.readout(weights, out.x_BTD), model.shard), out.cache

    slots = lambda slack: jax.eval_shape(lambda: model.family.init_cache(model.config, 2, T, jnp.float32, slack))  # noqa: E731
    windows = slots(0).layers != slots(1).layers
    last = 3 if windows else 1
    cache = model.family.init_cache(model.config, 2, T, jnp.float32, last - 1)
    got, at = [], 0
    for n in (prompt, *[1] * (T - prompt - last), last):
        part = {k: v[:, at : at + n] for k, v in batch.items() if k in ("tokens", "positions", "segments")}
        part |= {k: v for k, v in batch.items() if k.startswith("source") and at == 0}
        z, cache = read(weights, part, cache)
        got.append(z)
        at += n
    got, real = np.concatenate(got, 1), batch["segments"] > 0
    np.testing.assert_allclose(got[real], expected[real], atol=2e-5, rtol=1e-4)
    assert int(cache.end) == T


@functools.cache
def gradients(name: str, **execution):
    """(loss, gradients) on one device, of one way to run the layers."""
    model = make_model(name, layers=IN_TURN.get(name), **execution)
    return jax.jit(jax.value_and_grad(functools.partial(_loss, model)))(make_weights(model), _rows(model))


def _rows(model: Model) -> dict:
    return documents(model, (8,), rows=8)[0]


def _loss(model: Model, weights: dict, batch: dict) -> jax.Array:
    out = model.forward(weights, batch)
    targets = jnp.roll(batch["tokens"], -1, 1)
    sums = losses.cross_entropy(
        model.readout(weights, out.x_BTD), targets, jnp.ones(targets.shape, jnp.float32), shard=model.shard
    )
    aux = jnp.zeros(()) if out.aux_B is None else out.aux_B.sum() * targets.shape[1]
    return (sums.loss + aux) / targets.size


def assert_close(got, expected) -> None:
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(expected[1]))
    assert scale > 1e-3
    for (path, a), b in zip(tree.flatten(got[1]).items(), tree.flatten(expected[1]).values(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * scale, rtol=1e-3, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_scanned_and_rematerialized_equals_unrolled(name):
    """On one device; the test below finds what this one does, and this one says whether the mesh is to blame."""
    assert_close(gradients(name, scan=True, remat="full"), gradients(name))


@pytest.mark.parametrize("name", EACH)
def test_a_mesh_equals_one_device(name):
    """Scanned and rematerialized on explicit axes, where a missing annotation is an error; unrolled on the device."""
    moe = "experts" in {a for s in tree.flatten(make_model(name).specs, spec.is_spec).values() for a in s.axes}
    c = config.Mesh(data=1 if moe else 2, fsdp=2, expert=2 if moe else 1, tensor=2, axis_type="explicit")
    mesh = make_mesh(c)
    layout = Layout.of(c, config.Execution(dtype="float32", scan=True, remat="full"))
    model = make_model(name, layout, IN_TURN.get(name))
    homes = model.shard.shardings(model.specs, mesh)
    with on_mesh(mesh):
        weights = jax.device_put(make_weights(model), homes)
        batch = {k: jax.device_put(v, NamedSharding(mesh, model.shard.spec(("batch", None))))
                 for k, v in _rows(model).items()}  # fmt: skip
        got = jax.jit(jax.value_and_grad(functools.partial(_loss, model)), out_shardings=(None, homes))(weights, batch)
    assert_close(jax.device_get(got), gradients(name))
