"""A run that learns from a teacher: the same update however its batch is cut, the same run after a stop, and a line for
what doesn't fit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from support.continual_runs import Stopped, make, write_sources
from support.tiny_models import published

import jaxlm
from jaxlm.assembly import corpus, earlier, on_policy, remember, teacher, teacher_cache
from jaxlm.assembly import program as programs
from jaxlm.assembly.model_source import StartModel
from jaxlm.core import config
from jaxlm.core.distillation import Distill, Hidden, Logits, OnPolicy, Relations
from jaxlm.data.teacher_logits import Store, WithTeacher
from jaxlm.data.tokenizer import Bytes
from jaxlm.objectives import classify, preference
from jaxlm.runtime import mesh
from jaxlm.weights.adapters.lora import Lora

EVERYTHING = ("logits", "hidden", "relations")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    return write_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> str:
    """A decoder of two layers, wider than the student, with another padding of its vocabulary."""
    return str(published(tmp_path_factory.mktemp("hf") / "larger", "llama", layers=2, width=24, kv_heads=2, ffn=40))


def run_of(kind: str, sources, folder, distill: Distill, **train) -> config.Run:
    run = make(kind, sources[kind], folder)
    return dataclasses.replace(run, continual=config.Continual(), distill=distill,
                               train=dataclasses.replace(run.train, **train))  # fmt: skip


def begun(run: config.Run):
    """Returns the program of a run, with its state and its teacher."""
    p = programs.program(run, Bytes(), None, (), teacher.source(run))
    with mesh.on_mesh(p.mesh):
        return p, teacher.attached(p, p.init(), begins=None)


def batch_of(p: programs.Program, run: config.Run) -> dict:
    data = corpus.corpus(run.data, p.objective)
    return corpus.training_loader(run, p.objective, data, None).batch(0)


def updated(run: config.Run) -> tuple[dict, dict]:
    """Returns the metrics of the first update, and the weights after it."""
    p, state = begun(run)
    with mesh.on_mesh(p.mesh):
        state, metrics = p.train_step()(state, p.to_device(batch_of(p, run), None))
        return jax.device_get((metrics, state.params))


def test_an_update_is_the_same_in_parts_and_on_eight_devices(sources, tmp_path, larger):
    """With every loss, learned maps between widths, and rows of several documents."""
    c = Distill(larger, EVERYTHING, labels=0.5, relations=Relations(heads=2), logits=Logits(divergence="jsd"))
    with mesh.on_devices(jax.devices()[:1]):
        whole = updated(run_of("decoder", sources, tmp_path, c))
        parts = updated(run_of("decoder", sources, tmp_path, c, micro_batches=4))
    on = config.Mesh(data=2, fsdp=2, tensor=2)
    spread = updated(dataclasses.replace(run_of("decoder", sources, tmp_path, c), mesh=on))
    assert {"teacher/hidden", "teacher/relations", "tokens/distill"} <= whole[0].keys()
    assert whole[1]["distill"]["0"].shape == (16, 24)
    for metrics, weights in (parts, spread):
        for name in ("loss", "teacher/hidden", "teacher/relations", "tokens/distill", "grad_norm"):
            np.testing.assert_allclose(metrics[name], whole[0][name], rtol=2e-4, err_msg=name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), weights, whole[1])


def test_texts_that_share_a_row_lose_what_they_lose_alone(sources, tmp_path, larger, one_device):
    """Every loss of a row of two documents is that of the two in rows of their own, with padding behind them."""
    p, state = begun(run_of("decoder", sources, tmp_path, Distill(larger, EVERYTHING, relations=Relations(heads=2))))
    rng, lengths = np.random.default_rng(0), (11, 21)
    texts = [rng.integers(4, 250, n + 1) for n in lengths]
    alone = {name: np.zeros((2, 32), np.int32) for name in ("tokens", "targets", "segments", "positions")}
    for i, (text, n) in enumerate(zip(texts, lengths, strict=True)):
        for name, leaf in (("tokens", text[:-1]), ("targets", text[1:]), ("segments", 1), ("positions", np.arange(n))):
            alone[name][i, :n] = leaf
    alone["weights"] = (alone["segments"] > 0).astype(np.float32)
    packed = {name: np.concatenate([x[i, :n] for i, n in enumerate(lengths)])[None] for name, x in alone.items()}
    packed["segments"] = np.repeat([1, 2], lengths)[None].astype(np.int32)
    loss = jax.jit(lambda weights, batch, memory: p.loss(weights, batch, jax.random.key(0), memory))
    found = [loss(state.all_params, batch, state.memory) for batch in (alone, packed)]
    assert set(found[0]) == {"tokens", "teacher"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), *found)
    for batch in (alone, packed):
        assert p.totals(batch)["teacher"] == sum(lengths)


def test_a_student_that_starts_as_its_teacher_learns_nothing_from_it(sources, tmp_path, one_device):
    place = str(published(tmp_path / "same", "llama", vocab=384))
    c = Distill(place, EVERYTHING, labels=0.0)
    run = jaxlm.load(run_of("decoder", sources, tmp_path, c), start=place)
    p = programs.program(run, Bytes(), None, (), teacher.source(run))
    weights = teacher.read(p)
    state = teacher.attached(p, p.init_from(jax.tree.map(np.asarray, weights)), begins=None)
    _, metrics = p.train_step()(state, p.to_device(batch_of(p, run), None))
    assert abs(metrics["loss"]) < 1e-5 and metrics["grad_norm"] < 1e-5 and metrics["tokens/nll"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("base", ["bfloat16", "int8"])
def test_a_teacher_rests_in_its_own_precision(sources, tmp_path, base, larger, one_device):
    p, state = begun(run_of("decoder", sources, tmp_path, Distill(larger, base=base, dtype="bfloat16")))
    q, whole = begun(run_of("decoder", sources, tmp_path, Distill(larger)))
    kinds = {x.dtype.name for x in jax.tree.leaves(state.memory["distill"]["blocks"]["q"])}
    assert kinds == ({"int8", "float32"} if base == "int8" else {"bfloat16"})
    assert jax.tree.map(lambda x: (x.shape, x.dtype), p.teacher.memory_like(None)["distill"]) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state.memory["distill"]
    )
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}
    batch = {name: x[0] for name, x in batch_of(p, p.run).items()}
    found = [
        jax.jit(lambda weights, t=r.teacher: t.model.forward(weights, batch).x_BTD.astype(np.float32))(
            s.memory["distill"]
        )
        for r, s in ((p, state), (q, whole))
    ]
    apart = float(np.abs(found[0] - found[1]).mean() / np.abs(found[1]).mean())
    assert 0 < apart < 0.1


def classifier(folder, sources, labels: tuple[str, ...]) -> str:
    """Returns the run directory of a classifier with these labels, untrained."""
    run = run_of("encoder", sources, folder, Distill())
    run = dataclasses.replace(run, name="-".join(labels), seed=3, objective=classify.Config(labels=labels, dropout=0.0))
    own = jaxlm.Program(run)
    return str(own.save(own.init()).path)


def test_logits_on_disk_teach_as_the_teacher_does(sources, tmp_path, one_device):
    """All classes of a classifier, whose teacher has them in another order: the loss of every row is that of the
    teacher beside it; a store that was cut off in the middle is filled up, and one of another teacher is refused."""
    place = classifier(tmp_path, sources, ("yes", "no"))
    run = run_of("encoder", sources, tmp_path, Distill(place))
    stored = dataclasses.replace(run, name="stored", distill=Distill(place, cache=str(tmp_path / "logits")))
    p, state = begun(run)
    q, empty = begun(stored)
    assert empty.memory is None
    data = corpus.corpus(run.data, p.objective)
    q.run.folder.mkdir()
    example = teacher_cache.example(q, data, begins=True)
    loader = corpus.training_loader(run, p.objective, data, None, None, example)
    batch = q.to_device(loader.batch(1), None)
    assert (
        batch["tokens"].shape == p.to_device(batch_of(p, run), None)["tokens"].shape
    )  # texts share rows in the same way
    rows = {name: x[0] for name, x in batch.items()}
    bare = {name: x for name, x in rows.items() if not name.startswith("teacher_")}
    known, plain = (
        jax.jit(lambda w, b, m, r=r: r.loss(w, b, jax.random.key(0), m))(state.all_params, b, m)
        for r, b, m in ((q, rows, None), (p, bare, state.memory))
    )
    assert known["texts"]["distill"] > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-7 * 16), known, plain)

    files = {file: file.read_bytes() for file in (tmp_path / "logits").glob("*.bin")}
    for i, (file, content) in enumerate(files.items()):
        file.write_bytes(content[: -3 - i])
    teacher_cache.example(q, data, begins=False)
    assert {file: sorted(file.read_bytes()) for file in files} == {f: sorted(content) for f, content in files.items()}

    other = classifier(tmp_path, sources, ("no", "yes"))
    wrong, _ = begun(dataclasses.replace(stored, distill=dataclasses.replace(stored.distill, teacher=other)))
    with pytest.raises(ValueError, match=r"distill\.cache: .*another (objective|teacher)"):
        teacher_cache.example(wrong, data, begins=True)


def test_a_row_that_is_not_stored_is_refused(tmp_path):
    store = Store.opened(tmp_path / "s", dict(teacher="a", places=1, kept=2))
    with pytest.raises(ValueError, match=r"lacks a row of the data"):
        WithTeacher(lambda record, rng: {"x": np.zeros(3)}, store)(None, None)
    with pytest.raises(ValueError, match=r"another kept \(2, and the run's is 3\)"):
        Store.opened(tmp_path / "s", dict(teacher="a", places=1, kept=3))


@pytest.mark.parametrize("share", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_student_goes_on_after_a_stop(share, sources, tmp_path, larger, one_device):
    """A run that is stopped in the middle is bit for bit the uninterrupted one, also where the student writes a share
    of the updates, whose labels aren't learned; a teacher with other weights is refused."""
    c = Distill(larger, on_policy=OnPolicy(share=share, tokens=4))
    run = run_of("decoder", sources, tmp_path, c, steps=4, save_every=2, log_every=1)
    assert [on_policy.drawn(run.seed, step, share) for step in range(4)].count(True) in ((1, 2, 3) if share else (0,))
    whole = jaxlm.train(dataclasses.replace(run, name="whole"))

    def stop(step: int, metrics: dict) -> None:
        if step == 3:
            raise Stopped

    stopped = dataclasses.replace(run, name="stopped")
    with pytest.raises(Stopped):
        jaxlm.train(stopped, on_step=stop)
    found = jaxlm.train(stopped)
    lines = [[json.loads(line) for line in (r.path / "metrics.jsonl").read_text().splitlines()] for r in (whole, found)]
    for a, b in zip(*([x for x in part if x["kind"] in ("train", "valid")] for part in lines), strict=True):
        assert {k: v for k, v in a.items() if k != "time"} == {k: v for k, v in b.items() if k != "time"}
    for line in (x for x in lines[0] if x["kind"] == "train"):
        written = on_policy.drawn(run.seed, line["step"] - 1, share)
        wanted = line["distill"] + (0 if written else line["nll"])
        np.testing.assert_allclose(line["loss"], wanted, rtol=1e-5)
    record = tmp_path / "stopped" / teacher.RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"fingerprint": "0"}))
    with pytest.raises(ValueError, match=r"distill\.teacher: .* has other weights than when"):
        jaxlm.train(dataclasses.replace(stopped, train=dataclasses.replace(stopped.train, steps=6)))


