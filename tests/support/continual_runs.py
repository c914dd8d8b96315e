"""Small runs of every kind of model that keep what was learned before."""

import json

import numpy as np
import pytest

from jaxlm.assembly import earlier, remember
from jaxlm.assembly import program as programs
from jaxlm.assembly.model_source import StartModel
from jaxlm.core import config
from jaxlm.core.continual import Continual
from jaxlm.data.tokenizer import Bytes
from jaxlm.models import bert, llama, t5
from jaxlm.objectives import causal, classify, seq2seq
from jaxlm.runtime import mesh

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
ONE_KIND_QUICKLY = ["decoder", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]


def write_sources(folder) -> dict[str, str]:
    """Writes small data of each kind."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdef"), 4)) for _ in range(160)]
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": " ".join(words[i : i + 40])}) + "\n" for i in range(40)))
    rows = folder / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"{w},{'yes' if 'a' in w else 'no'}\n" for w in words))
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"source": w, "target": w[::-1]}) + "\n" for w in words))
    return {"decoder": str(text), "encoder": str(rows), "encoder_decoder": str(pairs)}


def make(kind: str, source: str, folder, methods=(), on: config.Mesh | None = None, **settings) -> config.Run:
    model, objective = MODELS[kind]
    return config.Run(
        name=kind, out=str(folder), model=model, objective=objective,
        data=config.Data((source,), tokenizer="bytes", cache=str(folder / "cache"), tokenize_workers=0, holdout=0.1),
        optim=config.Optim(name="sgd", lr=0.1, momentum=0.0, warmup=0, weight_decay=0.0, schedule="constant", clip=0.0),
        train=config.Train(steps=4, batch_size=16, seq_len=32, prompts=(), eval_every=0, save_every=0),
        continual=Continual(methods, old=(source,), **settings),
        execution=config.Execution(dtype="float32"), mesh=on or config.Mesh(),
    )  # fmt: skip


def begun(run: config.Run):
    """The program of a run, and its state with what it keeps."""
    run.folder.mkdir(parents=True, exist_ok=True)
    p = programs.program(run, Bytes(), None, earlier.earlier_tasks(run, StartModel("")))
    with mesh.on_mesh(p.mesh):
        return p, remember.remember(p, p.init(), StartModel(""), begins=True)


class Stopped(Exception):
    """Stands for whatever kills a run."""
