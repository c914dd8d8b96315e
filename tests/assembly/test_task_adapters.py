"""Tasks with adapters of their own over one frozen base, for models of every kind."""

import dataclasses
import functools
import json
import types

import jax
import numpy as np
import pytest
from support.continual_runs import KINDS, MODELS

import jaxlm
from jaxlm import Stage, Stream
from jaxlm.assembly import corpus, earlier, infer_task, open_model
from jaxlm.assembly import program as programs
from jaxlm.assembly.model_source import StartModel
from jaxlm.assembly.task_index import Task
from jaxlm.core import config, tree
from jaxlm.core.continual import Continual
from jaxlm.data.tokenizer import Bytes
from jaxlm.runtime import mesh
from jaxlm.training import stream_report
from jaxlm.weights.adapters import BitFit, Lora, OrthogonalLora, Progressive, Prompt

ADAPTERS = {
    "lora": (Lora(rank=2), Continual(adapters="task")),
    "progressive": (Progressive(reduction=4.0), Continual()),
}
ONE_KIND_QUICKLY = ["encoder", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "encoder")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """Two tasks' data for each kind of model: of the same form, of other letters."""
    folder, out = tmp_path_factory.mktemp("tasks"), {}
    for number, letters in enumerate(("abcdef", "uvwxyz")):
        rng = np.random.default_rng(number)
        words = ["".join(rng.choice(list(letters), 4)) for _ in range(120)]
        text, rows, pairs = (folder / f"{number}{name}" for name in (".txt.jsonl", ".csv", ".pairs.jsonl"))
        text.write_text("".join(json.dumps({"text": " ".join(words[i : i + 40])}) + "\n" for i in range(40)))
        rows.write_text("text,label\n" + "".join(f"{w},{'yes' if letters[0] in w else 'no'}\n" for w in words))
        pairs.write_text("".join(json.dumps({"source": w, "target": w[::-1]}) + "\n" for w in words))
        for kind, file in zip(KINDS, (text, rows, pairs), strict=True):
            out[kind] = (*out.get(kind, ()), str(file))
    return out


def first_run(kind: str, source: str, folder, adapter=None, **changes) -> config.Run:
    model, objective = MODELS[kind]
    return dataclasses.replace(config.Run(
        name="one", out=str(folder), model=model, objective=objective, adapter=adapter or Lora(rank=2),
        data=config.Data((source,), tokenizer="bytes", cache=str(folder / "cache"), tokenize_workers=0, holdout=0.1),
        optim=config.Optim(lr=1e-2, warmup=0, weight_decay=0.0),
        train=config.Train(steps=2, batch_size=8, seq_len=32, prompts=(), eval_every=0, save_every=1),
        continual=Continual(adapters="task"), execution=config.Execution(dtype="float32"),
    ), **changes)  # fmt: skip


@pytest.fixture(scope="module")
def learned(sources, tmp_path_factory):
    """Makes runs that have learned the first task, once of each kind and adapter."""

    @functools.cache
    def make(kind: str = "encoder", adapter: str = "lora"):
        with mesh.on_devices(jax.devices()[:1]):
            c, keeping = ADAPTERS[adapter]
            folder = tmp_path_factory.mktemp(kind)
            return jaxlm.train(first_run(kind, sources[kind][0], folder, c, continual=keeping))

    return make


def second_run(first, source: str, folder, name: str = "two", **changes) -> config.Run:
    return jaxlm.load(first.path, name=name, out=str(folder), **{"data.train": (source,)}, **changes)


