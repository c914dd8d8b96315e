"""One program, one loss, one update: on one device and on every mesh of eight."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxlm import config, optim, params, sharding, step
from jaxlm.models import MODELS, Model, bert, gpt2, llama
from jaxlm.objectives import causal, next_sentence

B, T, V = 8, 16, 64
MODEL = {
    "llama": llama.Config(vocab=V, layers=2, width=16, heads=4, kv_heads=2, head_width=8, ffn=32),
    "gpt2": gpt2.Config(vocab=V, layers=2, width=16, heads=4, positions=T),
    "bert": bert.Config(vocab=V, layers=2, width=16, heads=4, ffn=32, positions=T, dropout=0.1),
}
MESHES = {
    "data": config.Mesh(data=8),
    "fsdp": config.Mesh(fsdp=8),
    "tensor": config.Mesh(data=4, tensor=2),
    "context": config.Mesh(data=2, context=4),
    "fsdp x tensor x context": config.Mesh(fsdp=2, tensor=2, context=2),
    "replica x data x fsdp": config.Mesh(replica=2, data=2, fsdp=2),
}
MIXTURES = ("fsdp x tensor x context", "replica x data x fsdp")
QUICK = [
    *[("llama", mesh, "explicit") for mesh in MESHES],
    *[("bert", mesh, "explicit") for mesh in MESHES],
    *[("llama", mesh, "auto") for mesh in MIXTURES],
    ("bert", MIXTURES[0], "auto"),
    ("gpt2", MIXTURES[0], "explicit"),
]
ALL = [(family, mesh, kind) for family in MODEL for mesh in MESHES for kind in ("auto", "explicit")]
CASES = QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK]


def make_batch(family: str, micro: int) -> dict:
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 4, (B, T)), -1).astype(np.int32)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    batch = {"tokens": tokens[:, :-1], "segments": segments, "positions": positions}
    if family == "bert":
        batch |= {
            "at": rng.integers(0, T, (B, 8)).astype(np.int32),
            "targets": rng.integers(0, V, (B, 8)).astype(np.int32),
            "weights": (rng.random((B, 8)) < 0.7).astype(np.float32),
            "types": (segments > 1).astype(np.int32),
            "is_next": rng.integers(0, 2, B).astype(np.int32),
            "rows": np.ones(B, np.float32),
        }
    else:
        batch |= {"targets": tokens[:, 1:], "weights": (rng.random((B, T)) < 0.7).astype(np.float32)}
    return {k: v.reshape(micro, B // micro, *v.shape[1:]) for k, v in batch.items()}


def run(family: str, mesh_config: config.Mesh | None, first=None, *, micro: int = 1) -> tuple:
    """Losses and gradient norms of two updates; the weights before (made here unless given) and after."""
    objective, oc = (
        (next_sentence, next_sentence.Config()) if family == "bert" else (causal, causal.Config(z_loss=1e-3))
    )
    execution = config.Execution(dtype="float32", loss_chunk=24, scan=True)
    devices = jax.devices()[:1] if mesh_config is None else jax.devices()
    mesh_config = mesh_config or config.Mesh()
    mesh = sharding.make_mesh(mesh_config, devices)
    layout = sharding.Layout.of(mesh_config, execution)
    c = MODEL[family]
    specs = MODELS[family].specs(c) | objective.specs(oc, c.width)
    model = Model(MODELS[family], c, specs, layout)
    # an update in proportion to the gradient: a wrong factor shows, which Adam would hide
    optimizer = optim.make(config.Optim(name="sgd", momentum=0.0, lr=0.3, warmup=0, weight_decay=0.0), 100, specs)
    homes = step.shardings(specs, layout.shardings(specs, mesh), optimizer, False, sharding.replicated(mesh))
    train = step.make_train_step(
        lambda p, b, k: objective.loss(oc, model, p, b, k), objective.weights, optimizer, seed=0, clip=1.0, ema=0.0
    )
    with sharding.on_mesh(mesh):
        if first is None:
            make = jax.jit(lambda key: step.init_state(specs, optimizer, key, False), out_shardings=homes)
            state = make(jax.random.key(0))
        else:
            none = jax.tree.map(lambda _: None, first)
            state = jax.device_put(step.start(first, none, optimizer, False), homes)
        before = jax.device_get(state.params)
        batch = {
            k: jax.device_put(v, sharding.batch_sharding(layout, mesh, v.shape, T))
            for k, v in make_batch(family, micro).items()
        }
        f = jax.jit(train, donate_argnums=0, out_shardings=(homes, None))
        losses = []
        for _ in range(2):
            state, metrics = f(state, batch)
            losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(losses), before, jax.device_get(state.params)


@functools.cache
def one_device(family: str) -> tuple:
    return run(family, None)


def close(got, expected, atol: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=atol), got, expected)


@pytest.mark.parametrize(("family", "mesh", "axis_type"), CASES)
def test_mesh_equals_one_device(family: str, mesh: str, axis_type: str) -> None:
    """The same losses, gradients, updates and (bert) dropout."""
    expected, first, whole = one_device(family)
    losses, _, last = run(family, dataclasses.replace(MESHES[mesh], axis_type=axis_type), first)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    close(last, whole, atol=2e-5)


@pytest.mark.parametrize(
    "mesh", [MIXTURES[0], *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES if m != MIXTURES[0])]
)
@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
def test_the_first_weights_are_the_same_on_every_mesh(mesh: str, axis_type: str) -> None:
    """To the last bit but one: programs round differently, the random numbers are the same."""
    c, layout = dataclasses.replace(MESHES[mesh], axis_type=axis_type), sharding.Layout.of
    specs, m = bert.specs(MODEL["bert"]), sharding.make_mesh(c)
    homes = layout(c, config.Execution()).shardings(specs, m)
    with sharding.on_mesh(m):
        first = jax.jit(lambda key: params.init(specs, key), out_shardings=homes)(jax.random.key(0))
    whole = {k: one_device("bert")[1][k] for k in specs}
    close(first, whole, atol=0)


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_accumulation_on_a_mesh_equals_one_device(family: str) -> None:
    """Each micro-batch is split over the devices too. (bert has dropout, whose keys differ between micro-batches.)"""
    expected, first, whole = one_device(family)
    losses, _, last = run(family, config.Mesh(fsdp=4, tensor=2, axis_type="explicit"), first, micro=2)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    close(last, whole, atol=2e-5)
