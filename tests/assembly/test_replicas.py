"""Workers that train apart within one program: identities with plain training, on one device and on meshes of eight."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from support.continual_runs import make, write_sources

import jaxlm
from jaxlm.assembly.distributed.local_steps import simulated
from jaxlm.assembly.model_source import StartModel
from jaxlm.core import config, tree
from jaxlm.core.distributed import Distributed, Outer
from jaxlm.models import mixtral
from jaxlm.nn.moe import Moe
from jaxlm.runtime import mesh as meshes
from jaxlm.training.distributed import replicas
from jaxlm.training.distributed.simulate import Worker, simulate
from jaxlm.training.log import read_lines
from jaxlm.weights.adapters import Lora

AVERAGE = Outer("sgd", lr=1.0, momentum=0.0)
MIXTRAL = mixtral.Config(
    vocab=384, layers=2, width=16, heads=2, kv_heads=2, head_width=8, moe=Moe(experts=4, top_k=2, ffn=16)
)
ADAMW = config.Optim(lr=3e-3, warmup=2, weight_decay=0.1, clip=1.0, beta2=0.95)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


def a_run(sources, tmp_path, kind="decoder", *, steps=4, optim=None, adapter=None, mesh=None, **distributed):
    run = make(kind, sources[kind], tmp_path, on=mesh)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=steps), optim=optim or run.optim,
                              adapter=adapter or run.adapter)  # fmt: skip
    if not distributed:
        return run
    return dataclasses.replace(run, distributed=Distributed("diloco", **distributed))


def trained(run, devices=1, steps=None):
    """Returns the state after a run's steps, and the mean loss of each."""
    with meshes.on_devices(jax.devices()[:devices]):
        program = jaxlm.Program(run)
        state, losses = program.init(), []
        for batch in itertools.islice(program.batches(), steps or run.train.steps):
            state, metrics = program.step(state, batch)
            losses.append(float(np.mean(metrics["loss"])))
        return jax.device_get(state), losses


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, tolerance=2e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), a, b)


def test_one_worker_is_plain_training_to_the_bit(sources, tmp_path) -> None:
    plain, losses = trained(a_run(sources, tmp_path, optim=ADAMW))
    alone, apart = trained(a_run(sources, tmp_path, optim=ADAMW, workers=1, every=3, outer=AVERAGE))
    same(alone.outer.params, plain.params)
    same(jax.tree.map(lambda x: x[0], alone.opt), plain.opt)
    assert apart == losses


@pytest.mark.parametrize(
    "devices, mesh",
    [(1, config.Mesh()), (4, config.Mesh(replica=4)), (8, config.Mesh(replica=4, fsdp=2)), (2, config.Mesh(replica=2))],
)
def test_an_exchange_after_every_step_of_sgd_is_data_parallelism(sources, tmp_path, devices, mesh) -> None:
    plain, losses = trained(a_run(sources, tmp_path))
    apart, theirs = trained(
        a_run(sources, tmp_path, mesh=mesh, workers=4, every=1, outer=AVERAGE, weigh="tokens"), devices
    )
    close(apart.outer.params, plain.params, 1e-5)
    assert all(np.array_equal(w[0], w[i]) for w in jax.tree.leaves(apart.params) for i in range(4))
    np.testing.assert_allclose(theirs, losses, atol=2e-2)  # of equally weighted workers


def equal_batches(batch, workers):
    """Returns a batch whose workers all have the rows of the first."""

    def one(x):
        rows = x.shape[1] // workers
        return np.tile(np.asarray(x)[:, :rows], (1, workers) + (1,) * (x.ndim - 2))

    return jax.tree.map(one, batch)