@pytest.mark.parametrize("kind", ONE_KIND_QUICKLY)
def test_a_task_is_used_with_its_own_adapter(kind, learned, sources, tmp_path, one_device):
    """After the second task, stopped in its middle, the first gives bit for bit what it gave; only the new adapter and
    head are trained, and nothing else has an optimizer's state."""
    first = learned(kind)
    run = second_run(first, sources[kind][1], tmp_path)

    def stop(step: int, metrics: dict) -> None:
        if step == 1:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        jaxlm.train(run, on_step=stop)
    second = jaxlm.train(second_run(first, sources[kind][1], tmp_path))
    whole = jaxlm.train(second_run(first, sources[kind][1], tmp_path, "whole"))
    a, b, c = (jax.device_get(one.open().pretrained.params) for one in (first, second, whole))
    jax.tree.map(np.testing.assert_array_equal, b, c)
    jax.tree.map(np.testing.assert_array_equal, a["adapter"], b["tasks"]["one"]["adapter"])
    assert any(np.abs(x).max() > 0 for path, x in tree.flatten(b["adapter"]).items() if path.endswith("/b"))

    before, after, own = (jaxlm.evaluate(place) for place in (first.path, f"{second.path}#one", second.path))
    assert before == after and own != after
    p = programs.program(second.config, Bytes(), None, earlier.earlier_tasks(second.config, StartModel("")))
    trained = set(tree.flatten(p.abstract_state().params))
    assert trained and all(path.startswith(("adapter/", *p.objective.specs(16))) for path in trained)
    assert "tasks/one/adapter" in " ".join(tree.flatten(p.abstract_state().frozen))
    assert p.notes["continual"] == "one: kept whole, with heads and adapters of their own"
    for place, message in (
        ("#onee", r"no task 'onee'; did you mean 'one'\?; give one of one, two"),
        ("#", "no task ''"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxlm.open(f"{second.path}{place}")
    with pytest.raises(ValueError, match="#one: is one task of a run; give the run itself"):
        jaxlm.load(first_run(kind, sources[kind][0], tmp_path), start=f"{second.path}#one")
    if kind == "encoder":
        jaxlm.open(f"{second.path}#one").save(tmp_path / "written")
        texts = ["abcd", "uvwx"]
        told = [jaxlm.open(place).predict(texts) for place in (f"{second.path}#one", tmp_path / "written", first.path)]
        for mine, theirs, once in zip(*told, strict=True):
            assert mine == once
            assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-4)


@pytest.mark.parametrize("kind", ONE_KIND_QUICKLY)
@pytest.mark.parametrize("adapter", ["lora", pytest.param("progressive", marks=pytest.mark.slow)])
def test_an_update_is_the_same_on_one_device_and_on_eight(kind, adapter, learned, sources, tmp_path):
    """With an earlier task beside it: every weight of the new adapter has a gradient by the second update, and the
    earlier task stays bit for bit."""
    found, first = [], learned(kind, adapter)
    for name, on, devices in (("eight", config.Mesh(fsdp=4, tensor=2), 8), ("alone", config.Mesh(), 1)):
        with mesh.on_devices(jax.devices()[:devices]):
            run = second_run(first, sources[kind][1], tmp_path, name, mesh=on)
            start = StartModel(run.start)
            p = programs.program(run, Bytes(), None, earlier.earlier_tasks(run, start))
            with mesh.on_mesh(p.mesh):
                state = p.init_from(open_model.first_params(p, start))
                begun, old = jax.device_get((state.params, state.frozen))
                data = corpus.corpus(run.data, p.objective, ("train",))
                loader, step = corpus.training_loader(run, p.objective, data, None), p.train_step()
                for i in range(2):
                    state, metrics = step(state, p.to_device(loader.batch(i), None))
                jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.frozen), old)
            found.append((begun, jax.device_get(state.params), jax.device_get(metrics)))
    (begun, eight, a), (_, one, b) = found
    assert any("/previous_down" in path or path.startswith("tasks/one/adapter") for path in tree.flatten(old))
    for path, x in tree.flatten(eight).items():
        assert np.abs(x - tree.at(begun, path)).max() > 0, path
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), eight, one)


def test_columns_of_three_tasks(learned, sources, tmp_path, one_device):
    """Each is used with its own and those before; the last, with the penalty of nothing, reads two."""
    first = learned("encoder", "progressive")
    second = jaxlm.train(second_run(first, sources["encoder"][1], tmp_path))
    third = jaxlm.train(second_run(second, sources["encoder"][0], tmp_path, "three"))
    assert third.config.adapter.previous == 2
    for run in (first, second):
        alone, then = jaxlm.open(f"{third.path}#{run.config.name}").pretrained, run.open().pretrained
        assert alone.source.adapter == run.config.adapter
        own = {name: w for name, w in then.params.items() if name != "tasks"}
        jax.tree.map(np.testing.assert_array_equal, alone.params, own)
    assert jaxlm.evaluate(f"{third.path}#two") == jaxlm.evaluate(second.path)
    assert set(infer_task.read(third.path)) == {"one", "two", "three"}
    with pytest.raises(ValueError, match=r"continual\.methods: progressive gives each task a column of its own"):
        jaxlm.train(second_run(second, sources["encoder"][0], tmp_path, "four", **{"continual.methods": ("replay",)}))
    with pytest.raises(ValueError, match=r"adapter\.reduction: 2, and the columns before have 4"):
        second_run(second, sources["encoder"][0], tmp_path, "four", **{"adapter.reduction": 2.0})


