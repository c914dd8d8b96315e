"""The library: objects in, objects out, and errors that name arguments and fields."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxlm
from jaxlm.core import config_io
from jaxlm.core.config import Optim
from jaxlm.models import llama
from jaxlm.weights.adapters import Lora

ROOT = Path(__file__).parents[1]
SMALL = llama.Config(vocab=264, layers=1, width=16, heads=2, kv_heads=1, head_width=8, ffn=16, positions=64)


def small_run(folder: Path, name: str = "small") -> jaxlm.Run:
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for i in range(6):
        (text / f"{i}.txt").write_text("".join(f"the {i} times {j} is {i * j}\n" for j in range(30)))
    return jaxlm.load(
        "tiny_llama", name=name, out=str(folder), model=SMALL, execution={"scan": True},
        data={"train": (str(text),), "holdout": 0.3, "cache": str(folder / "cache"), "tokenize_workers": 1},
        train={"steps": 3, "seq_len": 32, "eval_batches": 1, "prompts": (), "log_every": 1}, **{"optim.warmup": 1},
    )  # fmt: skip


def test_the_configuration_that_a_run_keeps_is_a_config(tmp_path):
    run = small_run(tmp_path)
    config_io.dump(run, tmp_path / "config.json")
    assert jaxlm.load(tmp_path / "config.json", name="again") == dataclasses.replace(run, name="again")


def test_a_run_is_trained_opened_used_and_written(tmp_path):
    seen: list[tuple[int, float]] = []
    run = small_run(tmp_path)
    folder = jaxlm.train(run, on_step=lambda step, metrics: seen.append((step, metrics["loss"])))
    assert folder.finished and folder.checkpoints == [3] and folder.config == run
    assert [step for step, _ in seen] == [1, 2, 3] and folder.losses == [loss for _, loss in seen]

    program = jaxlm.Program(jaxlm.load(run, name="own"))
    state, losses = program.init(), []
    for _, batch in zip(range(3), program.batches(), strict=False):
        state, metrics = program.step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, folder.losses, rtol=1e-6)
    saved = program.save(state)
    assert saved.checkpoints == [3]
    assert program.validate(state, 1)["loss"] == pytest.approx(folder.validation["loss"], rel=1e-6)

    model = saved.open()
    [logits_TV] = model.logits("the 1")
    assert logits_TV.shape == (len(model.encode("the 1")), SMALL.vocab) and logits_TV.dtype == np.float32
    [[answer]] = model.answers(["the 1"], tokens=1)
    assert answer.completion.tokens == [int(logits_TV[-1].argmax())]
    assert jaxlm.evaluate(model, batches=1)["loss"] == pytest.approx(folder.validation["loss"], rel=1e-5)
    twice = model.with_params({name: w * 2 if name == "head" else w for name, w in model.params.items()})
    np.testing.assert_allclose(twice.logits("the 1")[0], 2 * logits_TV, rtol=1e-5)
    notes = twice.save(tmp_path / "hf")
    assert any("model.safetensors" in note for note in notes)
    np.testing.assert_allclose(jaxlm.open(tmp_path / "hf").logits("the 1")[0], 2 * logits_TV, rtol=1e-4, atol=1e-5)


def test_load_changes_fields_parts_and_methods():
    run = jaxlm.load("tiny_llama", seed=3, optim=Optim(lr=0.5), adapter="lora", **{"adapter.rank": 2, "train.steps": 7})
    assert (run.seed, run.optim.lr, run.train.steps, run.adapter) == (3, 0.5, 7, Lora(rank=2))
    assert jaxlm.load(run, train={"prompts": ["a"]}).train.prompts == ("a",)
    assert jaxlm.load(lambda: run) == run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(train=dict(stepz=1)), r"unknown config key train\.stepz; did you mean 'steps'\?"),
        ({"optim.lr.x": 1}, r"unknown config key optim\.lr\.x: optim\.lr has no fields"),
        (dict(model="llama"), r"model: 'llama' is not a valid Config"),
        (dict(optim=dict(schedule="stairs")), r"optim\.schedule: unknown 'stairs'; known: constant, .* as a plugin"),
        (dict(seed=True), r"seed: True is not a valid int"),
    ],
)
def test_mistakes_in_a_run_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        jaxlm.load("tiny_llama", **changes)


def test_mistakes_in_calls_name_the_argument(tmp_path):
    with pytest.raises(ValueError, match="config: the function returned int"):
        jaxlm.load(lambda: 3)
    with pytest.raises(ValueError, match="not a run directory"):
        jaxlm.RunDirectory(tmp_path).config  # noqa: B018
    with pytest.raises(ValueError, match="model: 'bert' is the name of another model already"):
        jaxlm.register_model("bert", llama)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        jaxlm.trian  # noqa: B018


def test_every_name_is_there_and_none_is_loaded_before_it_is_used():
    assert all(hasattr(jaxlm, name) for name in jaxlm.__all__)
    code = "import sys, jaxlm; dir(jaxlm); print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_script_without_a_guard_may_train_with_processes_that_tokenise(tmp_path):
    """Workers that ran the script again would each start workers of their own."""
    (tmp_path / "text.txt").write_text("a line\n" * 50)
    script = tmp_path / "script.py"
    script.write_text(
        "from jaxlm.data import token_cache\nfrom jaxlm.data.tokenizer import Bytes\n"
        f"print('begins')\npaths = token_cache.prepare({str(tmp_path / 'text.txt')!r}, Bytes(), "
        f"{str(tmp_path / 'cache')!r}, workers=2, progress=False)\nprint(sorted(paths))\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT), "PATH": ""}, timeout=60)  # fmt: skip
    assert done.stdout.count("begins") == 1 and "train" in done.stdout, done.stderr
