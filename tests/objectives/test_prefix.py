"""Prefix LM: each document is split once, its beginning is seen both ways and never learned, all the rest is."""

import dataclasses

import jax
import numpy as np
import pytest
from support.tiny_models import random_weights

from jaxlm.core import config
from jaxlm.data import packing
from jaxlm.models import MODELS, gpt2, llama
from jaxlm.nn import losses
from jaxlm.nn.layout import Layout
from jaxlm.nn.moe import Moe
from jaxlm.objectives import causal, prefix
from jaxlm.objectives.objective import RowShape

ROW = RowShape(0)  # windows have their length

TEXTS = ["def f(x):\n    return x\n", "Two children.", "a", "the dog waits in the park, and waits, and waits"]
SMALL = {
    "gpt2": gpt2.Config(vocab=400, layers=2, width=16, heads=2, positions=128),
    "llama": llama.Config(vocab=400, layers=2, width=16, heads=2, kv_heads=1, head_width=8, ffn=16),
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def window(corpus, sentencepiece):
    records = packing.packed(corpus(TEXTS, sentencepiece), 128)
    assert len(records) == 1
    return records[0]


def documents(record: dict) -> list[np.ndarray]:
    segments = record["segments"]
    return [np.flatnonzero(segments == s) for s in range(1, segments.max() + 1)]


def test_all_of_a_document_behind_its_prefix_is_learned_its_end_too(window, sentencepiece):
    plain = causal.example(causal.Config(), window, ROW, sentencepiece, rng())
    for seed in range(20):
        out = prefix.example(prefix.Config(), window, ROW, sentencepiece, rng(seed))
        for name in ("tokens", "targets", "segments", "positions"):
            np.testing.assert_array_equal(out[name], plain[name])
        for places in documents(window):
            before, learned = out["prefix"][places[:-1]], out["weights"][places[:-1]]
            n = int(before.sum())
            assert 1 <= n <= len(places) - 1 and before[:n].all(), "a prefix is the beginning, never the whole document"
            # The last token of the prefix predicts the first behind it; what it has seen is never a target.
            assert learned.tolist() == [0.0] * (n - 1) + [1.0] * (len(places) - n)
            assert out["targets"][places[-2]] == sentencepiece.eos_id and learned[-1] == 1


def test_every_length_of_a_prefix_is_equally_likely_and_drawn_anew(window, sentencepiece):
    places = documents(window)[1]
    lengths = [
        int(prefix.example(prefix.Config(), window, ROW, sentencepiece, rng(s))["prefix"][places[:-1]].sum())
        for s in range(2000)
    ]
    found, counts = np.unique(lengths, return_counts=True)
    assert found.tolist() == list(range(1, len(places)))
    np.testing.assert_allclose(counts / 2000, 1 / len(found), atol=0.03)


def test_a_document_of_one_token_is_neither_prefix_nor_target(sentencepiece):
    record = {"tokens": [3, 2, 9, 3, 0], "segments": [1, 2, 2, 2, 0], "positions": [0, 0, 1, 2, 0]}
    out = prefix.example(
        prefix.Config(), {k: np.array(v, np.int32) for k, v in record.items()}, ROW, sentencepiece, rng()
    )
    assert not out["prefix"][0] and out["weights"][0] == 0 and out["prefix"][1] and out["weights"][3] == 0


@pytest.mark.parametrize("name", SMALL)
def test_the_prefix_is_seen_both_ways_and_nothing_else_from_behind(name, model):
    net, weights = model(SMALL[name])
    T = 9
    segments = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2]], np.int32)
    before = np.array([[1, 1, 1, 0, 0, 0, 1, 1, 0]], bool)
    positions = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2]], np.int32)
    batch = dict(tokens=np.arange(T, dtype=np.int32)[None], segments=segments, prefix=before, positions=positions)

    def hidden(x_TD):
        return net.forward(weights | {"embed": x_TD}, batch).x_BTD[0]

    strength = np.abs(np.asarray(jax.jit(jax.jacrev(hidden))(weights["embed"][:T]))).max((1, 3))
    t = np.arange(T)
    seen = ((t[:, None] >= t) | before) & (segments == segments.T)
    assert (strength[~seen] == 0).all() and (strength[seen] > 1e-7).all()


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_packed_equals_unpacked(name, model, summed, window, sentencepiece):
    """The loss of a window is that of its documents, each in a row of its own."""
    net, weights = model(SMALL[name])
    c, rows = prefix.Config(z_loss=1e-3), []
    packed = prefix.example(c, window, ROW, sentencepiece, rng(3))
    for places in documents(window):
        row = {k: np.zeros_like(v) for k, v in packed.items()}
        for k in row:
            row[k][: len(places) - 1] = packed[k][places[:-1]]
        row["segments"] = np.minimum(row["segments"], 1)
        rows.append(row)
    alone, totals = summed(prefix.objective, c, net, weights, rows)
    together, total = summed(prefix.objective, c, net, weights, [packed], len(rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), alone, together)
    assert totals == total == {"tokens": packed["weights"].sum()}


def test_the_loss_is_that_of_the_plain_formula(model, window, sentencepiece):
    net, weights = model(SMALL["llama"])
    row = {k: v[None] for k, v in prefix.example(prefix.Config(), window, ROW, sentencepiece, rng(1)).items()}
    plain = lambda w, b: jax.nn.log_softmax(losses.logits(net.readout(w, net.forward(w, b).x_BTD), net.shard))  # noqa: E731
    z = np.asarray(jax.jit(plain)(weights, row))[0]
    nll = -z[np.arange(len(z)), row["targets"][0]] * row["weights"][0]
    found = jax.jit(lambda w, b: prefix.objective.loss(prefix.Config(), net, w, b, None)["tokens"]["nll"])(weights, row)
    np.testing.assert_allclose(found, nll.sum(), rtol=1e-5)


SIZES = dict(
    vocab=32, layers=2, width=16, heads=2, kv_heads=1, head_width=8, ffn=16, positions=8, moe=Moe(experts=4, ffn=16),
    dense=1, plain_width=4, rotated_width=4, value_width=4, latent=8, query_rank=None, score_width=8,
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name, family in MODELS.items() if family.kind == "decoder"])
def test_every_decoder_reads_the_prefix(name):
    """One that did not would train as a causal model, and nobody would notice: its first token sees the second."""
    family = MODELS[name]
    known = {f.name for f in dataclasses.fields(family.Config)}
    c = family.Config(**{field: size for field, size in SIZES.items() if field in known})
    specs = family.specs(c)
    shard = Layout(execution=config.Execution(dtype="float32", scan=True))
    given = np.array([True, True, False, False])
    batch = dict(
        tokens=np.array([[5, second, 7] for second in (3, 9, 3, 9)], np.int32), segments=np.ones((4, 3), np.int32),
        positions=np.tile(np.arange(3, dtype=np.int32), (4, 1)), prefix=np.stack([given, given, given < 0], 1),
    )  # fmt: skip
    forward = jax.jit(lambda w, b: family.forward(c, specs, w, b, shard=shard).x_BTD[:, 0])
    x_BD = np.asarray(forward(random_weights(specs), batch))
    assert np.abs(x_BD[0] - x_BD[1]).max() > 1e-4
    np.testing.assert_array_equal(x_BD[2], x_BD[3])