def test_equal_workers_are_one(sources, tmp_path) -> None:
    outer = Outer("nesterov", lr=0.7, momentum=0.9)
    run = a_run(sources, tmp_path, optim=ADAMW, steps=5, workers=4, every=2, outer=outer)
    one = dataclasses.replace(run, distributed=dataclasses.replace(run.distributed, workers=1),
                              train=dataclasses.replace(run.train, batch_size=4))  # fmt: skip
    with meshes.on_devices(jax.devices()[:1]):
        many, alone = jaxlm.Program(run), jaxlm.Program(one)
        four, single = many.init(), alone.init()
        for batch in itertools.islice(many.batches(), 5):
            batch = equal_batches(jax.device_get(batch), 4)
            four, _ = many.step(four, batch)
            single, _ = alone.step(single, jax.tree.map(lambda x: x[:, :4], batch))
    close(four.outer.params, single.outer.params)
    assert any(np.any(np.asarray(w) != np.asarray(s)) for w, s in zip(
        jax.tree.leaves(single.outer.params), jax.tree.leaves(alone.init().outer.params), strict=True))  # fmt: skip


def test_streaming_of_one_fragment_is_diloco_and_of_two_exchanges_each_in_its_turn(sources, tmp_path) -> None:
    c = replicas.due
    one = Distributed("diloco", every=4, fragments=1)
    assert [n for n in range(1, 13) if c(one, n, 12).exchange] == [4, 8, 12]
    two = Distributed("diloco", every=4, fragments=2)
    assert [(n, c(two, n, 11).exchange) for n in range(1, 12) if c(two, n, 11).exchange] == [
        (2, (0,)), (4, (1,)), (6, (0,)), (8, (1,)), (10, (0,)), (11, (0, 1)),
    ]  # fmt: skip
    late = Distributed("diloco", every=4, fragments=2, overlap=1)
    assert [(n, c(late, n, 9)) for n in range(1, 10) if c(late, n, 9) != replicas.Due()] == [
        (3, replicas.Due(send=(0,), take=(0,))), (5, replicas.Due(send=(1,), take=(1,))),
        (7, replicas.Due(send=(0,), take=(0,))), (9, replicas.Due(send=(1,), exchange=(0, 1), take=(1,))),
    ]  # fmt: skip
    far = Distributed("diloco", every=4, overlap=3)
    assert [(n, c(far, n, 6)) for n in range(1, 7) if c(far, n, 6) != replicas.Due()] == [
        (5, replicas.Due(send=(0,))), (6, replicas.Due(exchange=(0,), take=(0,))),
    ]  # fmt: skip
    # Two fragments that are averaged after every step are one.
    whole, _ = trained(a_run(sources, tmp_path, workers=2, every=1, outer=AVERAGE))
    run = a_run(sources, tmp_path, workers=2, every=2, fragments=2, outer=AVERAGE)
    parts, _ = trained(run)
    assert jax.tree.structure(whole.outer.params) == jax.tree.structure(parts.outer.params)
    model = jaxlm.Program(run).parts
    assert sum(model.fragments.sizes) == model.parameters[1]


def test_a_fragment_that_was_sent_is_taken_up_later_and_mixed(sources, tmp_path) -> None:
    base = dict(workers=2, every=2, outer=AVERAGE)
    run = a_run(sources, tmp_path, steps=4, overlap=1, mix=0.25, **base)
    at_once = a_run(sources, tmp_path, steps=4, **base)
    with meshes.on_devices(jax.devices()[:1]):
        late, now = jaxlm.Program(run), jaxlm.Program(at_once)
        a, b = late.init(), now.init()
        batches = list(itertools.islice(late.batches(), 3))
        for batch in batches[:2]:
            a, _ = late.step(a, batch)
            b, _ = now.step(b, batch)
        same(a.outer.params, late.init().outer.params)  # it is still under way
        before = jax.device_get(a.params)
        sent = jax.tree.map(lambda w: np.mean(w, axis=0), before)
        a, _ = late.step(a, batches[2])
        close(jax.device_get(a.outer.params), sent, 1e-7)
        close(jax.device_get(b.outer.params), sent, 1e-7)
        # After its step each worker took up the global weights, but for a quarter of its own.
        apart = jaxlm.Program(a_run(sources, tmp_path, steps=99, workers=2, every=9, outer=AVERAGE))
        free = apart.init()
        for batch in batches:
            free, _ = apart.step(free, batch)
        close(a.params, jax.tree.map(lambda w, g: 0.25 * w + 0.75 * g[None], jax.device_get(free.params), sent), 1e-6)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "float4"])