def test_a_student_has_layers_of_the_model_it_starts_from(sources, tmp_path, larger, one_device):
    run = jaxlm.load(run_of("decoder", sources, tmp_path, Distill()), start=larger, start_layers=(1,))
    assert run.model.layers == 1 and run.model.width == 24
    whole = dataclasses.replace(run, model=dataclasses.replace(run.model, layers=2), start_layers=())
    mine, theirs = (jax.device_get(jaxlm.Program(r).init().params) for r in (run, whole))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[1]), mine["blocks"], theirs["blocks"])
    np.testing.assert_array_equal(mine["embed"], theirs["embed"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder_decoder"])
def test_a_teacher_goes_with_adapters_and_what_keeps_earlier_tasks(kind, sources, tmp_path, one_device):
    """One update of each kind of model, with LoRA, and with replay and LwF: all losses are there and finite."""
    base = run_of(kind, sources, tmp_path, Distill())
    own = jaxlm.Program(dataclasses.replace(base, name="teacher", seed=3))
    c = Distill(str(own.save(own.init()).path))
    lora = dataclasses.replace(base, adapter=Lora(rank=2), distill=c)
    metrics, _ = updated(lora)
    assert metrics["distill"] >= 0 and np.isfinite(metrics["loss"])
    kept = dataclasses.replace(make(kind, sources[kind], tmp_path, ("replay", "lwf")), distill=c)
    kept.folder.mkdir(parents=True)
    p = programs.program(kept, Bytes(), None, earlier.earlier_tasks(kept, StartModel("")), teacher.source(kept))
    state = remember.remember(p, p.init(), StartModel(""), begins=True)
    state = teacher.attached(p, state, begins=True)
    rows = remember.replayed(p, None)
    loader = corpus.training_loader(kept, p.objective, corpus.corpus(kept.data, p.objective), None, rows)
    _, metrics = p.train_step()(state, p.to_device(loader.batch(0), None))
    names = {name.rpartition("/")[2] for name in metrics}
    assert {"distill", "lwf"} <= names and any(name.startswith("replay0") for name in metrics)
    assert all(np.isfinite(x) for x in metrics.values())


class Shifted(Bytes):
    """Bytes with another token at one place."""

    @property
    def token_bytes(self) -> list[bytes]:
        return [b"other" if i == 70 else text for i, text in enumerate(Bytes().token_bytes)]


REFUSED = {
    "no teacher there": (dict(teacher="nowhere"), "distill.teacher: nowhere: no such model"),
    "another kind": (dict(teacher="encoder"), "of kind encoder and the run's model of kind decoder"),
    "no such loss twice": (dict(losses=("logits", "logits")), "distill.losses: .* none twice"),
    "no loss": (dict(losses=()), "distill.losses: .* at least one"),
    "layer map": (dict(losses=("hidden",), hidden=Hidden(layers=("0-1",))), "'0-1' is not STUDENT=TEACHER"),
    "no such layer": (dict(losses=("hidden",), hidden=Hidden(layers=("0=2",))), "the teacher has layers 0 to 1"),
    "no such relation layer": (dict(losses=("relations",), relations=Relations(layer=1)), "1 is no layer of 1"),
    "relation heads": (
        dict(losses=("relations",), relations=Relations(heads=5)),
        "5 do not divide the 16 numbers of q",
    ),
    "states in a cache": (dict(losses=("hidden",), cache="x"), "distill.cache: holds logits"),
    "own texts in a cache": (dict(on_policy=OnPolicy(share=0.5), cache="x"), "yet to be written"),
    "own texts without logits": (dict(losses=("hidden",), on_policy=OnPolicy(share=0.5)), "teach nothing without"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(name, sources, tmp_path, larger, one_device):
    fields, told = REFUSED[name]
    if fields.get("teacher") == "encoder":
        fields = {"teacher": str(published(tmp_path / "encoder", "bert"))}
    run = run_of("decoder", sources, tmp_path, Distill(**{"teacher": larger, **fields}))
    with pytest.raises(ValueError, match=told) as caught:
        programs.program(run, Bytes(), None, (), teacher.source(run))
    assert "\n" not in str(caught.value)


def test_unlike_tokenizers_heads_and_objectives_are_refused(sources, tmp_path, larger, one_device):
    run = run_of("decoder", sources, tmp_path, Distill(larger))
    with pytest.raises(ValueError, match=r"distill\.teacher: token 70 is .* need one tokenizer"):
        programs.program(run, Shifted(), None, (), teacher.source(run))
    source = dataclasses.replace(teacher.source(run), tokens=None)
    with pytest.raises(ValueError, match=r"has no tokenizer"):
        programs.program(run, Bytes(), None, (), source)
    encoder = str(published(tmp_path / "encoder", "bert"))
    run = run_of("encoder", sources, tmp_path, Distill(encoder))
    with pytest.raises(ValueError, match=r"has no head for classify"):
        programs.program(run, Bytes(), None, (), teacher.source(run))
    run = dataclasses.replace(run, distill=Distill(classifier(tmp_path, sources, ("good", "bad"))))
    with pytest.raises(ValueError, match=r"the head of .* is for .*good,bad and the run's for .*no,yes"):
        programs.program(run, Bytes(), None, (), teacher.source(run))
    pairs = dataclasses.replace(run_of("decoder", sources, tmp_path, Distill(larger)), objective=preference.Config())
    with pytest.raises(ValueError, match=r"preference offers none to compare"):
        programs.program(pairs, Bytes(), None, (), teacher.source(pairs))
