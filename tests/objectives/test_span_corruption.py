"""Span corruption: T5's lengths and its distribution, nothing lost, EOS learned and never taken out."""

import itertools
import types

import jax
import numpy as np
import pytest

from jaxlm.data import packing
from jaxlm.data.tokenizer import Bytes
from jaxlm.models import t5
from jaxlm.nn.losses import logits
from jaxlm.objectives import span_corruption as spans
from jaxlm.objectives.objective import RowShape

C = spans.Config()
SMALL = t5.Config(vocab=512, layers=1, width=16, heads=2, head_width=8, ffn=16)
TEXTS = [
    "def größe(x):\n    return x + 1\n" * 3,
    "Two children are climbing on the frame of a swing set in the park.",
    "a",
    "the dog waits in the park, naïve as ever, and waits, and waits",
]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def example(c: spans.Config, record: dict, tokens, seq_len: int, seed: int = 0) -> dict[str, np.ndarray]:
    return spans.example(c, record, RowShape(seq_len, "encoder_decoder"), tokens, rng(seed))


def mended(source: list[int], target: list[int], marks: list[int]) -> list[int]:
    """The text that source and target, both without EOS, were made of."""
    spans: dict[int, list[int]] = {}
    for i in target:
        if i in marks:
            assert i not in spans, "a sentinel marks one gap"
            spans[i] = []
        else:
            spans[next(reversed(spans))].append(i)
    assert [i for i in source if i in marks] == list(spans) == marks[: len(spans)], "gaps are marked in order"
    assert all(spans.values()), "no gap is empty"
    return [i for x in source for i in (spans[x] if x in marks else [x])]


def pieces(out: dict, side: str, segments: str) -> list[list[int]]:
    return [out[side][out[segments] == s].tolist() for s in range(1, out[segments].max(initial=0) + 1)]


