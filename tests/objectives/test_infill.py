"""Filling in the middle: no text is lost or invented, each document stays itself, and every middle ends."""

import itertools

import jax
import numpy as np
import pytest

from jaxlm.data import packing
from jaxlm.data.tokenizer import Bytes
from jaxlm.models import llama
from jaxlm.objectives import causal, infill
from jaxlm.objectives.objective import RowShape

ROW = RowShape(0)  # windows have their length
NAMED = infill.Config(sentinels=("<cls>", "<sep>", "<mask>"))
TEXTS = ["def größe(x):\n    return x + 1\n", "Two children wait.", "a", "the dog «waits» in the park, naïve as ever"]
SMALL = llama.Config(vocab=400, layers=1, width=16, heads=2, kv_heads=1, head_width=8, ffn=16)


def config(**changes) -> infill.Config:
    return infill.Config(**{"rate": 1.0, "sentinels": NAMED.sentinels} | changes)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def whole(out: dict) -> dict[str, np.ndarray]:
    """The row of T + 1 tokens that an example was cut from, up to its padding."""
    tokens = np.append(out["tokens"], out["targets"][-1])
    n = int((out["segments"] > 0).sum()) + int(out["weights"][-1])
    return dict(tokens=tokens[:n], segments=np.append(out["segments"], out["segments"][-1])[:n])


def parts(ids: list[int], marks: tuple[int, int, int], eos: int, tokens) -> tuple[str, list[list[int]]]:
    """(order, [prefix, suffix, middle]) of a rearranged document without its BOS; SPM: [suffix, prefix + middle]."""
    before, after, middle = marks
    assert ids[0] == before and ids[-1] == eos and ids.count(eos) == 1, "each rearranged document ends with EOS, once"
    assert [ids.count(m) for m in marks] == [1, 1, 1]
    i, j = ids.index(after), ids.index(middle)
    assert 0 < i < j
    order = "spm" if i == 1 else "psm"
    return order, [ids[1:i], ids[i + 1 : j], ids[j + 1 : -1]]


def restored(ids: list[int], marks, eos: int, tokens) -> set[str]:
    """Texts that a rearranged document may have been."""
    order, (first, suffix, last) = parts(ids, marks, eos, tokens)
    join = lambda *x: tokens.decode([i for part in x for i in part])  # noqa: E731
    texts = {join(first, last, suffix)}
    assert first == [] or order == "psm"
    return texts


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level", "bytes"])
@pytest.mark.parametrize("split", ["character", "token"])
def test_documents_are_rearranged_each_within_itself_and_come_back_whole(kind, split, corpus, request):
    tokens = Bytes() if kind == "bytes" else request.getfixturevalue(kind)
    c = infill.Config(rate=1.0, split=split, sentinels=() if kind == "byte_level" else NAMED.sentinels)
    infill.check(c, tokens)
    window = packing.packed(corpus(TEXTS, tokens), 300)[0]
    marks, bos, eos = infill.marks(c, tokens), tokens.bos_id, tokens.eos_id
    orders = set()
    for seed in range(20):
        row = whole(infill.example(c, window, ROW, tokens, rng(seed)))
        seen = []
        for s in range(1, row["segments"].max() + 1):
            ids = row["tokens"][row["segments"] == s].tolist()
            assert ids[0] == bos and ids[1] != bos, "one BOS, first"
            if ids[1] != marks[0]:  # nothing to rearrange
                seen.append(tokens.decode(ids[1:-1]))
                continue
            orders.add(parts(ids[1:], marks, eos, tokens)[0])
            seen += restored(ids[1:], marks, eos, tokens)
        assert seen == TEXTS
    assert orders == {"psm", "spm"}


def test_every_token_is_learned_but_the_first_of_each_document(corpus, sentencepiece):
    window = packing.packed(corpus(TEXTS, sentencepiece), 200)[0]
    out = infill.example(config(), window, ROW, sentencepiece, rng())
    real = out["segments"] > 0
    same = np.append(out["segments"][1:] == out["segments"][:-1], False)
    np.testing.assert_array_equal(out["weights"], (real & same).astype(np.float32))
    learned = out["targets"][out["weights"] > 0].tolist()
    assert learned.count(sentencepiece.eos_id) == len(TEXTS), "EOS is learned, once a document"
    assert set(infill.marks(config(), sentencepiece)) <= set(learned)
    for s in range(1, out["segments"].max() + 1):
        assert out["positions"][out["segments"] == s].tolist() == list(range((out["segments"] == s).sum()))


