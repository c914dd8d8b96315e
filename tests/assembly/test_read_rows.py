"""Records are read in few rows, and each gets what it would get by itself."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from objectives.test_every_objective import LINES, SMALL
from support.tiny_models import random_weights

from jaxlm.assembly import corpus, program, read_rows, run_objective, scoring
from jaxlm.core import config
from jaxlm.data.tokenizer import Bytes
from jaxlm.objectives import OBJECTIVES

pytestmark = pytest.mark.usefixtures("one_device")
TAGGED = "\n\n".join("\n".join(f"{'ab' * n} {'O' if k % 2 else 'B-X'}" for k in range(n)) for n in (1, 2, 3, 4, 5) * 3)
T = 64
MODELS = SMALL | {"encoder": dataclasses.replace(SMALL["encoder"], positions=T)}


def program_of(name: str, folder: Path, **train) -> tuple[program.Program, list]:
    file = folder / ("words.conll" if name == "tag" else "lines.jsonl")
    if name == "tag":
        file.write_text(TAGGED + "\n")
    else:
        lines = [line for line in LINES[name] for _ in range(3)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = config.Data(train=(str(file),), valid=(str(file),), tokenizer="bytes", cache=str(folder / "cache"))
    objective = OBJECTIVES[name]
    run = config.Run("r", MODELS[objective.models[0]], objective.Config(), data=data, out=str(folder),
                     train=config.Train(**{"seq_len": T, "batch_size": 4} | train),
                     execution=config.Execution("float32"))  # fmt: skip
    run = run_objective.infer_from_data(run)
    p = program.program(run, Bytes())
    return p, corpus.corpus(run.data, p.objective, ("valid",)).valid[0]


@pytest.mark.parametrize("name", ["classify", "tag", "relate", "choice", "answer"])
def test_each_record_gets_the_prediction_that_it_gets_by_itself(name, tmp_path):
    p, records = program_of(name, tmp_path)
    weights = random_weights(p.specs)
    found = read_rows.predictions(p, weights, records)
    assert len(found) == len(records) > 4
    for i, z in enumerate(found):
        [alone] = read_rows.predictions(p, weights, records[i : i + 1])
        n = min(len(z), len(alone))  # positions may be cut down to the longest text of a batch
        np.testing.assert_allclose(z[:n], alone[:n], rtol=1e-4, atol=1e-5)
    assert len({z.round(4).tobytes() for z in found}) > 1
    held = scoring.HeldOut(p, [records])
    members = [m.record for _, rows in held.placed(p) for row in rows for m in row]
    assert sorted(members) == list(range(len(records)))
    few = [m.record for _, rows in held.placed(p, 1) for row in rows for m in row]
    assert sorted(few) == list(range(4)), "the limit is that of the first records"


@pytest.mark.parametrize("name", ["classify", "choice"])
def test_blocks_of_records_are_read_one_after_another(name, tmp_path, monkeypatch):
    p, records = program_of(name, tmp_path, batch_size=2)
    weights = random_weights(p.specs)
    whole = read_rows.predictions(p, weights, records)
    monkeypatch.setattr(read_rows, "AHEAD", 8)
    assert len(records) > 16
    batches = list(read_rows.placed(p, records))
    assert {len(b["rows"][0]) for b, _ in batches} == {2}, "a block's last batch is filled up"
    assert sorted(m.record for _, rows in batches for row in rows for m in row) == list(range(len(records)))
    for a, b in zip(read_rows.predictions(p, weights, records), whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["classify", "tag", "relate"])
def test_texts_fill_rows(name, tmp_path):
    p, records = program_of(name, tmp_path)
    batches = [(np.asarray(b["segments"]), rows) for b, rows in read_rows.placed(p, records)]
    assert len(batches) < -(-len(records) // 4) and {s.shape for s, _ in batches} == {batches[0][0].shape}
    for segments, rows in batches:
        for row, members in zip(segments[0], rows, strict=False):
            for number, m in enumerate(members, 1):
                assert (row[m.begin : m.end] == number).all() and (row == number).sum() == m.end - m.begin
                assert m.end - m.begin == len(records[m.record]["ids"])


def test_what_is_asked_of_a_few_texts_fills_no_whole_batch(tmp_path):
    p, records = program_of("classify", tmp_path, batch_size=16)
    [(batch, [[member]])] = read_rows.placed(p, records[:1])
    assert batch["tokens"].shape[:2] == (1, 1) and member.record == 0
    shapes = set()
    for n in range(1, len(records) + 1):
        shapes |= {batch["tokens"].shape[1:] for batch, _ in read_rows.placed(p, records[:n])}
    assert len(records) == 18 and len(shapes) <= 5, "each is a program of its own"


def test_losses_and_predictions_come_from_one_pass_of_the_model(tmp_path):
    """The compiled program has as many matrix products as that of the loss alone."""
    p, records = program_of("classify", tmp_path)
    batch = next(scoring.HeldOut(p, [records]).batches(p))
    weights = p.init().params

    def products(f) -> int:
        return jax.jit(f).lower(weights, batch).as_text().count("dot_general")

    alone = products(lambda w, b: p.objective.predict(p.model, w, jax.tree.map(lambda x: x[0], b)))
    assert alone > 4 and products(scoring.Scorer(p)._scores) < 2 * alone


def test_texts_that_share_rows_have_predictions_of_their_own():
    with pytest.raises(ValueError, match=r"^prediction.of: texts share rows"):
        objective = OBJECTIVES["choice"]
        type(objective)(**{**vars(objective), "padding": "pack"})
