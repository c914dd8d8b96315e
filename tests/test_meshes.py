"""One program, one loss, one update: on one device and on every mesh of eight."""

import jax
import numpy as np
import pytest

from jaxlm import config, optim, sharding, step
from jaxlm.models import MODELS, Model
from jaxlm.models import bert, gpt2, llama
from jaxlm.objectives import causal, masked, next_sentence

B, T = 8, 32
MODEL = {
    "llama": llama.Config(vocab=128, layers=2, width=32, heads=4, kv_heads=2, head_width=8, ffn=64),
    "gpt2": gpt2.Config(vocab=128, layers=2, width=32, heads=4, positions=T),
    "bert": bert.Config(vocab=128, layers=2, width=32, heads=4, ffn=64, positions=T, dropout=0.1),
}
MESHES = {
    "data": config.Mesh(data=8),
    "fsdp": config.Mesh(fsdp=8),
    "tensor": config.Mesh(data=4, tensor=2),
    "context": config.Mesh(data=2, context=4),
    "fsdp x tensor x context": config.Mesh(fsdp=2, tensor=2, context=2),
    "replica x data x fsdp": config.Mesh(replica=2, data=2, fsdp=2),
}


def make_batch(family: str, micro: int = 1) -> dict:
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 4, (B, T)), -1).astype(np.int32)
    tokens = rng.integers(0, 128, (B, T + 1)).astype(np.int32)
    batch = dict(
        tokens=tokens[:, :-1], segments=segments, positions=np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    )
    if family == "bert":
        batch |= dict(
            at=rng.integers(0, T, (B, 8)).astype(np.int32),
            targets=rng.integers(0, 128, (B, 8)).astype(np.int32),
            weights=(rng.random((B, 8)) < 0.7).astype(np.float32),
            types=(segments > 1).astype(np.int32),
            is_next=rng.integers(0, 2, B).astype(np.int32),
            rows=np.ones(B, np.float32),
        )
    else:
        batch |= dict(targets=tokens[:, 1:], weights=(rng.random((B, T)) < 0.7).astype(np.float32))
    return {k: v.reshape(micro, B // micro, *v.shape[1:]) for k, v in batch.items()}


def run(family: str, mesh_config: config.Mesh | None, *, steps: int = 3, micro: int = 1, **execution) -> tuple:
    objective, oc = (next_sentence, next_sentence.Config()) if family == "bert" else (causal, causal.Config(z_loss=1e-3))
    execution = config.Execution(**{"dtype": "float32", "loss_chunk": 24} | execution)
    devices = jax.devices()[:1] if mesh_config is None else jax.devices()
    mesh_config = mesh_config or config.Mesh()
    mesh = sharding.make_mesh(mesh_config, devices)
    layout = sharding.Layout.of(mesh_config, execution)
    c = MODEL[family]
    specs = MODELS[family].specs(c) | objective.specs(oc, c.width)
    model = Model(MODELS[family], c, specs, layout)
    optimizer = optim.make(config.Optim(lr=1e-2, warmup=0, eps=1e-3), 100, specs)
    homes = step.shardings(specs, layout.shardings(specs, mesh), optimizer, False, sharding.replicated(mesh))
    train = step.make_train_step(
        lambda p, b, k: objective.loss(oc, model, p, b, k), objective.weights, optimizer, seed=0, clip=1.0, ema=0.0
    )
    with sharding.on_mesh(mesh):
        state = jax.jit(lambda k: step.init_state(specs, optimizer, k, False), out_shardings=homes)(jax.random.key(0))
        batch = {
            k: jax.device_put(v, sharding.batch_sharding(layout, mesh, v.shape, T))
            for k, v in make_batch(family, micro).items()
        }
        f = jax.jit(train, donate_argnums=0, out_shardings=(homes, None))
        losses = []
        for _ in range(steps):
            state, metrics = f(state, batch)
            losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(losses), jax.device_get(state.params)


@pytest.fixture(scope="module")
def one_device() -> dict:
    return {family: run(family, None) for family in MODEL}


@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("family", MODEL)
def test_mesh_equals_one_device(family: str, mesh: str, axis_type: str, one_device: dict) -> None:
    import dataclasses

    losses, weights = run(family, dataclasses.replace(MESHES[mesh], axis_type=axis_type))
    expected, whole = one_device[family]
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), weights, whole)