# Source length → (raw length, targets), as the published code of T5 computes them for rate 0.15 and spans of 3.
@pytest.mark.parametrize(("seq_len", "raw", "targets"), [(512, 568, 114), (1024, 1137, 229), (128, 141, 29)])
def test_lengths_are_those_of_t5(seq_len, raw, targets):
    c = spans.Config(sentinels=200)
    assert spans.window(c, seq_len) == raw
    assert sum(spans.counts(c, raw)) + 1 == targets
    assert spans.target_positions(c, seq_len) == -(-targets // 8) * 8


@pytest.mark.parametrize(("rate", "span"), [(0.15, 3.0), (0.5, 3.0), (0.15, 1.0), (0.3, 8.0), (0.9, 4.0)])
@pytest.mark.parametrize("seq_len", [3, 4, 16, 63, 200])
def test_a_long_document_just_fills_its_row(rate, span, seq_len):
    c = spans.Config(rate=rate, span=span, sentinels=2000)
    n = spans.window(c, seq_len)
    size = lambda n: n - np.subtract(*spans.counts(c, n)) + 1  # noqa: E731
    assert size(n) <= seq_len < size(n + 1)
    text = np.arange(10_000, 10_000 + n)
    source, target = spans.corrupt(c, text, np.arange(2000)[::-1], rng())
    assert len(source) + 1 == size(n) and len(target) + 1 <= spans.target_positions(c, seq_len)
    assert mended(source.tolist(), target.tolist(), list(range(1999, -1, -1))) == text.tolist()


def test_the_random_segmentation_is_that_of_t5():
    """Of n tokens, `taken` in `spans` spans, every way to share both out is equally likely; text first, a span last."""

    def shares(n: int, k: int) -> list[tuple[int, ...]]:
        return [x for x in itertools.product(range(1, n + 1), repeat=k) if sum(x) == n]

    c, n = spans.Config(rate=0.4, span=2.0), 10
    taken, k = spans.counts(c, n)
    assert (taken, k) == (4, 2)
    expected = dict.fromkeys(itertools.product(shares(n - taken, k), shares(taken, k)), 0.0)
    assert len(expected) == 15
    marks, draws = np.array([99, 98]), 6000
    generator = rng()
    for _ in range(draws):
        source, target = (x.tolist() for x in spans.corrupt(c, np.arange(n), marks, generator))
        a, b = source.index(99), target.index(98)
        assert source[-1] == 98 and target[0] == 99
        expected[(a, len(source) - a - 2), (b - 1, len(target) - b - 1)] += 1 / draws
    np.testing.assert_allclose(list(expected.values()), 1 / 15, atol=0.015)


@pytest.mark.parametrize("kind", ["sentencepiece", "t5_like", "byte_level", "bytes"])
@pytest.mark.parametrize("document_mask", [True, False])
def test_nothing_is_lost_and_no_span_crosses_a_document(kind, document_mask, corpus, request):
    tokens = Bytes() if kind == "bytes" else request.getfixturevalue(kind)
    spans.check(C, tokens)
    cache = corpus(TEXTS, tokens)
    record = packing.packed(cache, spans.window(C, 300), document_mask=document_mask)[0]
    out = example(spans.Config(target_len=200), record, tokens, 300)
    marks = spans.sentinels(C, tokens).tolist()
    special = {tokens.bos_id, tokens.eos_id}
    texts = [[i for i in cache.document(d).tolist() if i not in special] for d in range(len(cache))]
    texts = [x for x in texts if len(x) > 1] if document_mask else [[i for x in texts for i in x]]
    sources, targets = pieces(out, "source", "source_segments"), pieces(out, "targets", "segments")
    assert len(sources) == len(targets) == len(texts)
    seen = []
    for source, target in zip(sources, targets, strict=True):
        for side in (source, target):
            assert side[-1] == tokens.eos_id and not special & set(side[:-1]), "one EOS, at the end; no BOS"
        seen.append(mended(source[:-1], target[:-1], marks))
        taken, k = spans.counts(C, len(seen[-1]))
        assert (len(source), len(target)) == (len(seen[-1]) - taken + k + 1, taken + k + 1)
    assert sorted(seen) == sorted(texts)


def test_all_targets_are_learned_padding_never_and_inputs_are_targets_shifted(corpus, t5_like):
    record = packing.packed(corpus(TEXTS, t5_like), spans.window(C, 200))[0]
    out = example(spans.Config(target_len=160), record, t5_like, 200, 1)
    np.testing.assert_array_equal(out["weights"], (out["segments"] > 0).astype(np.float32))
    assert (out["targets"][out["weights"] == 0] == t5_like.pad_id).all()
    inputs, targets = pieces(out, "tokens", "segments"), pieces(out, "targets", "segments")
    for row, target in zip(inputs, targets, strict=True):
        assert row == [t5_like.pad_id, *target[:-1]], "T5's targets begin after padding"
    assert sum(t.count(t5_like.eos_id) for t in targets) == len(targets) > 1
    for positions, segments in (("positions", "segments"), ("source_positions", "source_segments")):
        for s in range(1, out[segments].max() + 1):
            assert out[positions][out[segments] == s].tolist() == list(range((out[segments] == s).sum()))


@pytest.mark.parametrize("seq_len", [16, 48, 200])
def test_rows_have_one_shape_and_their_share_of_targets(seq_len, corpus, sentencepiece):
    record = packing.packed(corpus(TEXTS * 4, sentencepiece), spans.window(C, seq_len))
    size = spans.target_positions(C, seq_len)
    for i in range(len(record)):
        out = example(C, record[i], sentencepiece, seq_len, i)
        assert {k: v.shape for k, v in out.items()} == {
            k: (seq_len,) if k.startswith("source") else (size,) for k in out
        }
    long = {k: np.full(spans.window(C, seq_len) + 1, v, np.int32) for k, v in (("tokens", 50), ("segments", 1))}
    out = example(C, long, sentencepiece, seq_len)
    marks = spans.sentinels(C, sentencepiece)
    words = (out["weights"] > 0) & ~np.isin(out["targets"], [*marks, sentencepiece.eos_id])
    np.testing.assert_allclose(words.sum() / (len(long["tokens"]) - 1), 0.15, atol=0.5 / seq_len + 0.01)
    assert (out["source"] == sentencepiece.eos_id).sum() == 1


def test_documents_that_do_not_fit_are_drawn_anew(corpus, sentencepiece):
    """Many short documents need more targets than one long one; which are left out is chance, not place."""
    record = packing.packed(corpus([f"dogs {i}" for i in range(60)], sentencepiece), spans.window(C, 128))[0]
    kept = set()
    for seed in range(20):
        out = example(C, record, sentencepiece, 128, seed)
        assert out["segments"].max() == out["source_segments"].max() >= 5
        kept.add(out["targets"].tobytes())
    assert len(kept) == 20
    again = [example(C, record, sentencepiece, 128, 7) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *again)


def test_sentinels_are_the_tokenizers_or_rows_behind_it(t5_like, sentencepiece):
    named = spans.sentinels(C, t5_like).tolist()
    assert [t5_like.piece(i) for i in named[:2]] == ["<extra_id_0>", "<extra_id_1>"]
    assert spans.vocab_size(C, t5_like) == t5_like.vocab_size
    behind = spans.sentinels(spans.Config(sentinels=100), types.SimpleNamespace(vocab_size=32000, id_of=lambda _: None))
    assert (behind[0], behind[99]) == (32099, 32000), "where T5 has them beside its SentencePiece model"
    assert spans.vocab_size(C, sentencepiece) == sentencepiece.vocab_size + 100


def test_a_prompt_is_a_text_with_a_gap_at_its_end(t5_like):
    prompt, source = spans.prompt(C, "the dog", RowShape(24, "encoder_decoder"), t5_like)
    assert prompt == [t5_like.pad_id]
    assert source == [*t5_like.encode("the dog"), t5_like.id_of("<extra_id_0>"), t5_like.eos_id]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate": 0.0}, "objective.rate"),
        ({"rate": 1.0}, "objective.rate"),
        ({"span": 0.5}, "objective.span"),
        ({"sentinels": 0}, "objective.sentinels"),
        ({"sentinels": 101}, "has 100, not 101; set it to 100"),
        ({"decoder_start": "<nope>"}, "objective.decoder_start"),
    ],
)
def test_settings_that_will_not_do_are_refused(changes, words, t5_like):
    with pytest.raises(ValueError, match=words):
        spans.check(spans.Config(**changes), t5_like)
    spans.check(C, t5_like)