def test_compressed_deltas_are_the_same_on_one_device_and_on_many(sources, tmp_path, kind) -> None:
    settings = dict(workers=2, every=2, compress=kind, outer=Outer("sgd", 1.0, 0.0))
    alone, _ = trained(a_run(sources, tmp_path, **settings))
    many, _ = trained(a_run(sources, tmp_path, mesh=config.Mesh(replica=2), **settings), 2)
    apart = np.concatenate([np.ravel(a - b) for a, b in zip(
        jax.tree.leaves(alone.outer.params), jax.tree.leaves(many.outer.params), strict=True)])  # fmt: skip
    assert np.mean(np.abs(apart) > 1e-6) < 2e-3  # numbers between two that the type has may go either way
    plain, _ = trained(a_run(sources, tmp_path, workers=2, every=2, outer=AVERAGE))
    moved = max(float(np.max(np.abs(a - b))) for a, b in zip(
        jax.tree.leaves(alone.outer.params), jax.tree.leaves(plain.outer.params), strict=True))  # fmt: skip
    assert 0 < moved < 0.02
    # What each worker's deltas lost, it keeps: sent and kept together are what it meant to send.
    with meshes.on_devices(jax.devices()[:1]):
        run = a_run(sources, tmp_path, steps=2, **settings)
        program = jaxlm.Program(run)
        start = jax.device_get(program.init())
        free = jaxlm.Program(a_run(sources, tmp_path, steps=9, **settings | {"every": 9}))
        state, apart = program.init(), free.init()
        for batch in itertools.islice(program.batches(), 2):
            state, _ = program.step(state, batch)
            apart, _ = free.step(apart, batch)
    meant = jax.tree.map(lambda g, w: np.mean(g[None] - w, axis=0), start.outer.params, jax.device_get(apart.params))
    sent = jax.tree.map(lambda g, n: g - n, start.outer.params, jax.device_get(state.outer.params))
    kept = jax.tree.map(lambda e: np.mean(e, axis=0), jax.device_get(state.outer.error))
    close(jax.tree.map(np.add, sent, kept), meant, 1e-6)


def test_dropout_differs_between_workers_and_the_first_ones_is_that_of_a_run_without(sources, tmp_path) -> None:
    adapter = Lora(targets=("all",), dropout=0.5)
    run = a_run(sources, tmp_path, steps=9, adapter=adapter, workers=2, every=9)
    alone = a_run(sources, tmp_path, steps=9, adapter=adapter)
    with meshes.on_devices(jax.devices()[:1]):
        program, plain = jaxlm.Program(run), jaxlm.Program(alone)
        state, one = program.init(), plain.init()
        batch = equal_batches(jax.device_get(next(iter(program.batches()))), 2)
        state, _ = program.step(state, batch)
        one, _ = plain.step(one, jax.tree.map(lambda x: x[:, :8], batch))
    first, second = ([np.asarray(x[i]) for x in jax.tree.leaves(state.params)] for i in (0, 1))
    assert any(np.any(a != b) for a, b in zip(first, second, strict=True))
    close(first, [np.asarray(x) for x in jax.tree.leaves(one.params)])


WITHIN = {
    "data and fsdp": ("decoder", dict(data=2, fsdp=2)),
    "ZeRO 1 and tensor": ("decoder", dict(fsdp=2, zero=1, tensor=2)),
    "stages": ("decoder", dict(stage=2, data=2)),
    "keys gathered": ("encoder", dict(context=2, data=2)),
    "keys in a ring": ("decoder", dict(context=4, context_by="ring")),
    "encoder-decoder": ("encoder_decoder", dict(fsdp=2, tensor=2)),
    "experts": ("mixtral", dict(expert=2, fsdp=2)),
}
QUICK = ("data and fsdp", "stages")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in WITHIN])
def test_a_worker_may_have_any_mesh(sources, tmp_path, name) -> None:
    kind, mesh = WITHIN[name]
    settings = dict(steps=3, workers=2, every=2, fragments=2 if "stage" not in mesh else 1)

    def run(on=None):
        made = a_run(sources, tmp_path, "decoder" if kind == "mixtral" else kind, mesh=on, **settings)
        model = dataclasses.replace(made.model, layers=2) if kind != "mixtral" else MIXTRAL
        return dataclasses.replace(made, model=model)

    alone, losses = trained(run())
    many, theirs = trained(run(config.Mesh(replica=2, **mesh)), 8)
    np.testing.assert_allclose(theirs, losses, atol=1e-5)
    close(many.outer.params, alone.outer.params, 1e-5)
    close(many.params, alone.params, 1e-5)