def test_shares_of_rearranged_documents_and_of_their_orders(corpus, sentencepiece):
    window = packing.packed(corpus([TEXTS[3] * 6], sentencepiece), 200)[0]
    c, marks = config(rate=0.6, spm=0.25), infill.marks(config(), sentencepiece)
    rows = [whole(infill.example(c, window, ROW, sentencepiece, rng(s)))["tokens"].tolist() for s in range(800)]
    changed = [r for r in rows if marks[0] in r]
    orders = [parts(r[1:], marks, sentencepiece.eos_id, sentencepiece)[0] for r in changed]
    np.testing.assert_allclose([len(changed) / 800, orders.count("spm") / len(orders)], [0.6, 0.25], atol=0.06)
    untouched = infill.example(config(rate=0.0), window, ROW, sentencepiece, rng())
    plain = causal.example(causal.Config(), window, ROW, sentencepiece, rng())
    jax.tree.map(np.testing.assert_array_equal, untouched, plain)


def test_cuts_fall_between_any_two_characters_alike(corpus, sentencepiece):
    """Inside words too, so that a model can go on after half of one; both cuts are uniform."""
    text = "climbing on"
    window = packing.packed(corpus([text], sentencepiece), 64)[0]
    marks, n = infill.marks(config(), sentencepiece), len(text)
    expected = np.zeros((n + 1, n + 1))
    for a, b in itertools.product(range(n + 1), repeat=2):
        expected[min(a, b), max(a, b)] += 1 / (n + 1) ** 2
    found = np.zeros_like(expected)
    for seed in range(2000):
        row = whole(infill.example(config(spm=0.0), window, ROW, sentencepiece, rng(seed)))["tokens"].tolist()
        _, (prefix, _, middle) = parts(row[1:], marks, sentencepiece.eos_id, sentencepiece)
        a, b = len(sentencepiece.decode(prefix)), len(sentencepiece.decode(middle))
        found[a, a + b] += 1 / 2000
    assert np.abs(found - expected).sum() < 0.3


@pytest.mark.parametrize("split", ["character", "token"])
@pytest.mark.parametrize("length", [8, 16, 40, 97])
def test_a_full_row_never_loses_a_middle_or_its_end(split, length, corpus, sentencepiece):
    """What a sentinel needs is cut off the suffix's end, then the prefix's start; and rows keep their length."""
    text = "".join(f"{i} children are climbing on the frame {i * i}; " for i in range(40))
    records = packing.packed(corpus([text, "Two children."], sentencepiece), length)
    c, marks = config(split=split), infill.marks(config(), sentencepiece)
    changed = 0
    for i, seed in itertools.product(range(len(records)), range(5)):
        record = records[i]
        out = infill.example(c, record, ROW, sentencepiece, rng(seed))
        assert {k: v.shape for k, v in out.items()} == dict.fromkeys(out, (length,))
        row = whole(out)
        for s in range(1, row["segments"].max() + 1):
            ids = [i for i in row["tokens"][row["segments"] == s].tolist() if i != sentencepiece.bos_id]
            if marks[0] not in ids:
                continue
            changed += 1
            _, (prefix, suffix, middle) = parts(ids, marks, sentencepiece.eos_id, sentencepiece)
            source = sentencepiece.decode(record["tokens"][record["segments"] == s])
            kept = sentencepiece.decode([*prefix, *middle, *suffix])
            assert kept in source, "what is left is one stretch of the text"
            if len(kept) < len(source) and suffix:
                assert source.startswith(kept), "the end of the suffix goes first"
    assert changed > len(records)


def test_a_window_that_cuts_a_character_keeps_its_bytes(corpus):
    tokens, text = Bytes(), "größe «Δ»" * 6
    stream = text.encode()
    records = packing.packed(corpus([text], tokens), 17)
    for i, seed in itertools.product(range(1, len(records) - 1), range(20)):
        record = records[i]
        row = whole(infill.example(config(spm=0.0), record, ROW, tokens, rng(seed)))["tokens"].tolist()
        if TOKEN_OF[0] not in row:
            continue
        _, (prefix, suffix, middle) = parts(row, TOKEN_OF, tokens.eos_id, tokens)
        assert bytes([*prefix, *middle, *suffix]) in stream


