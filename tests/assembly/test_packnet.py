"""PackNet: no later task changes what an earlier one computes, for models of every kind and on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.continual_runs import ONE_KIND_QUICKLY, Stopped, begun, make, write_sources

import jaxlm
from jaxlm.assembly import corpus, earlier, importances, owned
from jaxlm.assembly import program as programs
from jaxlm.assembly import stream as streams
from jaxlm.assembly.model_source import StartModel
from jaxlm.core import config, tree
from jaxlm.core.continual import Continual, PackNet
from jaxlm.core.stream import Stage
from jaxlm.data import loader
from jaxlm.data.tokenizer import Bytes
from jaxlm.objectives import classify
from jaxlm.runtime import mesh
from jaxlm.weights.adapters.lora import Lora

KEPT = Continual(("packnet",), packnet=PackNet(keep=0.5, retrain=0.25))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    return write_sources(tmp_path_factory.mktemp("data"))


def rows_of(p, count: int) -> dict[str, np.ndarray]:
    """The first rows of a run's data as a batch."""
    [part] = corpus.corpus(p.run.data, p.objective, ["train"]).train
    records = corpus.as_records(p.objective, part, document_mask=p.run.data.document_mask, seed=p.run.seed)
    rows = [p.objective.example(loader.record(records, i, np.random.default_rng(i)), None) for i in range(count)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def run_of(kind: str, sources, folder, **changes) -> config.Run:
    """A run of four updates that prunes after the third, with everything that might move a weight."""
    run = dataclasses.replace(make(kind, sources[kind], folder), name="first", continual=KEPT)
    optim = config.Optim(name="adamw", lr=1e-2, warmup=0, weight_decay=0.1, ema=0.8)
    return dataclasses.replace(
        run, optim=optim, train=dataclasses.replace(run.train, save_every=2), **changes
    )  # fmt: skip


def next_run(run: config.Run, name: str, kind: str, **changes) -> config.Run:
    if kind == "encoder":  # a task with a head of its own
        changes |= {"objective": classify.Config(labels=("yes", "no"), dropout=0.0)}
    return jaxlm.load(run, start=str(run.folder), name=name, **changes)


def outputs(opened, batch) -> list:
    found = opened.objective.outputs(opened.model, opened.params, batch)
    return [np.asarray(x) for x in jax.tree.leaves(found)]


@pytest.mark.parametrize("kind", ONE_KIND_QUICKLY)
def test_an_earlier_task_computes_what_it_did(kind, sources, tmp_path, one_device):
    """Bit for bit, after a task that was stopped before it pruned and went on as if it hadn't been."""
    base = run_of(kind, sources, tmp_path)
    first = jaxlm.train(base)
    second = jaxlm.train(next_run(base, "second", kind))

    def stop(step: int, metrics: dict) -> None:
        if step == 3:
            raise Stopped

    with pytest.raises(Stopped):
        jaxlm.train(next_run(base, "parts", kind), on_step=stop)
    parts = jaxlm.train(next_run(base, "parts", kind))
    a, b = (run.open().pretrained.params for run in (second, parts))
    jax.tree.map(np.testing.assert_array_equal, a, b)

    alone, known = first.open().pretrained, jaxlm.open(f"{second.path}#first").pretrained
    jax.tree.map(np.testing.assert_array_equal, alone.params, known.params)
    p = programs.program(base, Bytes(), None, ())
    batch = {k: jnp.asarray(v) for k, v in rows_of(p, 4).items()}
    for x, y in zip(outputs(alone, batch), outputs(known, batch), strict=True):
        np.testing.assert_array_equal(x, y)
    score = streams._score(second.path, base, Stage("first"))
    assert score == streams.scored(alone, base, Stage("first"))

    plan = p.earlier.plan(p.specs, p.objective.specs(base.model.width), 4)
    now, changed = tree.flatten(a), []
    for path, w in tree.flatten(alone.params).items():
        if plan.axes(path) is None:
            continue
        assert np.count_nonzero(w == 0) == w.size - w.size // 2, path
        was = np.asarray(w) != 0
        np.testing.assert_array_equal(np.asarray(now[path])[was], np.asarray(w)[was])
        assert np.count_nonzero(np.asarray(now[path])[~was]) <= (w.size // 2 + 1) // 2
        changed.append(np.count_nonzero(np.asarray(now[path])[~was]))
    assert sum(changed) > 0.05 * sum(w.size for w in tree.flatten(alone.params).values())


@pytest.mark.parametrize("kind", ONE_KIND_QUICKLY)
def test_eight_devices_prune_what_one_does(kind, sources, tmp_path):
    found = []
    for name, on, devices in (("one", config.Mesh(), 1), ("eight", config.Mesh(fsdp=4, tensor=2), 8)):
        with mesh.on_devices(jax.devices()[:devices]):
            run = make(kind, sources[kind], tmp_path / name, (), on)
            run = dataclasses.replace(
                run, continual=KEPT, optim=dataclasses.replace(run.optim, lr=1e-4),
                train=dataclasses.replace(run.train, steps=1),
            )  # fmt: skip
            p, state = begun(run)
            batch = rows_of(p, 16)
            with mesh.on_mesh(p.mesh):
                state, _ = p.train_step()(state, p.to_device({k: v[None] for k, v in batch.items()}, None))
            found.append(jax.device_get((state.params, state.tracks["packnet"]["pruned"])))
    (one, gone), (eight, pruned) = found
    jax.tree.map(np.testing.assert_array_equal, pruned, gone)
    assert sum(x.sum() for x in jax.tree.leaves(gone)) > 0.4 * sum(x.size for x in jax.tree.leaves(gone))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, rtol=2e-3, atol=2e-5), one, eight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"continual.methods": ("packnet", "ewc")}, "so ewc has nothing to keep; choose one"),
        ({"continual.methods": ("replay", "packnet")}, "so replay has nothing to keep"),
        ({"continual.old": ("x.csv",)}, r"continual\.old: packnet reads no earlier data"),
        ({"train.use": "best"}, r"train\.use: .* before packnet prunes; set it to last"),
        ({"train.patience": 3}, r"train\.patience: .* before packnet prunes; set it to 0"),
        ({"optim.only_layers": (0,)}, r"optim\.only_layers: packnet prunes all layers"),
        ({"optim.top_layers": 1}, r"optim\.top_layers: packnet prunes all layers"),
        ({"adapter": "orthogonal_lora"}, "and so does orthogonal_lora; leave out packnet"),
        ({"continual.packnet.keep": 0.0}, r"continual\.packnet\.keep: 0\.0 is out of range"),
    ],
)
def test_what_does_not_go_with_packnet_is_one_line(change, message, sources, tmp_path, one_device):
    with pytest.raises(ValueError, match=message) as raised:
        programs.program(jaxlm.load(run_of("encoder", sources, tmp_path), **change), Bytes())
    assert "\n" not in str(raised.value)