@pytest.mark.parametrize("overlap", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_is_cut_in_the_middle_of_a_round_goes_on_to_the_bit(sources, tmp_path, overlap) -> None:
    settings = dict(
        steps=8, optim=ADAMW, workers=2, every=4, fragments=2, overlap=overlap, compress="int8", weigh="tokens"
    )
    whole, parts = (a_run(sources, tmp_path / name, **settings) for name in ("whole", "parts"))
    with meshes.on_devices(jax.devices()[:1]):
        jaxlm.train(whole)
        cut = dataclasses.replace(parts.train, save_every=3)

        class Stop(Exception):
            pass

        def stop(step, metrics):
            if step == 5:
                raise Stop

        with pytest.raises(Stop):
            jaxlm.train(dataclasses.replace(parts, train=cut), on_step=stop)
        jaxlm.train(dataclasses.replace(parts, train=cut))
        opened = [jaxlm.open(run.folder) for run in (whole, parts)]
        assert jaxlm.evaluate(parts.folder)
    same(*(o.params for o in opened))
    logs = [
        [line for line in read_lines(run.folder / "metrics.jsonl") if line["kind"] == "train"] for run in (whole, parts)
    ]
    assert logs[0][-1]["loss"] == logs[1][-1]["loss"]


def test_a_run_does_not_go_on_with_another_number_of_workers(sources, tmp_path) -> None:
    run = a_run(sources, tmp_path, steps=2, mesh=config.Mesh(replica=2), every=2)
    with meshes.on_devices(jax.devices()[:2]):
        jaxlm.train(run)
    more = dataclasses.replace(run, mesh=config.Mesh(replica=4), train=dataclasses.replace(run.train, steps=4))
    with meshes.on_devices(jax.devices()[:4]), pytest.raises(ValueError, match="workers is 2 there and 4"):
        jaxlm.train(more)


BAD = {
    "distributed.workers: 3 workers do not divide": dict(workers=3, mesh=config.Mesh(replica=2)),
    r"train.batch_size: 16 rows \(per micro-batch\) do not divide over 5 workers": dict(workers=5),
    "distributed.fragments: 4 do not divide distributed.every 30": dict(workers=2, fragments=4),
    "distributed.overlap: 10 steps are not below the 10": dict(workers=2, fragments=3, overlap=10),
    "optim.ema:": dict(workers=2, optim=dataclasses.replace(ADAMW, ema=0.9)),
}


@pytest.mark.parametrize("line", BAD)
def test_what_can_not_be_met_is_refused(sources, tmp_path, line) -> None:
    run = a_run(sources, tmp_path, **BAD[line])
    with pytest.raises(ValueError, match=f"^{line}"), meshes.on_devices(jax.devices()[: run.mesh.replica]):
        jaxlm.Program(run)


@pytest.mark.parametrize("compress", ["none", "int8"])
def test_a_parameter_server_gives_the_same_weights_from_the_same_schedule(sources, tmp_path, compress) -> None:
    run = a_run(sources, tmp_path, steps=6, optim=ADAMW, workers=2, every=3, compress=compress)
    apart, _ = trained(run)
    loose = dataclasses.replace(run, distributed=dataclasses.replace(run.distributed, method="server"))
    with meshes.on_devices(jax.devices()[:1]):
        weights, train = simulated(loose, StartModel(""))
        outcome = simulate(loose.distributed, [Worker("a"), Worker("b")], weights, 6, train)
    flat = tree.flatten(apart.outer.params)
    joined = np.concatenate([flat[path].ravel() for path in sorted(flat)])
    assert np.max(np.abs(weights - joined)) > 1e-3
    differs = np.abs(outcome.weights - joined) > 2e-6
    assert np.mean(differs) <= (0 if compress == "none" else 2e-3)  # the type's numbers may be chosen the other way