TOKEN_OF = infill.marks(NAMED, Bytes())


def test_without_document_mask_each_document_is_still_rearranged_alone(corpus, sentencepiece):
    window = packing.packed(corpus(TEXTS, sentencepiece), 300, document_mask=False)[0]
    row = whole(infill.example(config(), window, ROW, sentencepiece, rng(1)))
    assert row["segments"].tolist() == [1] * len(row["tokens"])
    ids, bos, eos = row["tokens"].tolist(), sentencepiece.bos_id, sentencepiece.eos_id
    starts = [i for i, x in enumerate(ids) if x == bos]
    marks, seen = infill.marks(config(), sentencepiece), []
    for a, b in itertools.pairwise([*starts, len(ids)]):
        one = ids[a + 1 : b]
        seen += restored(one, marks, eos, sentencepiece) if one[0] == marks[0] else [sentencepiece.decode(one)]
    assert seen == TEXTS


def test_it_repeats_with_its_generator_and_leaves_the_record_alone(corpus, sentencepiece):
    record = packing.packed(corpus(TEXTS, sentencepiece), 100)[0]
    before = {k: v.copy() for k, v in record.items()}
    a, b, again = (infill.example(config(), record, ROW, sentencepiece, rng(s)) for s in (0, 1, 0))
    jax.tree.map(np.testing.assert_array_equal, record, before)
    jax.tree.map(np.testing.assert_array_equal, a, again)
    assert not np.array_equal(a["tokens"], b["tokens"])


def test_a_prompt_is_what_training_showed(sentencepiece):
    before, after, middle = infill.marks(NAMED, sentencepiece)
    ids = infill.gap(NAMED, sentencepiece, "def f(", "return x")
    encode = sentencepiece.encode
    assert ids == [sentencepiece.bos_id, before, *encode("def f("), after, *encode("return x"), middle]


def test_a_tokenizer_or_setting_that_will_not_do_is_refused_with_the_remedy(sentencepiece, t5_like, byte_level):
    infill.check(infill.Config(), byte_level)
    assert infill.marks(infill.Config(), byte_level) == tuple(
        byte_level.id_of(f"<|fim_{name}|>") for name in ("prefix", "suffix", "middle")
    )
    dummy = infill.Config(sentinels=("<extra_id_0>", "<extra_id_1>", "<extra_id_2>"))
    for c, tokens, words in (
        (infill.Config(), sentencepiece, "name three pieces that text never holds"),
        (infill.Config(sentinels=("<cls>", "<sep>", "<nope>")), sentencepiece, "not three pieces"),
        (infill.Config(sentinels=("<cls>", "<sep>", "<sep>")), sentencepiece, "not three pieces"),
        (infill.Config(sentinels=("<cls>", "<sep>")), sentencepiece, "not three pieces"),
        (infill.Config(rate=1.5), byte_level, "objective.rate: 1.5"),
        (dummy, t5_like, "set objective.split to token"),
    ):
        with pytest.raises(ValueError, match=words):
            infill.check(c, tokens)
    infill.check(infill.Config(split="token", sentinels=dummy.sentinels), t5_like)


def test_packed_equals_unpacked(model, summed, corpus, sentencepiece):
    net, weights = model(SMALL)
    packed = infill.example(config(), packing.packed(corpus(TEXTS, sentencepiece), 160)[0], ROW, sentencepiece, rng(2))
    rows = []
    for s in range(1, packed["segments"].max() + 1):
        places = np.flatnonzero(packed["segments"] == s)
        row = {k: np.zeros_like(v) for k, v in packed.items()}
        for k in row:
            row[k][: len(places)] = packed[k][places]
        row["segments"] = np.minimum(row["segments"], 1)
        rows.append(row)
    alone, totals = summed(infill.objective, config(), net, weights, rows)
    together, total = summed(infill.objective, config(), net, weights, [packed], len(rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), alone, together)
    assert totals == total
