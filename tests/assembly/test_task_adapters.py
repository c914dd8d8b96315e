"""Tasks with adapters of their own over one frozen base, for models of every kind."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.assembly import earlier, open_model
from jaxlm.assembly import program as programs
from jaxlm.assembly.model_source import StartModel
from jaxlm.core import config, tree
from jaxlm.core.continual import Continual
from jaxlm.data.tokenizer import Bytes
from jaxlm.models import bert, llama, t5
from jaxlm.objectives import causal, classify, seq2seq
from jaxlm.runtime import mesh
from jaxlm.weights.adapters import BitFit, Lora, OrthogonalLora, Prompt

MODELS = {
    "decoder": (
        llama.Config(vocab=384, layers=1, width=16, heads=2, kv_heads=2, head_width=8, ffn=32),
        causal.Config(),
    ),
    "encoder": (
        bert.Config(vocab=384, layers=1, width=16, heads=2, ffn=32, positions=32, dropout=0.0),
        classify.Config(labels=("no", "yes"), dropout=0.0),
    ),
    "encoder_decoder": (
        t5.Config(vocab=384, layers=1, width=16, heads=2, head_width=8, ffn=32, decoder_start=0, dropout=0.0),
        seq2seq.Config(target_len=16, pack=False),
    ),
}
KINDS = list(MODELS)


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
        optim=config.Optim(lr=1e-2, warmup=0),
        train=config.Train(steps=2, batch_size=8, seq_len=32, prompts=(), eval_every=0, save_every=1),
        continual=Continual(adapters="task"), execution=config.Execution(dtype="float32"),
    ), **changes)  # fmt: skip


def second_run(first, source: str, name: str = "two", **changes) -> config.Run:
    return jaxlm.load(first.path, name=name, **{"data.train": (source,)}, **changes)


def figures_of(place, run: config.Run) -> dict[str, float]:
    """What the model at a place scores on the validation data of a run."""
    return dict(jaxlm.evaluate(place, data=None).figures) if run is None else {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_used_with_its_own_adapter(kind, sources, tmp_path, one_device):
    """After the second task, stopped in its middle, the first gives bit for bit what it gave; only the new adapter and
    head are trained, and nothing else has an optimizer's state."""
    first = jaxlm.train(first_run(kind, sources[kind][0], tmp_path))
    run = second_run(first, sources[kind][1])

    def stop(step: int, metrics: dict) -> None:
        if step == 1:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        jaxlm.train(run, on_step=stop)
    second = jaxlm.train(second_run(first, sources[kind][1]))
    whole = jaxlm.train(second_run(first, sources[kind][1], "whole"))
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
