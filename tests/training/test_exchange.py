"""What workers exchange, as compiled for eight devices: nothing over `replica` in a step, theory's bytes after it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.core import config
from jaxlm.core.distributed import Distributed
from jaxlm.models import llama
from jaxlm.objectives import causal
from jaxlm.planning import ahead_of_time, targets
from jaxlm.planning import workers as planned
from jaxlm.runtime import mesh as meshes
from jaxlm.training.distributed import compression, exchange

SHAPE = llama.Config(vocab=512, layers=4, width=64, heads=2, kv_heads=2, head_width=32, ffn=128)
INSIDE = {
    "fsdp": dict(fsdp=4),
    "data and fsdp": dict(data=2, fsdp=2),
    "ZeRO 1 and tensor": dict(fsdp=2, zero=1, tensor=2),
    "context": dict(context=2, fsdp=2),
    "stages": dict(stage=2, data=2),
    "workers that take turns": dict(fsdp=4),
}
QUICK = ("data and fsdp", "stages")


def a_run(inside: str, **distributed) -> config.Run:
    workers = 4 if inside == "workers that take turns" else None
    return config.Run(
        "x", SHAPE, causal.Config(), train=config.Train(batch_size=16, seq_len=32),
        mesh=config.Mesh(replica=2, **INSIDE[inside]), execution=config.Execution(dtype="float32", scan=True),
        distributed=Distributed("diloco", workers=workers, **distributed),
    )  # fmt: skip


@pytest.mark.parametrize("inside", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in INSIDE])
def test_a_step_sends_nothing_to_another_worker(inside) -> None:
    made = ahead_of_time.compile_step(a_run(inside), targets.parse("cpu:8"))
    assert made.module.collectives
    assert [c for c in made.module.collectives if exchange.AXIS in c.axes] == []


@pytest.mark.parametrize(
    ("inside", "kind", "large"),
    [
        ("fsdp", "none", 1 << 10),
        ("data and fsdp", "none", 1 << 10),
        ("data and fsdp", "int8", 1 << 10),
        ("fsdp", "float4", 1 << 30),
        pytest.param("fsdp", "bfloat16", 1 << 10, marks=pytest.mark.slow),
        pytest.param("ZeRO 1 and tensor", "float4", 1 << 10, marks=pytest.mark.slow),
        pytest.param("stages", "int8", 1 << 30, marks=pytest.mark.slow),
    ],
)
def test_an_exchange_sends_what_theory_says(monkeypatch, inside, kind, large) -> None:
    monkeypatch.setattr(exchange, "LARGE", large)
    t = targets.parse("cpu:8")
    made = ahead_of_time.compile_exchange(a_run(inside, compress=kind), t)
    over = [c for c in made.module.collectives if exchange.AXIS in c.axes]
    assert {(c.kind, c.axes) for c in over} == {("all-reduce" if kind == "none" else "all-gather", (exchange.AXIS,))}
    numbers = sum(x.size for x in jax.tree.leaves(made.program.abstract_state().outer.params))
    one = compression.size(kind, numbers) / 4  # four devices of a worker send a part each
    theory = 2 * (2 - 1) / 2 * one if kind == "none" else (2 - 1) * one
    assert sum(c.sent for c in over) == pytest.approx(theory, rel=0.05)
    assert planned.exchange(made.program, t).sent == pytest.approx(theory, rel=0.05)


def test_a_fragment_is_its_share_of_an_exchange() -> None:
    run, t = a_run("fsdp", fragments=4, every=4), targets.parse("cpu:8")
    sent = [
        sum(c.sent for c in ahead_of_time.compile_exchange(run, t, (p,)).module.collectives if "replica" in c.axes)
        for p in range(4)
    ]
    whole = planned.exchange(ahead_of_time.program_for(run, t), t).sent
    assert sum(sent) == pytest.approx(whole, rel=0.05)  # small weights are filled up to whole blocks
    assert max(sent) <= 1.1 * whole / 4


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_weights_that_travel_alone_arrive_as_all_together(monkeypatch, kind) -> None:
    """On two replicas of two workers each, whose weights are cut, or not, over the other axes."""
    mesh = meshes.make_mesh(config.Mesh(replica=2, data=2, fsdp=2))
    homes = {"a": NamedSharding(mesh, P(None, "fsdp")), "b": NamedSharding(mesh, P()), "c": NamedSharding(mesh, P())}
    shapes = {"a": (8, 64), "b": (512,), "c": (6,)}
    rng = np.random.default_rng(0)
    draw = lambda *lead: {n: jnp.asarray(rng.standard_normal((*lead, *s)), jnp.float32) for n, s in shapes.items()}  # noqa: E731
    part, weights, learned = draw(4), draw(), jnp.asarray([1.0, 2.0, 3.0, 2.0])
    c = dataclasses.replace(Distributed("diloco"), compress=kind)
    found = {}
    for large in (1 << 30, 1 << 8):
        monkeypatch.setattr(exchange, "LARGE", large)
        with meshes.on_mesh(mesh):
            run = jax.jit(lambda *a: exchange.mean(c, *a, learned, homes, mesh)[0])
            found[large] = jax.device_get(run(part, weights, None))
    for n in shapes:
        expected = np.tensordot(np.asarray(learned) / 8, np.asarray(part[n]), 1)
        np.testing.assert_allclose(found[1 << 8][n], expected, atol=1e-5 if kind == "none" else 0.05)
        np.testing.assert_allclose(found[1 << 8][n], found[1 << 30][n], atol=1e-6 if kind == "none" else 0.05)
