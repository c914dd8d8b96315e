"""One program, one loss, one update: on one device and on every mesh of eight."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from support.mesh_rows import ALONE, CASES, ROWS, Row, covering, table

from jaxlm.core import config, spec, tree
from jaxlm.models import MODELS, bert, gpt2, llama, mixtral, t5
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout, batch_sharding
from jaxlm.nn.moe import Moe
from jaxlm.objectives import causal, next_sentence, seq2seq
from jaxlm.runtime.mesh import make_mesh, on_mesh, replicated
from jaxlm.training import optimizers, step

B, T, V = 8, 16, 64
MODEL = {
    "llama": llama.Config(vocab=V, layers=4, width=16, heads=4, kv_heads=2, head_width=8, ffn=32),
    "mixtral": mixtral.Config(
        vocab=V, layers=4, width=16, heads=4, kv_heads=2, head_width=8, moe=Moe(experts=4, top_k=2, ffn=16, balance=0.1)
    ),
    "gpt2": gpt2.Config(vocab=V, layers=2, width=16, heads=4, positions=T),
    "bert": bert.Config(vocab=V, layers=2, width=16, heads=4, ffn=32, positions=T, dropout=0.1),
    "t5": t5.Config(vocab=V, layers=4, width=16, heads=4, head_width=8, ffn=32, buckets=8, longest=16),
}
OBJECTIVE = {
    "bert": (next_sentence.objective, next_sentence.Config()),
    "t5": (seq2seq.objective, seq2seq.Config()),
}
TRIPLE = "ZeRO 3 × tensor × context"
QUICK = covering()
ALL = [*CASES, ("gpt2", TRIPLE, "explicit")]


def make_batch(family: str, micro: int) -> dict:
    """Packed rows that end in padding, but for the encoder's."""
    rng = np.random.default_rng(0)
    first = 1 if family == "bert" else 0
    segments = np.sort(rng.integers(first, 4, (B, T)), -1)[:, ::-1].astype(np.int32)
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
        weights = (rng.random((B, T)) < 0.7) & (segments > 0)
        batch |= {"targets": tokens[:, 1:], "weights": weights.astype(np.float32)}
    if family == "t5":
        batch |= {"source": rng.integers(0, V, (B, T)).astype(np.int32), "source_positions": positions}
        batch["source_segments"] = np.tile(np.repeat(np.array([3, 2, 1, 0], np.int32), T // 4), (B, 1))
    return {k: v.reshape(micro, B // micro, *v.shape[1:]) for k, v in batch.items()}


def make_weights(specs: dict) -> dict:
    """Near the initial ones, but no bias is zero and no scale one."""
    rng = np.random.default_rng(0)
    draw = lambda s: (rng.normal(0, 0.15, s.shape) + (s.role == "norm")).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, specs, is_leaf=spec.is_spec)


def run(family: str, row: Row | None, axis_type: str = "auto", first: step.State | None = None) -> tuple:
    """Losses and gradient norms of two updates; the state before (made here unless given); weights and averages after.

    Made once a family and put where a mesh wants it, the state costs no program of each mesh.
    """
    objective, oc = OBJECTIVE.get(family, (causal.objective, causal.Config(z_loss=1e-3)))
    devices = jax.devices()[:1] if row is None else jax.devices()
    row = row or Row({})
    mesh_config = config.Mesh(**row.mesh, axis_type=axis_type)
    execution = config.Execution(**dict(dtype="float32", loss_chunk=24, scan=True) | row.execution)
    mesh = make_mesh(mesh_config, devices)
    layout = Layout.of(mesh_config, execution)
    c = MODEL[family]
    specs = MODELS[family].specs(c) | objective.specs(oc, c.width)
    model = Model(MODELS[family], c, specs, layout)
    # an update in proportion to the gradient: a wrong factor shows, which Adam would hide
    optimizer = optimizers.make(config.Optim(name="sgd", momentum=0.9, lr=0.3, warmup=0, weight_decay=0.0), 100, specs)
    homes, moments = layout.shardings(specs, mesh), layout.shardings(specs, mesh, layout.moments)
    shardings = None if mesh is None else step.UpdateShardings.of(mesh_config.zero, homes, moments, optimizer)
    host = "optimizer" in execution.offload
    homes = step.shardings(specs, homes, optimizer, True, replicated(mesh), moments, host)
    train = step.make_train_step(
        lambda p, b, k: objective.loss(oc, model, p, b, k), objective.totals, optimizer, seed=0, clip=1.0, ema=0.9,
        shardings=shardings, host=host,
    )  # fmt: skip
    with on_mesh(mesh):
        if first is None:
            params = make_weights(specs)
            frozen = jax.tree.map(lambda _: None, params)
            first = jax.device_get(jax.jit(lambda params: step.start(params, frozen, optimizer, True))(params))
        state = jax.device_put(first, homes)
        batch = {
            k: jax.device_put(v, batch_sharding(layout, mesh, v.shape, T))
            for k, v in make_batch(family, row.micro).items()
        }
        f = jax.jit(train, donate_argnums=0, out_shardings=(homes, None))
        losses = []
        for _ in range(2):
            state, metrics = f(state, batch)
            losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(losses), first, jax.device_get((state.params, state.ema))


@functools.cache
def one_device(family: str) -> tuple:
    return run(family, None)


def close(got, expected, atol: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=atol), got, expected)


@pytest.mark.parametrize(
    ("family", "name", "axis_type"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK)],
)
def test_mesh_equals_one_device(family: str, name: str, axis_type: str) -> None:
    """The same losses, gradients, updates, averages and (bert) dropout."""
    expected, first, whole = one_device(family)
    losses, _, last = run(family, ROWS[name], axis_type, first)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    close(last, whole, atol=2e-5)


@functools.cache
def first_on_one_device() -> tuple[dict, dict]:
    """Of BERT's weights one for every way to be split: their specs, and what they are before the first update."""
    specs = tree.flatten(bert.specs(MODEL["bert"]), spec.is_spec)
    specs = {path: specs[path] for path in {s.axes: path for path, s in specs.items()}.values()}
    return specs, jax.device_get(jax.jit(lambda key: spec.init(specs, key))(jax.random.key(0)))


@pytest.mark.parametrize("name", [TRIPLE, *(pytest.param(n, marks=pytest.mark.slow) for n in ALONE)])
@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
def test_the_first_weights_are_the_same_on_every_mesh(name: str, axis_type: str) -> None:
    """To the last bit but one: programs round differently, the random numbers are the same."""
    c, layout = config.Mesh(**ROWS[name].mesh, axis_type=axis_type), Layout.of
    (specs, whole), m = first_on_one_device(), make_mesh(c)
    homes = layout(c, config.Execution()).shardings(specs, m)
    with on_mesh(m):
        first = jax.jit(lambda key: spec.init(specs, key), out_shardings=homes)(jax.random.key(0))
    close(first, whole, atol=0)


def test_the_documentation_lists_these_meshes_and_no_others() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "parallelism.md").read_text()
    listed = page.partition("<!-- composes -->\n")[2].partition("\n<!-- /composes -->")[0]
    assert listed == table(), "docs/how-to/parallelism.md: between its marks stands what mesh_rows.py prints"