def test_tasks_beyond_those_that_have_weights_are_refused_before_the_first(sources, tmp_path):
    run = run_of("encoder", sources, tmp_path)
    runs = [dataclasses.replace(run, name=f"task{i}") for i in range(1, 9)]
    owned.check_stream(runs[:7])
    with pytest.raises(ValueError, match=r"keep: 7 stages leave 0\.78% of the weights to task8; .* packnet\.tasks 8"):
        owned.check_stream(runs)
    with pytest.raises(ValueError, match=r"packnet\.tasks: 2 tasks share the weights and this is task 3"):
        owned.check_stream([jaxlm.load(r, **{"continual.packnet.tasks": 2}) for r in runs[:3]])


@pytest.mark.slow
def test_what_packnet_can_not_go_on_from_is_one_line(sources, tmp_path, one_device):
    """A run that was trained without it, one that keeps all, one that trains more weights than the run before."""
    plain = run_of("encoder", sources, tmp_path)
    plain = dataclasses.replace(plain, continual=Continual(), name="plain")
    jaxlm.train(plain)
    with pytest.raises(ValueError, match=r"packnet keeps what was trained with it, and .*plain was not"):
        jaxlm.train(next_run(plain, "next", "encoder", **{"continual": KEPT}))
    whole = jaxlm.load(
        plain, name="whole", continual=KEPT, **{"continual.packnet.keep": 1.0, "optim.freeze": ("embed",)}
    )
    jaxlm.train(whole)
    with pytest.raises(ValueError, match=r"whole has no weights left for another task"):
        jaxlm.train(next_run(whole, "next", "encoder"))
    with pytest.raises(ValueError, match=r"optim\.freeze: packnet owns no part of embed, which .*whole didn't train"):
        jaxlm.train(next_run(whole, "next", "encoder", **{"optim.freeze": ()}))
    assert not (tmp_path / "next").exists()


@pytest.mark.slow
def test_an_adapter_is_packed_alone(sources, tmp_path, one_device):
    """Frozen weights have no owner; what a task owns of LoRA's factors later tasks leave as it is."""
    base = run_of("decoder", sources, tmp_path, adapter=Lora(rank=4))
    p = programs.program(base, Bytes())
    held = tree.flatten(p.abstract_state().tracks["packnet"]["pruned"])
    assert (
        held
        and all(path.startswith("adapter/") for path in held)
        and set(held) == set(tree.flatten(importances.like(p)))
    )
    first = jaxlm.train(base)
    second = jaxlm.train(next_run(base, "second", "decoder"))
    known = jaxlm.open(f"{second.path}#first").pretrained
    jax.tree.map(np.testing.assert_array_equal, first.open().pretrained.params, known.params)
    now = second.open().pretrained.params
    assert any(
        (np.asarray(x) != np.asarray(y)).any() for x, y in zip(*map(jax.tree.leaves, (now, known.params)), strict=True)
    )
    assert earlier.earlier_tasks(next_run(base, "third", "decoder"), StartModel(str(second.path)))[-1].packed == 2
