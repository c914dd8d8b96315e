"""What a run keeps of earlier tasks, for models of every kind, on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.continual_runs import KINDS, MODELS, ONE_KIND_QUICKLY, Stopped, begun, make, write_sources

import jaxlm
from jaxlm.assembly import earlier, importances, remember
from jaxlm.assembly import program as programs
from jaxlm.assembly.model_source import StartModel
from jaxlm.core import config, tree
from jaxlm.core.continual import MAS, Continual, Der, Ewc, Replay
from jaxlm.data import replay
from jaxlm.data.tokenizer import Bytes
from jaxlm.objectives import classify
from jaxlm.runtime import mesh
from jaxlm.training.continual import projection


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    return write_sources(tmp_path_factory.mktemp("old"))


def rows_of(p, name: str, count: int) -> list[dict]:
    """The rows that importances of a method are estimated on, one by one."""
    records = remember._records_of_last(p, None)
    chosen = replay.Chosen.first(records, p.run.seed, f"before:{name}", count)
    return [{k: jnp.asarray(v)[None] for k, v in p.objective.example(chosen[i], None).items()} for i in range(count)]


@pytest.mark.parametrize("kind", ONE_KIND_QUICKLY)
def test_the_fisher_information_is_that_of_single_rows_on_every_device(kind, sources, tmp_path):
    """On eight devices, in batches: as by hand, a row at a time on one."""
    p, state = begun(make(kind, sources[kind], tmp_path, ("ewc",), ewc=Ewc(examples=6)))
    assert p.mesh is not None and p.mesh.size == 8 and p.notes["continual"] == "ewc for before"
    found, params = jax.device_get((state.memory["ewc"]["importance"], state.params))
    with mesh.on_devices(jax.devices()[:1]):
        alone, _ = begun(make(kind, sources[kind], tmp_path / "alone", ("ewc",), ewc=Ewc(examples=1)))

        def loss(params, row):
            return sum(v["loss"] for v in alone.objective.loss(alone.model, params, row, None).values())

        squares = jax.jit(lambda params, row: jax.tree.map(jnp.square, jax.grad(loss)(params, row)))
        each = [squares(params, row) for row in rows_of(p, "ewc", 6)]
    by_hand = jax.tree.map(lambda *g: sum(g) / 6, *each)
    assert max(float(x.max()) for x in jax.tree.leaves(by_hand)) > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6 * float(b.max()) + 1e-9), found, by_hand
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.memory["ewc"]["anchor"]), params)


@pytest.mark.parametrize("kind", KINDS)
def test_stored_logits_are_those_of_the_model(kind, sources, tmp_path, one_device):
    settings = dict(replay=Replay(examples=8, share=0.5), der=Der(top=4))
    p, state = begun(make(kind, sources[kind], tmp_path, ("der",), **settings))
    batch = p.to_device({**remember.replayed(p, None)(0)}, None)
    part = jax.tree.map(lambda x: x[0], batch)
    sums = jax.jit(lambda weights, batch: p.loss(weights, batch, jax.random.key(0)))(state.all_params, part)
    [values] = sums.values()
    assert float(values["der"]) == pytest.approx(0, abs=1e-8), "the model hasn't changed yet"
    changed = tree.map_named(lambda path, w: w * 1.1, state.all_params)
    [values] = p.loss(changed, part, None).values()
    assert float(values["der"]) > 1e-6


EVERYTHING = ("l2", "ewc", "mas", "lwf", "features", "replay", "der")


@pytest.mark.parametrize("kind", ONE_KIND_QUICKLY)
def test_an_update_is_the_same_on_one_device_and_on_eight(kind, sources, tmp_path):
    """With everything that is kept at once; at the start penalties and distillation pull nowhere."""
    found = []
    settings = dict(replay=Replay(examples=8, share=0.5), ewc=Ewc(examples=4, strength=1.0))
    for name, on, devices in (("one", config.Mesh(), 1), ("eight", config.Mesh(fsdp=4, tensor=2), 8)):
        with mesh.on_devices(jax.devices()[:devices]):
            p, state = begun(make(kind, sources[kind], tmp_path / name, EVERYTHING, on, **settings))
            replayed = remember.replayed(p, None)
            own = {k: v[None, :8] for k, v in rows_as_batch(p).items()}
            with mesh.on_mesh(p.mesh):
                first = jax.device_get(state.params)
                step = p.train_step()
                metrics = []
                for i in range(2):
                    state, m = step(state, p.to_device(own | replayed(i), None))
                    metrics.append(jax.device_get(m))
            found.append((first, jax.device_get(state.params), metrics))
    (_, one, a), (_, eight, b) = found
    assert float(a[0]["penalty"]) == 0 and float(a[1]["penalty"]) > 0
    for name in a[1]:
        np.testing.assert_allclose(b[1][name], a[1][name], rtol=2e-3, atol=1e-5, err_msg=name)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, rtol=2e-3, atol=2e-5), one, eight)


@pytest.mark.parametrize("method", ["agem", "gem"])
def test_a_step_takes_earlier_rows_as_a_bound(method, sources, tmp_path, one_device):
    """The update is the projected gradient of the new rows, and the loss that is told is theirs alone."""
    p, state = begun(make("encoder", sources["encoder"], tmp_path, (method,), replay=Replay(examples=8, share=0.5)))
    rows, replayed = rows_as_batch(p), remember.replayed(p, None)(0)
    rows["target"] = rows["target"][:, ::-1]  # wrong labels, so that the two gradients are opposed
    batch = p.to_device({k: v[None] for k, v in rows.items()} | replayed, None)
    own, parts = replay.parted(jax.tree.map(lambda x: x[0], batch))

    def mean(params, batch):
        [sums], [total] = p.objective.loss(p.model, params, batch, None).values(), p.objective.totals(batch).values()
        return sums["loss"] / total

    g, r = (jax.grad(mean)(state.params, part) for part in (own, parts[0]))
    assert float(projection.dot(g, r)) < 0
    wanted = jax.tree.map(lambda w, x: w - 0.1 * x, state.params, projection.agem(g, r))
    told = float(mean(state.params, own))
    new, metrics = p.train_step()(state, batch)
    assert float(metrics["loss"]) == pytest.approx(told, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), new.params, wanted)


def rows_as_batch(p) -> dict:
    rows = rows_of(p, "new", 8)
    return {name: np.concatenate([np.asarray(row[name]) for row in rows]) for name in rows[0]}


def test_frozen_weights_cost_nothing(sources, tmp_path, one_device):
    run = make("encoder", sources["encoder"], tmp_path, ("ewc", "si"), ewc=Ewc(examples=2))
    run = dataclasses.replace(
        run, optim=dataclasses.replace(run.optim, freeze=("embed", "blocks")), continual=run.continual
    )
    p = programs.program(run, Bytes(), None, earlier.earlier_tasks(run, StartModel("")))
    held = tree.flatten(importances.like(p))
    tracks = tree.flatten(p.abstract_state().tracks["si"]["path"])
    assert held and not any("blocks" in path or "embed" in path.split("/")[0] for path in held)
    assert set(tracks) == set(held)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (("ewk",), r"continual\.methods: unknown 'ewk'; did you mean 'ewc'"),
        (("ewc", "ewc"), "names a method twice"),
        (("agem", "gem"), "choose one"),
        (("agem", "replay"), "as a bound"),
        (("si",), "needs the path of the training before"),
    ],
)
def test_what_can_not_be_kept_is_one_line(methods, message, sources, tmp_path, one_device):
    with pytest.raises(ValueError, match=message):
        begun(make("encoder", sources["encoder"], tmp_path, methods))
    assert not (tmp_path / "encoder" / "memory").exists()


def test_lwf_compares_what_earlier_tasks_predicted_once(sources, tmp_path, one_device):
    """Two earlier texts share the vocabulary's head, which is compared once; a task of another kind can't be
    compared."""
    run = make("decoder", sources["decoder"], tmp_path, ("lwf",))
    task = earlier.earlier_tasks(run, StartModel(""))[0]
    found = []
    for tasks in ((task,), (task, dataclasses.replace(task, name="more"))):
        p = programs.program(run, Bytes(), None, tasks)
        weights = p.init().all_params
        old = jax.tree.map(lambda w: 0.9 * w, weights)
        batch = {k: jnp.asarray(v)[None] for k, v in p.objective.full_example().items()}
        found.append(float(p.earlier.kept(p.model, weights, old, batch, p.objective)["lwf"]))
    assert found[0] > 0 and found[0] == found[1]
    unlike = dataclasses.replace(task, objective=classify.Config(labels=("a", "b")), own_head=True)
    with pytest.raises(ValueError, match=r"continual\.methods: lwf compares predictions of causal, and no earlier"):
        programs.program(run, Bytes(), None, (unlike,))


def test_rows_that_leave_no_new_ones_are_refused(sources, tmp_path, one_device):
    run = make("encoder", sources["encoder"], tmp_path, ("replay",), replay=Replay(share=1.0))
    with pytest.raises(ValueError, match=r"continual\.replay\.share: 16 of train\.batch_size 16"):
        begun(run)


def test_a_memory_larger_than_the_machine_is_refused_before_training(sources, tmp_path, one_device, monkeypatch):
    monkeypatch.setattr(remember.os, "sysconf", lambda name: 1)
    with pytest.raises(ValueError, match=r"continual\.replay\.examples: .* of memory are free"):
        begun(make("encoder", sources["encoder"], tmp_path, ("replay",)))


def test_a_run_that_keeps_goes_on_as_if_it_had_not_stopped(sources, tmp_path, one_device):
    """Two tasks with heads of their own; the second is stopped in its middle and goes on."""
    other = tmp_path / "other.csv"
    other.write_text(
        "text,label\n" + "".join(f"{'xy' * (1 + i % 2)} {i},{'short' if i % 2 else 'long'}\n" for i in range(80))
    )
    base = dataclasses.replace(
        make("encoder", sources["encoder"], tmp_path), continual=Continual(("si",)), name="first"
    )
    base = dataclasses.replace(base, train=dataclasses.replace(base.train, save_every=2))
    first = jaxlm.train(base)

    def second(name: str) -> config.Run:
        changes = {"data.train": (str(other),), "objective": classify.Config(labels=("long", "short"), dropout=0.0)}
        methods = Continual(("si", "ewc", "replay", "lwf"), replay=Replay(examples=8), ewc=Ewc(examples=4))
        return jaxlm.load(base, start=str(first.path), name=name, continual=methods, **changes)

    whole = jaxlm.train(second("whole"))

    def stop(step: int, metrics: dict) -> None:
        if step == 3:
            raise Stopped

    with pytest.raises(Stopped):
        jaxlm.train(second("parts"), on_step=stop)
    parts = jaxlm.train(second("parts"))
    figures = [[line["loss"] for line in run.log if line["kind"] == "train"] for run in (whole, parts)]
    assert figures[0] and figures[0] == figures[1]
    moved = [[line.get("kl_before") for line in run.log if line["kind"] == "valid"] for run in (whole, parts)]
    assert moved[0] == moved[1] and abs(moved[0][0]) < 1e-6 < moved[0][1], "of the earlier head, on the new texts"
    assert "KL from the model before" in (whole.path / "report.html").read_text()
    assert "kl_before" not in first.log[-1] and not (first.path / "before.npz").exists()
    a, b = (jax.device_get(run.open().pretrained.params) for run in (whole, parts))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert set(a["tasks"]) == {"first"} and set(a["tasks"]["first"]) == {"classify", "classify_bias"}
    (whole.path / "memory").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="is gone"):
        jaxlm.train(dataclasses.replace(second("whole"), train=dataclasses.replace(base.train, steps=6)))


@pytest.mark.parametrize(
    ("kind", "name", "rounds"),
    [("decoder", "ewc", 1), *(pytest.param(*row, marks=pytest.mark.slow) for row in
                              (("decoder", "mas", 2), ("encoder", "ewc", 1), ("encoder_decoder", "mas", 1)))],
)  # fmt: skip
def test_importances_on_stages_are_those_of_one_device(kind, name, rounds, sources, tmp_path):
    """The weights rest on their stages, and every row is computed by all of them."""
    model = dataclasses.replace(MODELS[kind][0], layers=4 if rounds == 2 else 2)
    found = []
    for place, on, devices in (("one", config.Mesh(), 1), ("stages", config.Mesh(stage=2, fsdp=4, rounds=rounds), 8)):
        with mesh.on_devices(jax.devices()[:devices]):
            settings = {"ewc": Ewc(examples=4), "mas": MAS(examples=4)}
            run = dataclasses.replace(make(kind, sources[kind], tmp_path / place, (name,), on, **settings), model=model)
            _, state = begun(run)
            found.append(jax.device_get(state.memory[name]["importance"]))
    one, stages = found
    assert max(float(x.max()) for x in jax.tree.leaves(one)) > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6 * float(b.max()) + 1e-9), stages, one
    )
