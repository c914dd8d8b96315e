"""A text's loss doesn't depend on the texts that it shares a batch or a row with, whatever the adapter."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from assembly.test_read_rows import MODELS, TAGGED, T
from objectives.test_every_objective import LINES
from support.tiny_models import random_weights

from jaxlm.assembly import corpus, program, run_objective
from jaxlm.core import config
from jaxlm.core.distributed import Distributed
from jaxlm.data.tokenizer import Bytes
from jaxlm.objectives import OBJECTIVES, masked, seq2seq
from jaxlm.runtime import mesh
from jaxlm.weights.adapters import METHODS

pytestmark = pytest.mark.usefixtures("one_device")
PAIRS = [dict(source=f"a {'b' * n}", target=f"c {'d' * n}") for n in range(1, 9)]


def bound(folder: Path, objective, model, adapter: str, **data) -> program.Program:
    name = next(n for n, o in OBJECTIVES.items() if isinstance(objective, o.Config))
    file = folder / ("words.conll" if name == "tag" else "lines.jsonl")
    lines = LINES.get(name, PAIRS)
    text = TAGGED + "\n" if name == "tag" else "".join(json.dumps(line) + "\n" for line in lines)
    file.write_text(text)
    data |= dict(train=(str(file),), valid=(str(file),), tokenizer="bytes", cache=str(folder / "cache"))
    run = config.Run("r", model, objective, adapter=METHODS[adapter].Config(), data=config.Data(**data),
                     train=config.Train(seq_len=T, batch_size=6), execution=config.Execution("float32"),
                     out=str(folder))  # fmt: skip
    return program.program(run_objective.infer_from_data(run), Bytes())


def without_dropout(name: str):
    c = OBJECTIVES[name].Config()
    return dataclasses.replace(c, dropout=0.0)


@pytest.mark.parametrize("adapter", ["prompt", "p_tuning", "prefix", "lora"])
@pytest.mark.parametrize(
    ("name", "kind"), [("classify", "encoder"), ("tag", "encoder"), ("relate", "encoder"), ("classify", "decoder")]
)
def test_a_batch_is_the_sum_of_its_texts(name, kind, adapter, tmp_path):
    p = bound(tmp_path, without_dropout(name), MODELS[kind], adapter)
    data = corpus.corpus(p.run.data, p.objective, ("train",))
    batch = corpus.training_loader(p.run, p.objective, data, None).batch(0)
    together = p.to_device(batch, None)
    shares = kind == "decoder" or adapter in ("prefix", "lora")
    assert (together["tokens"].shape[1] < 6) == shares and p.objective.row.shared == shares
    weights = random_weights(p.specs)

    @jax.jit
    def loss(weights, batch):
        [sums] = p.loss(weights, jax.tree.map(lambda x: x[0], batch), None).values()
        return sums["loss"]

    alone = sum(float(loss(weights, {k: v[:, i : i + 1] for k, v in batch.items()})) for i in range(6))
    np.testing.assert_allclose(float(loss(weights, together)), alone, rtol=1e-5)


@pytest.mark.parametrize("adapter", ["none", "prompt"])
@pytest.mark.parametrize("name", ["classify", "tag"])
def test_rows_that_devices_split_keep_their_length(name, adapter, tmp_path):
    """Few texts would fit shorter ones; losses are the same."""
    one = bound(tmp_path, without_dropout(name), MODELS["encoder"], adapter)
    data = corpus.corpus(one.run.data, one.objective, ("train",))
    batch = {k: v[:, :4] for k, v in corpus.training_loader(one.run, one.objective, data, None).batch(0).items()}
    weights = random_weights(one.specs)

    def loss(p: program.Program) -> float:
        together = p.to_device(batch, None)
        whole = together["tokens"].shape[2] == T
        assert whole if p.mesh is not None or name == "tag" else not whole
        with mesh.on_mesh(p.mesh):
            placed = jax.device_put(weights, p.layout.shardings(p.specs, p.mesh))
            found = jax.jit(lambda w, b: p.loss(w, jax.tree.map(lambda x: x[0], b), None))(placed, together)
        [sums] = found.values()
        return float(sums["loss"])

    run = dataclasses.replace(one.run, mesh=config.Mesh(data=2, context=4))
    with mesh.on_devices(jax.devices("cpu")):
        np.testing.assert_allclose(loss(program.program(run, Bytes())), loss(one), rtol=1e-5)


@pytest.mark.parametrize("name", ["classify", "tag"])
def test_workers_that_train_apart_keep_their_texts(name, tmp_path):
    """However few rows hold all texts: a worker without any could learn nothing."""
    plain = bound(tmp_path, without_dropout(name), MODELS["encoder"], "none")
    apart = dataclasses.replace(plain.run, distributed=Distributed("diloco", workers=3),
                                optim=config.Optim("adamw", warmup=0))  # fmt: skip
    p = program.program(apart, Bytes())
    data = corpus.corpus(p.run.data, p.objective, ("train",))
    batch = corpus.training_loader(p.run, p.objective, data, None).batch(0)
    together = jax.device_get(p.to_device(batch, None))
    assert plain.to_device(batch, None)["tokens"].shape[1] < 3 == together["tokens"].shape[1]
    for worker in range(3):
        texts = slice(2 * worker, 2 * worker + 2)
        rows = ((batch, texts), (together, slice(worker, worker + 1)))
        had, has = (x["tokens"][0, r][x["segments"][0, r] > 0].tolist() for x, r in rows)
        assert sorted(had) == sorted(has)


@pytest.mark.parametrize(
    ("kind", "adapter", "rows"),
    [("encoder_decoder", "prompt", 8), ("encoder_decoder", "lora", 1), ("decoder", "prompt", 2)],
)
def test_an_encoder_reads_virtual_tokens_with_one_pair_alone(kind, adapter, rows, tmp_path):
    p = bound(tmp_path, seq2seq.Config(), MODELS[kind], adapter)
    [part] = corpus.corpus(p.run.data, p.objective, ("train",)).train
    records = corpus.as_records(p.objective, part, document_mask=True, seed=0)
    assert len(records) == rows


def test_an_encoder_reads_virtual_tokens_with_one_document_alone(tmp_path):
    with pytest.raises(ValueError, match=r"^data.document_mask: the virtual tokens of prompt .* set it to false"):
        bound(tmp_path, masked.Config(), MODELS["encoder"], "prompt")
    bound(tmp_path, masked.Config(), MODELS["encoder"], "prompt", document_mask=False)
    bound(tmp_path, masked.Config(), MODELS["encoder"], "lora")
