"""Losses are kept by document or example: the same ones whatever the batches, and each what it is by itself."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from objectives.test_every_objective import ANIMALS, LINES, SMALL, TEXTS, T, bound

from jaxlm.assembly import corpus, program, scoring
from jaxlm.assembly.run_objective import BoundObjective
from jaxlm.core import config, spec
from jaxlm.data import loader, packing
from jaxlm.data import token_cache as caches
from jaxlm.data.tokenizer import Bytes
from jaxlm.evaluation import bootstrap, perplexity, samples
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.objectives import OBJECTIVES, causal

WORDS = [" ".join([animal] * n) for n, animal in enumerate(ANIMALS * 2, 1)]


def text_run(folder: Path, **train) -> config.Run:
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    data = config.Data(train=(), valid=(str(folder / "x.jsonl"),), tokenizer="bytes", cache=str(folder / "cache"),
                       tokenize_workers=1)  # fmt: skip
    return config.Run("r", SMALL["decoder"], causal.Config(), data=data, train=config.Train(seq_len=T, **train),
                      execution=config.Execution("float32"))  # fmt: skip


@pytest.mark.usefixtures("one_device")
def test_documents_are_the_units_whatever_the_size_of_a_batch(tmp_path):
    """Twelve documents of 3 to 47 letters in windows of 32 tokens: some lie in two windows, some share one."""
    found: list[perplexity.Tally] = []
    weights = None
    for rows in (2, 5):
        run = text_run(tmp_path, batch_size=rows)
        p = program.program(run, Bytes())
        held = scoring.HeldOut(p, corpus.corpus(run.data, p.objective, ("valid",)).valid)
        weights = weights or p.init().params
        step = perplexity.make_eval_step(p.loss, p.objective.totals, p.tokens.bytes_per_token)
        found.append(perplexity.tally(step, weights, held.batches(p), held.count, held.unit))
    assert p.objective.row.seq_len == T
    (counts, keys, unit), (others, other_keys, _) = (x.table() for x in found)
    assert unit == "documents" and counts.shape == (12, 5) and keys == other_keys and len(set(keys)) == 12
    np.testing.assert_allclose(counts, others, rtol=1e-5)
    column = found[0].columns.index
    sizes = counts[:, column(("tokens", ""))], counts[:, column(("bytes", ""))]
    # A document's targets are its bytes and its end, but for one at each edge of a window that it goes on over.
    assert list(sizes[1]) == [len(text) for text in WORDS]
    assert (sizes[0] == sizes[1] + 1).all()
    assert found[0].figures() == pytest.approx(found[1].figures(), rel=1e-5)
    alone = []
    for batch in held.batches(p):
        for number in (3, 7, 12):  # by itself: nothing else has a weight
            mine = (batch["unit"] == number).astype(np.float32)
            values, _ = step(weights, batch | {"weights": batch["weights"] * mine})
            alone.append((number, float(values["tokens", "nll"])))
    for number in (3, 7, 12):
        expected = sum(nll for at, nll in alone if at == number)
        assert others[number - 1, found[1].columns.index(("tokens", "nll"))] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_tells_what_each_example_adds(name: str, tmp_path: Path) -> None:
    file = tmp_path / ("words.txt" if name == "tag" else "lines.jsonl")
    lines = LINES.get(name, TEXTS)
    if name == "tag":
        file.write_text("".join(f"a O\n{animal} B-X\n\n" for animal in ANIMALS))
    else:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = bound(name, file)
    data = config.Data(train=(str(file),), valid=(str(file),), cache=str(tmp_path / "cache"), tokenize_workers=1)
    source = corpus.corpus(data, task, ("valid",)).valid[0]
    found = tally(task, source)
    counts, keys, unit = found.table()
    assert found.is_by_unit and unit == ("documents" if task.records == "packed" else "examples")
    n = len(ANIMALS) if name == "tag" else len(lines)
    if task.records == "pairs":
        n = len(corpus.as_records(task, source, document_mask=True, seed=0))
    left_out = 4 if name == "span_corruption" else 0  # by chance, where not all of a window fit
    assert n - left_out <= len(counts) <= n and len(set(keys)) > 1
    low, high = bootstrap.intervals(samples.of_losses(found), 500)["loss"]
    assert low < found.figures()["loss"] < high


def tally(task: BoundObjective, source) -> perplexity.Tally:
    c = SMALL[task.objective.models[0]]
    family = MODELS.of(c)
    specs = family.specs(c) | task.specs(c.width)
    model = Model(family, c, specs, Layout(execution=config.Execution(dtype="float32")))
    records = corpus.as_records(task, source, document_mask=True, seed=0)
    units = scoring.units_of(task, source, records)
    step = perplexity.make_eval_step(
        lambda weights, batch, key: task.loss(model, weights, batch, key), task.totals, task.tokenizer.bytes_per_token
    )

    def batches():
        for number, batch in enumerate(loader.evaluation_batches(records, task.example, batch_size=4)):
            batch |= scoring.owners(batch, number * 4 + np.arange(4), units, 0)
            yield packing.pack_batch(batch) if task.padding == "pack" else batch

    weights = jax.jit(lambda key: spec.init(specs, key))(jax.random.key(0))
    return perplexity.tally(step, weights, batches(), units.count, units.name)


def test_documents_that_stand_in_two_parts_are_told_and_only_what_is_asked_for_is_read(tmp_path, capsys):
    run = text_run(tmp_path)
    for name, texts in {"a": WORDS[:6], "b": WORDS[5:9], "c": WORDS[4:6] + WORDS[8:11]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    a, b, c = ((str(tmp_path / f"{name}.jsonl"),) for name in "abc")
    task = program.program(run, Bytes()).objective
    made = corpus.corpus(dataclasses.replace(run.data, train=a, valid=b, test=c), task)
    shown = capsys.readouterr().out
    assert "1 of 4 validation examples stand in the training data too;" in shown
    assert "2 of 5 test examples stand in the training data too;" in shown
    assert "2 of 5 test examples stand in the validation data too;" in shown
    assert [len(part[0]) for part in (made.train, made.valid, made.test)] == [6, 4, 5]
    lost = dataclasses.replace(run.data, train=("gone.txt",), valid=("gone.txt",), test=c)
    made = corpus.corpus(lost, task, ("test",))
    assert len(made.test[0]) == 5 and not made.train and not made.valid
    with pytest.raises(ValueError, match="does not exist"):
        corpus.corpus(lost, task)


@pytest.mark.usefixtures("one_device")
def test_a_source_is_prepared_once_for_both_of_its_parts(tmp_path, monkeypatch):
    run = text_run(tmp_path)
    data = dataclasses.replace(run.data, train=run.data.valid, valid=(), holdout=0.3)
    asked, prepare = [], caches.prepare

    def counted(source, *args, **kwargs):
        asked.append(source)
        return prepare(source, *args, **kwargs)

    monkeypatch.setattr(corpus.caches, "prepare", counted)
    made = corpus.corpus(data, program.program(run, Bytes()).objective)
    assert asked == list(data.train)
    assert len(made.train[0]) + len(made.valid[0]) == len(WORDS) and len(made.valid[0])


def test_a_batch_is_read_when_the_next_one_has_been_sent():
    """Devices compute the next batch while the host adds up the one before and makes another."""
    told: list[str] = []

    @dataclasses.dataclass
    class OnDevice:
        number: int

        def __array__(self, *_, **__):
            told.append(f"read {self.number}")
            return np.array(float(self.number))

    def step(params, batch):
        told.append(f"send {batch['number']}")
        return {("tokens", ""): OnDevice(batch["number"])}, {}

    found = perplexity.tally(step, None, [{"number": i} for i in range(1, 4)])
    assert told == ["send 1", "send 2", "read 1", "send 3", "read 2", "read 3"]
    assert found.table()[0].tolist() == [[1.0], [2.0], [3.0]]


def test_an_objective_that_compares_rows_has_batches_for_units():
    """Its sums aren't what its rows add to them."""

    def loss(params, batch, key):
        return {"rows": {"loss": (batch["rows"] * batch["rows"].sum()).sum()}}

    step = perplexity.make_eval_step(loss, lambda batch: {"rows": batch["rows"].sum()}, np.zeros(1))
    ones = np.ones((1, 3), np.int32)
    batch = dict(rows=ones.astype(np.float32), unit=np.arange(1, 4, dtype=np.int32)[None], checksum=ones)
    found = perplexity.tally(step, {}, [batch, batch | {"unit": batch["unit"] + 3}], 6)
    assert not found.is_by_unit and found.figures()["loss"] == 3
    assert samples.of_losses(found).unit == "batches" and len(samples.of_losses(found).counts_NM) == 2


def test_windows_of_one_question_are_one_unit_and_windows_without_documents_are_units(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES["answer"]))
    task = bound("answer", file)
    source = [dict(where=where, ids=[1]) for where in ("a:1", "a:1", "a:2", "", "")]
    units = scoring.units_of(task, source, source)
    assert units.firsts.tolist() == [0, 0, 1, 2, 3] and units.count == 4
    run = text_run(tmp_path)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, document_mask=False))
    p = program.program(run, Bytes())
    held = scoring.HeldOut(p, corpus.corpus(run.data, p.objective, ("valid",)).valid)
    assert held.unit == "windows" and held.count == len(held.records[0])