def test_tasks_of_a_stream_are_scored_with_their_own_adapters(sources, tmp_path, one_device):
    """Both have the same labels, and heads of their own all the same; the stream starts from the base alone."""
    base = first_run("encoder", sources["encoder"][0], tmp_path, config.Adapter(), continual=Continual(), name="base")
    base = jaxlm.train(base)
    run = first_run("encoder", sources["encoder"][0], tmp_path, name="stream", start=str(base.path))
    stages = tuple(Stage(f"t{i}", {"data.train": (source,)}, "loss") for i, source in enumerate(sources["encoder"]))
    results = jaxlm.train_stream(Stream(run, stages))
    matrix = np.array(results["matrices"][0], float)
    assert matrix[1, 0] == matrix[2, 0] and not np.isnan(matrix[2, 1])
    last = tmp_path / "stream" / "seed-0" / "2-t1"
    assert jaxlm.evaluate(base.path) == jaxlm.evaluate(f"{last}#base") and "adapter" in jaxlm.open(last).params
    assert set(jaxlm.open(last).params["tasks"]) == {"base", "1-t0"}
    [(first, both)] = results["inferred"]
    assert first == [1.0, None] and min(both) > 0.8, "the two have no letter in common"
    written, page = stream_report.build(tmp_path / "stream")
    assert f"{both[1]:.4f}" in page.read_text() and "task right" in stream_report.table(written)


LORA = Lora(rank=2)


@pytest.mark.parametrize(
    ("adapter", "continual", "message"),
    [
        (config.Adapter(), Continual(adapters="task"), r"continual\.adapters: task needs an adapter .*`adapter` none"),
        (BitFit(), Continual(adapters="task"), r"continual\.adapters: .*`adapter` bitfit"),
        (OrthogonalLora(rank=2), Continual(adapters="task"), "orthogonal_lora grows from task to task by itself"),
        (LORA, Continual(("replay",), adapters="task"), r"continual\.methods: each task has an adapter"),
        (LORA, Continual(old=("x",), adapters="task"), r"continual\.old: each task keeps an adapter"),
    ],
)
def test_what_tasks_can_not_have_of_their_own_is_one_line(adapter, continual, message, sources, tmp_path, one_device):
    run = first_run("encoder", sources["encoder"][0], tmp_path, adapter, continual=continual)
    with pytest.raises(ValueError, match=message) as raised:
        jaxlm.train(run)
    assert "\n" not in str(raised.value) and not run.folder.exists()


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Lora(rank=4), "start: .* has an adapter of other settings"),
        (Lora(rank=2, targets=("all",)), "start: .* has adapters of other settings"),
        (Lora(rank=2, base="nf4"), "start: .* has adapters of other settings"),
    ],
)
def test_adapters_of_one_model_are_of_one_kind(adapter, message, learned, sources, tmp_path, one_device):
    run = dataclasses.replace(second_run(learned(), sources["encoder"][1], tmp_path), adapter=adapter)
    with pytest.raises(ValueError, match=message) as raised:
        jaxlm.train(run)
    assert "\n" not in str(raised.value) and not run.folder.exists()


def test_what_tasks_start_from_is_known(learned, sources, tmp_path, one_device):
    run = second_run(learned(), sources["encoder"][1], tmp_path)
    with pytest.raises(ValueError, match="a loop of one's own keeps no adapters or columns of earlier tasks"):
        jaxlm.Program(run)
    published = types.SimpleNamespace(source=types.SimpleNamespace(run=None, adapter=Lora(), templates={}))
    with pytest.raises(ValueError, match=r"start: x has an adapter of a task that has no name here; merge it first"):
        earlier.earlier_tasks(dataclasses.replace(run, start="x"), published)
    # What an index of before there were adapters for each task says is still read.
    old = Task("one", run.objective, 32).to_dict()
    kept = {name: old[name] for name in ("name", "objective", "seq_len", "template", "data", "own_head")}
    assert Task.from_dict(json.loads(json.dumps(kept))) == Task("one", run.objective, 32)


def test_virtual_tokens_need_to_be_there_from_the_first_task_on(sources, tmp_path, one_device):
    base = first_run("encoder", sources["encoder"][0], tmp_path, config.Adapter(), continual=Continual(), name="base")
    base = jaxlm.train(base)
    changes = {"adapter": Prompt(tokens=2), "continual": Continual(adapters="task")}
    with pytest.raises(ValueError, match=r"continual\.adapters: base was learned without virtual tokens, which prompt"):
        jaxlm.train(second_run(base, sources["encoder"][1], tmp_path, **changes))
