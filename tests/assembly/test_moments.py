"""What an optimizer remembers goes on in another run, and in a larger model."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest
from support.tiny_models import published

import jaxlm
from jaxlm.assembly import grow, run_directory, stream
from jaxlm.core import config
from jaxlm.core.growth import Growth
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.models import bert, llama, t5
from jaxlm.objectives import causal, classify, masked, seq2seq
from jaxlm.runtime import mesh
from jaxlm.training import moments

MODELS = {
    "decoder": (
        llama.Config(vocab=384, layers=2, width=16, heads=2, kv_heads=2, head_width=8, ffn=32),
        causal.Config(),
        {"width": 32, "ffn": 38, "heads": 4},
    ),
    "encoder": (
        bert.Config(vocab=384, layers=1, width=16, heads=2, ffn=32, positions=32, dropout=0.0),
        masked.Config(),
        {"ffn": 40},
    ),
    "encoder_decoder": (
        t5.Config(vocab=384, layers=1, width=16, heads=2, head_width=8, ffn=32, decoder_start=0, dropout=0.0),
        seq2seq.Config(target_len=16, pack=False),
        {"heads": 4, "ffn": 40},
    ),
}
STEPS = 3
slow = lambda *rows: [pytest.param(row, marks=pytest.mark.slow) for row in rows]  # noqa: E731
ONE_KIND_QUICKLY = ["decoder", *slow(*list(MODELS)[1:])]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdef"), 4)) for _ in range(160)]
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": " ".join(words[i : i + 40])}) + "\n" for i in range(120)))
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"source": w, "target": w[::-1]}) + "\n" for w in words))
    return {"decoder": str(text), "encoder": str(text), "encoder_decoder": str(pairs)}


def make(kind: str, source: str, folder, on: config.Mesh | None = None, **optim) -> config.Run:
    model, objective, _ = MODELS[kind]
    return config.Run(
        name="small", out=str(folder), model=model, objective=objective,
        data=config.Data((source,), tokenizer="bytes", cache=str(folder / "cache"), tokenize_workers=0, holdout=0.1),
        optim=config.Optim(**dict(lr=0.0, warmup=0, schedule="constant", clip=0.0, beta2=0.99) | optim),
        train=config.Train(steps=STEPS, batch_size=8, seq_len=32, prompts=(), eval_every=0, save_every=0),
        execution=config.Execution(dtype="float32"), mesh=on or config.Mesh(),
    )  # fmt: skip


def small(kind: str, source: str, folder, **optim) -> jaxlm.RunDirectory:
    """A run that is over, on one device."""
    with mesh.on_devices(jax.devices()[:1]):
        return jaxlm.train(make(kind, source, folder, **optim))


@pytest.fixture(scope="module")
def over(sources, tmp_path_factory) -> jaxlm.RunDirectory:
    """A decoder's run that is over, with AdamW and its own rate."""
    return small("decoder", sources["decoder"], tmp_path_factory.mktemp("over"), lr=1e-3)


def by_slot(opt) -> dict[str, np.ndarray]:
    return {f"{slot.part}/{slot.weight}": np.asarray(leaf) for slot, (_, leaf) in moments.slots(opt).items()}


def ended(before: jaxlm.RunDirectory) -> dict[str, np.ndarray]:
    """What the optimizer of a run that is over remembers."""
    p = jaxlm.Program(before.config).parts
    with Checkpoints(before.path / "checkpoints") as checkpoints:
        return by_slot(checkpoints.restore(run_directory.saved(p.abstract_state(), p.adapter))[0]["opt"])


def next_state(before: jaxlm.RunDirectory, on: config.Mesh | None = None, **changes):
    """The first state of a run that goes on from another with its moments."""
    base = dataclasses.replace(before.config, name="next", mesh=on or config.Mesh())
    run = jaxlm.load(base, start=str(before.path), **{"optim.moments": "start"} | changes)
    return jaxlm.Program(run).init()