def test_rows_that_will_not_do_are_refused():
    for c, seq_len, words in (
        (C, 2, "train.seq_len: 2 is too short"),
        (spans.Config(sentinels=27), 512, "27 are too few for the gaps of train.seq_len 512"),
        (spans.Config(target_len=113), 512, "objective.target_len: 113 is below 114"),
    ):
        with pytest.raises(ValueError, match=words):
            spans.target_positions(c, seq_len)
    assert spans.target_positions(spans.Config(sentinels=28, target_len=114), 512) == 114


# --------------------------------------------------------------------------------------------------------- device half


@pytest.fixture
def packed(corpus, sentencepiece) -> dict[str, np.ndarray]:
    record = packing.packed(corpus(TEXTS, sentencepiece), spans.window(C, 200))[0]
    return example(spans.Config(target_len=96), record, sentencepiece, 200, 1)


def alone(packed: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Each text of a packed row in a row of its own."""
    rows = []
    for s in range(1, packed["segments"].max() + 1):
        row = {k: np.zeros_like(v) for k, v in packed.items()}
        for k in row:
            places = packed["source_segments" if k.startswith("source") else "segments"] == s
            row[k][: places.sum()] = packed[k][places]
        row["segments"], row["source_segments"] = (np.minimum(row[k], 1) for k in ("segments", "source_segments"))
        rows.append(row)
    return rows


def test_packed_equals_unpacked_and_any_split_of_a_batch(model, summed, packed):
    net, weights = model(SMALL)
    c = spans.Config(z_loss=1e-3, label_smoothing=0.1)
    rows = alone(packed)
    assert len(rows) == 3
    apart, totals = summed(spans.objective, c, net, weights, rows)
    together, total = summed(spans.objective, c, net, weights, [packed], len(rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), apart, together)
    assert totals == total == {"spans": packed["weights"].sum()}


def test_the_loss_is_that_of_the_plain_formula(model, packed):
    net, weights = model(SMALL)
    row = {k: v[None] for k, v in packed.items()}
    all_logits = jax.jit(lambda w, b: logits(net.readout(w, net.forward(w, b).x_BTD), net.shard))
    z = jax.nn.log_softmax(all_logits(weights, row))[0]
    nll = -(z[np.arange(len(z)), packed["targets"]] * packed["weights"]).sum()
    got = jax.jit(lambda w, b: spans.loss(C, net, w, b, None)["spans"]["nll"])(weights, row)
    np.testing.assert_allclose(got, nll, rtol=1e-5)
