"""What workers exchange, as compiled for eight devices: nothing over `replica` in a step, theory's bytes after it; and
what plans say of it."""

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
from jaxlm.planning import ahead_of_time, plan, roofline, targets, workers
from jaxlm.runtime import mesh as meshes
from jaxlm.training.distributed import compression, exchange

SHAPE = llama.Config(vocab=512, layers=4, width=64, heads=2, kv_heads=2, head_width=32, ffn=128)
INSIDE = {
    "fsdp": dict(fsdp=4),
    "data and fsdp": dict(data=2, fsdp=2),
    "ZeRO 1 and tensor": dict(fsdp=2, zero=1, tensor=2),
    "context": dict(context=2, fsdp=2),
    "stages": dict(stage=2, data=2),
}
CPUS = targets.parse("cpu:8")


def a_run(inside: str, workers: int | None = None, **distributed) -> config.Run:
    return config.Run(
        "x", SHAPE, causal.Config(), train=config.Train(batch_size=16, seq_len=32),
        mesh=config.Mesh(replica=2, **INSIDE[inside]), execution=config.Execution(dtype="float32", scan=True),
        distributed=Distributed("diloco", workers=workers, **distributed),
    )  # fmt: skip


def between_workers(module):
    return [c for c in module.collectives if exchange.AXIS in c.axes]


@pytest.fixture(scope="module")
def turns() -> plan.Plan:
    """Two workers on each of two replicas, whose large weights travel alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "LARGE", 1 << 10)
        return plan.make(a_run("data and fsdp", workers=4, compress="int8", every=8), CPUS)


def test_workers_that_take_turns_send_nothing_in_a_step_and_theorys_bytes_after_it(turns) -> None:
    assert turns.compiled.module.collectives and between_workers(turns.compiled.module) == []
    found = between_workers(turns.compiled_exchange.module)
    assert {(c.kind, c.axes) for c in found} == {("all-gather", (exchange.AXIS,))}
    p = turns.compiled_exchange.program
    one = compression.size("int8", p.parameters[1]) / 4  # four devices of a replica send a part each
    assert turns.compiled_exchange.sent == pytest.approx(2 * one, rel=0.05)
    assert turns.exchange.sent == pytest.approx(2 * one, rel=0.01)
    assert turns.exchange.sent_by_worker == pytest.approx(8 * one, rel=0.01)


def test_a_plan_counts_what_workers_hold_by_arithmetic_as_compiled(turns) -> None:
    found, by_arithmetic = turns.cost, turns.by_arithmetic
    for part in ("parameters", "optimizer state", roofline.GLOBAL, roofline.OUTER, roofline.ERROR):
        assert by_arithmetic.memory[part] == pytest.approx(found.memory[part], rel=1e-3), part
    assert found.memory[roofline.ERROR] == found.memory["parameters"] == 2 * found.memory[roofline.GLOBAL]
    assert found.memory[roofline.OUTER] == pytest.approx(found.memory[roofline.GLOBAL])
    assert by_arithmetic.flops == pytest.approx(found.flops, rel=0.05)
    assert not any("replica" in f.axes for c in (found, by_arithmetic) for f in c.flows)


@pytest.mark.parametrize(
    "inside", ["stages", *(pytest.param(n, marks=pytest.mark.slow) for n in INSIDE if n != "stages")]
)
def test_a_step_sends_nothing_to_another_worker(inside) -> None:
    made = ahead_of_time.compile_step(a_run(inside), CPUS)
    assert made.module.collectives
    assert between_workers(made.module) == []


@pytest.mark.parametrize(
    ("inside", "kind", "large"),
    [
        ("data and fsdp", "none", 1 << 10),
        ("fsdp", "float4", 1 << 30),
        pytest.param("fsdp", "bfloat16", 1 << 10, marks=pytest.mark.slow),
        pytest.param("ZeRO 1 and tensor", "float4", 1 << 10, marks=pytest.mark.slow),
        pytest.param("stages", "int8", 1 << 30, marks=pytest.mark.slow),
    ],
)
def test_an_exchange_sends_what_theory_says(monkeypatch, inside, kind, large) -> None:
    monkeypatch.setattr(exchange, "LARGE", large)
    made = ahead_of_time.compile_exchange(a_run(inside, compress=kind), CPUS)
    found = between_workers(made.module)
    assert {(c.kind, c.axes) for c in found} == {("all-reduce" if kind == "none" else "all-gather", (exchange.AXIS,))}
    one = compression.size(kind, made.program.parameters[1]) / 4
    assert made.sent == pytest.approx(one, rel=0.05)  # 2 (R - 1) / R, or R - 1, of two replicas
    assert workers.exchange(made.program, CPUS).sent == pytest.approx(one, rel=0.01)


def test_a_fragment_is_its_share_of_an_exchange() -> None:
    run = a_run("fsdp", fragments=4, every=4)
    sent = [ahead_of_time.compile_exchange(run, CPUS, (p,)).sent for p in range(4)]
    planned = workers.exchange(ahead_of_time.program_for(run, CPUS), CPUS)
    whole = planned.sent
    assert planned.parts == 4 and planned.largest <= 1.1 * planned.sent_by_worker / 4
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