def agree(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    largest = {part: max(np.abs(x).max() for name, x in wanted.items() if f"/{part}/" in name) for part in ("mu", "nu")}
    for name, value in wanted.items():
        least = 1e-7 * largest.get(name.split("/")[1], 0)  # a bias of keys changes nothing: its gradient is rounding
        np.testing.assert_allclose(
            found[name], value, rtol=tolerance, atol=tolerance * np.abs(value).max() + least, err_msg=name
        )


@pytest.mark.parametrize("kind", ONE_KIND_QUICKLY)
def test_a_wider_model_remembers_what_it_would_have_gathered_itself(kind, sources, tmp_path):
    """With frozen weights: gathered by the small model on one device and mapped, and by the large one on eight."""
    before = small(kind, sources[kind], tmp_path)
    sizes = MODELS[kind][2]
    grown = jaxlm.grow(before, tmp_path / "grown", widen=sizes)
    on = config.Mesh(fsdp=4, tensor=2) if "width" in sizes else config.Mesh(fsdp=8)
    itself = jaxlm.train(dataclasses.replace(jaxlm.load(before.config, start=str(grown.path)), name="itself", mesh=on))
    mapped, gathered = by_slot(next_state(grown, on).opt), ended(itself)
    assert mapped.keys() == gathered.keys() and mapped["ScaleByAdamState/count/"] == STEPS
    agree(mapped, gathered, 1e-4)


def test_new_layers_remember_nothing_and_old_ones_all(over, tmp_path, one_device):
    before, grown = over, jaxlm.grow(over, tmp_path / "grown", blocks=1)
    old, new = ended(before), by_slot(next_state(grown, **{"optim.only_layers": (2,)}).opt)
    assert new["ScaleByAdamState/count/"] == STEPS
    for part in ("mu", "nu"):
        name = f"ScaleByAdamState/{part}/blocks/up"
        np.testing.assert_array_equal(new[name][:2], old[name])
        assert not new[name][2].any() and old[name].any()
    assert json.loads((grown.path / "grown.json").read_text())["moments"] == "adamw"


@pytest.mark.parametrize("name", ["adamw", *slow("muon", "lion", "sgd", "adafactor")])
def test_a_run_goes_on_with_the_moments_of_the_one_before(name, over, sources, tmp_path):
    """On eight devices, with ZeRO 3 and 1, bit for bit; and the learning rate begins anew."""
    before = over if name == "adamw" else small("decoder", sources["decoder"], tmp_path, lr=1e-3, name=name)
    wanted = ended(before)
    assert any(np.abs(x).max() > 0 for x in wanted.values())
    for on in (config.Mesh(fsdp=8), config.Mesh(fsdp=4, tensor=2, zero=1)):
        state = next_state(before, on)
        found = by_slot(state.opt)
        assert found.keys() == wanted.keys()
        for slot, value in wanted.items():
            np.testing.assert_array_equal(found[slot], value, err_msg=slot)
        is_clock = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
        clocks = [x for x in jax.tree.leaves(state.opt, is_leaf=is_clock) if is_clock(x)]
        assert clocks and all(int(clock.count) == 0 for clock in clocks) and int(state.step) == 0
        homes = jaxlm.Program(dataclasses.replace(before.config, mesh=on)).parts.state_shardings.opt
        jax.tree.map(
            lambda x, home: x.sharding.is_equivalent_to(home, x.ndim) or pytest.fail(str(home)), state.opt, homes
        )


def test_what_is_new_in_a_run_has_no_moments_yet(over, one_device, capsys):
    """A head of another task has none, and settings that nest the optimizer otherwise don't matter."""
    wanted = ended(over)
    labels = {"objective": classify.Config(labels=("no", "yes"))}
    found = by_slot(next_state(over, **labels, **{"optim.layer_decay": 0.9}).opt)
    assert "none yet of classify" in capsys.readouterr().out
    for part in ("mu", "nu"):
        name = f"ScaleByAdamState/{part}/"
        assert not found[f"{name}classify"].any()
        np.testing.assert_array_equal(found[f"{name}embed"], wanted[f"{name}embed"])


def refused(run: config.Run, message: str) -> None:
    """In one line, before anything is trained, and nothing is left."""
    with pytest.raises(ValueError, match=message) as error:
        jaxlm.train(run)
    assert "\n" not in str(error.value) and not run.folder.exists()


def test_moments_that_are_not_there_are_refused_in_one_line(over, sources, tmp_path, one_device):
    plain = make("decoder", sources["decoder"], tmp_path, moments="start")
    refused(plain, r"optim\.moments: start takes those of the run .* name a run directory by `start`")
    model = published(tmp_path / "llama")
    by_place = lambda place, **more: jaxlm.load(  # noqa: E731
        dataclasses.replace(plain, name="next"), start=str(place), **more
    )
    refused(by_place(model), r"optim\.moments: .*llama was published without an optimizer's state; set it to fresh")
    imported = jaxlm.import_model(model, tmp_path / "imported")
    refused(
        by_place(imported.path, **{"objective": causal.Config()}), r"imported holds no optimizer's state \(an imported"
    )
    before = over
    refused(
        by_place(before.path, **{"optim.name": "lion"}), "the run small was trained by adamw, and this one is by lion"
    )
    sgd = {"optim.name": "sgd", "optim.momentum": 0.0}
    refused(by_place(before.path, **sgd), "this one is by sgd without momentum")
    adapter = {"adapter": "adalora"}
    refused(by_place(before.path, **adapter), r"optim\.moments: adalora begins to choose anew in each run")
    grows = {"adapter": "orthogonal_lora"}
    refused(
        by_place(before.path, **grows), r"optim\.moments: each run trains a new orthogonal_lora, which has none yet"
    )
    each = {"adapter": "lora", "continual.adapters": "task"}
    refused(by_place(before.path, **each), r"optim\.moments: each run trains a new lora")
    other = {"transfer.method": "mup", "transfer.base_width": 8}
    refused(by_place(before.path, **other), r"optim\.moments: the run small has other sizes or another transfer")
    lora = {"adapter": "lora"}
    refused(by_place(before.path, **lora), "remembers nothing of the weights that this run trains")


@pytest.mark.slow
def test_an_optimizer_whose_state_can_not_grow_is_told(sources, tmp_path, one_device):
    before = small("decoder", sources["decoder"], tmp_path, name="adafactor", lr=1e-3)
    notes, record = grow.grow(before.path, tmp_path / "grown", Growth(blocks=1))
    assert record["moments"] is None
    assert "moments: none, for what FactoredState holds can't be that of a larger model" in " ".join(notes)
    run = jaxlm.load(dataclasses.replace(before.config, name="next"), start=str(tmp_path / "grown"))
    refused(
        dataclasses.replace(run, optim=dataclasses.replace(run.optim, moments="start")), "holds no optimizer's state"
    )


class Stopped(Exception):
    pass


def test_a_stopped_run_goes_on_without_the_one_it_started_from(over, tmp_path, one_device):
    """Bit for bit, and with the moments that it has by then."""
    before = shutil.copytree(over.path, tmp_path / "before")
    base = dataclasses.replace(over.config, out=str(tmp_path), name="whole")
    run = jaxlm.load(base, start=str(before), **{"optim.moments": "start", "train.save_every": 2, "train.steps": 4})
    whole, parts = jaxlm.train(run), dataclasses.replace(run, name="parts")

    def stop(step: int, metrics: dict) -> None:
        if step == 3:
            raise Stopped

    with pytest.raises(Stopped):
        jaxlm.train(parts, on_step=stop)
    shutil.rmtree(before)
    done = jaxlm.train(parts)
    assert ended(done)["ScaleByAdamState/count/"] == STEPS + 4
    for one, other in ((ended(whole), ended(done)), (whole.open().params, done.open().params)):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def test_the_first_stage_of_a_stream_has_no_moments_to_go_on_with(sources, tmp_path):
    run = make("decoder", sources["decoder"], tmp_path, moments="start")
    stages = (jaxlm.Stage("a"), jaxlm.Stage("b"), jaxlm.Stage("c"))
    assert [r.optim.moments for r in stream._runs(jaxlm.Stream(run, stages), 0)] == ["fresh", "start", "start"]
    other = (jaxlm.Stage("a"), jaxlm.Stage("b", {"optim.name": "lion"}))
    with pytest.raises(ValueError, match=r"stage b: optim\.moments: the run 1-a was trained by adamw, and this one"):
        stream._runs(jaxlm.Stream(run, other), 0)
