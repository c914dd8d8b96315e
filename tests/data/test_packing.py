"""Packing: every token is a target once, no segment mixes documents, and pairs are half true."""

import sys

import numpy as np
import pytest

from jaxlm.data import packing, token_cache
from jaxlm.data.tokenizer import Bytes


def make_cache(folder, texts) -> token_cache.Cache:
    """A cache with these documents in this order."""
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:04}.txt").write_text(text)
    return token_cache.open_cache(token_cache.prepare(str(folder), Bytes(), folder / "root", workers=1)["train"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> token_cache.Cache:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh"), size)) for size in (1, 2, 3, 40, 5, 1, 1, 17, 100, 8, 2, 64)]
    return make_cache(tmp_path_factory.mktemp("packing") / "corpus", texts)


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 64, 243, 1000])
def test_every_token_is_a_target_exactly_once(corpus, seq_len, document_mask):
    records = packing.packed(corpus, seq_len, document_mask=document_mask)
    stream = np.asarray(corpus.tokens)
    targets = []
    for i in range(len(records)):
        record = records[i]
        assert {name: (leaf.shape, leaf.dtype) for name, leaf in record.items()} == dict.fromkeys(
            ("tokens", "segments", "positions"), ((seq_len + 1,), np.dtype(np.int32))
        )
        real = record["segments"] > 0
        assert record["tokens"][0] == stream[i * seq_len]
        assert real[: real.sum()].all() and (record["tokens"][~real] == Bytes().pad_id).all()
        targets.append(record["tokens"][1:][real[1:]])
    assert np.array_equal(np.concatenate(targets), stream[1:])
    assert all(len(t) == seq_len for t in targets[:-1]) and len(targets[-1])


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 64, 1000])
def test_segments_and_positions_follow_the_documents(corpus, seq_len):
    document_of = np.repeat(np.arange(len(corpus)), np.diff(corpus.offsets))
    records = packing.packed(corpus, seq_len)
    for i in range(len(records)):
        record = records[i]
        documents = document_of[i * seq_len : i * seq_len + seq_len + 1]
        want_segments = documents - documents[0] + 1
        want_positions = [k - int(np.argmax(documents == d)) for k, d in enumerate(documents)]
        count = len(documents)
        assert record["segments"][:count].tolist() == want_segments.tolist()
        assert record["positions"][:count].tolist() == want_positions
        assert not record["segments"][count:].any() and not record["positions"][count:].any()


def test_without_document_mask_a_window_is_one_segment(corpus):
    record = packing.packed(corpus, 32, document_mask=False)[1]
    assert (record["segments"] == 1).all() and record["positions"].tolist() == list(range(33))


def test_records_end(corpus):
    records = packing.packed(corpus, 16)
    with pytest.raises(IndexError):
        records[len(records)]
    with pytest.raises(ValueError, match="seq_len=0"):
        packing.packed(corpus, 0)


def test_pairs_follow_each_other_half_of_the_time(corpus):
    records = packing.pairs(corpus, 12)
    stream, rng, true = np.asarray(corpus.tokens), np.random.default_rng(1), 0
    documents = [corpus.document(i)[1:-1].tolist() for i in range(len(corpus))]

    def holders(part: list[int]) -> set[int]:
        return {
            n
            for n, d in enumerate(documents)
            if any(d[k : k + len(part)] == part for k in range(len(d) - len(part) + 1))
        }

    draws = [(i, records.draw(i, rng)) for _ in range(100) for i in range(len(records))]
    for _, pair in draws:
        first, second = pair["first"].tolist(), pair["second"].tolist()
        assert first and second and len(first) + len(second) <= 12
        assert max(first + second) < 256  # no special token
        assert holders(first) and holders(second)
        if pair["is_next"]:
            assert holders(first + second)
            true += 1
    assert stream.max() >= 256 and abs(true / len(draws) - 0.5) < 0.05
    assert {leaf.dtype for _, pair in draws for leaf in pair.values()} == {np.dtype(np.int32)}


def test_false_seconds_come_from_another_document(tmp_path):
    texts = ["a" * 40, "b" * 40, "c" * 3, "d"]
    records = packing.pairs(make_cache(tmp_path / "corpus", texts), 10)
    rng = np.random.default_rng(0)
    seen = set()
    for i in list(range(len(records))) * 30:
        pair = records.draw(i, rng)
        (first,), (second,) = set(pair["first"].tolist()), set(pair["second"].tolist())
        assert (first == second) == bool(pair["is_next"])
        seen.add(chr(second))
    assert seen == {"a", "b", "c"}  # one token can't be split in two


def test_stretches_cover_every_document(corpus):
    records = packing.pairs(corpus, 12)
    usable = [d for i in range(len(corpus)) if len(d := corpus.document(i)[1:-1]) > 1]
    assert len(records) == sum(-(-len(d) // 12) for d in usable)
    covered = np.concatenate(
        [np.concatenate([p["first"], p["second"]]) for p in map(_true_pair(records), range(len(records)))]
    )
    assert np.array_equal(covered, np.concatenate(usable))


def _true_pair(records):
    def draw(i):
        return next(p for s in range(100) if (p := records.draw(i, np.random.default_rng(s)))["is_next"])

    return draw


def test_pairs_are_drawn_anew_but_items_are_fixed(corpus):
    records = packing.pairs(corpus, 12, seed=3)

    def same(a, b) -> bool:
        return all(np.array_equal(a[name], b[name]) for name in a)

    long = len(records) - 1
    assert same(records[long], packing.pairs(corpus, 12, seed=3)[long])
    assert not all(same(records.draw(long, np.random.default_rng(s)), records[long]) for s in range(20))


def test_pairs_need_two_documents(tmp_path, corpus):
    with pytest.raises(ValueError, match="two documents"):
        packing.pairs(make_cache(tmp_path / "corpus", ["only one that can be split", "x"]), 12)
    with pytest.raises(ValueError, match="length=3"):
        packing.pairs(corpus, 3)


# --------------------------------------------------------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def paired(tmp_path_factory) -> tuple[token_cache.Cache, list[tuple[bytes, bytes]]]:
    rng = np.random.default_rng(1)
    word = lambda: "".join(rng.choice(list("abcdefgh"), rng.integers(1, 9))).encode()  # noqa: E731
    folder, texts = tmp_path_factory.mktemp("paired"), [(word(), word()) for _ in range(50)]
    for side, end in enumerate(("en", "de")):
        (folder / f"x.{end}").write_bytes(b"".join(pair[side] + b"\n" for pair in texts))
    made = token_cache.prepare(str(folder / "x"), Bytes(), folder / "root", field=("en", "de"), workers=1)
    return token_cache.open_cache(made["train"]), texts


@pytest.mark.parametrize("rooms", [(20, 20), (30, 12), (1000, 1000)])
@pytest.mark.parametrize("pack", [True, False])
def test_rows_hold_neighbouring_pairs_as_many_as_fit(paired, rooms, pack):
    held, texts = paired
    lengths = packing.text_lengths(held, Bytes().eos_id)
    assert lengths.tolist() == [[len(a), len(b)] for a, b in texts]
    takes = lengths + 2
    records = packing.texts(held, lengths, takes, rooms, pack=pack)
    seen = []
    for i in range(len(records)):
        record = records[i]
        used = (record["lengths"] + 2).sum(0)
        assert (used <= rooms).all() and (len(record["lengths"]) == 1 or pack)
        nearest = takes[len(seen) + len(record["lengths"]) :][:1]
        assert not pack or not len(nearest) or (used + nearest[0] > rooms).any(), "the next pair would have fitted"
        tokens = record["tokens"].tolist()
        for a, b in record["lengths"].tolist():
            (bos, *first), (eos, *second), end = tokens[: 1 + a], tokens[1 + a : 2 + a + b], tokens[2 + a + b]
            assert (bos, eos, end) == (Bytes().bos_id, Bytes().eos_id, Bytes().eos_id)
            seen.append((bytes(first), bytes(second)))
            tokens = tokens[3 + a + b :]
        assert not tokens
    assert seen == texts
    with pytest.raises(IndexError):
        records[len(records)]


def test_a_cache_of_plain_documents_holds_no_pairs(corpus):
    with pytest.raises(ValueError, match="holds no pairs of texts"):
        packing.text_lengths(corpus, Bytes().eos_id)


def test_rows_are_filled_and_nothing_is_lost():
    lengths = [5, 9, 3, 20, 1, 6, 4]
    rows = packing.first_fit(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(7))
    assert all(sum(min(lengths[i], 10) for i in row) <= 10 for row in rows)
    assert len(rows) == 4 and packing.first_fit(lengths, 10) == rows
    assert packing.first_fit([], 10) == [] and packing.first_fit([3], 10) == [[0]]


def test_texts_go_to_the_first_row_with_room_however_many_there_are():
    """20,000 texts would take 10 s and more if each looked at every row."""
    rng, lengths = np.random.default_rng(0), [0, 0, *np.random.default_rng(1).integers(1, 90, 300).tolist()]
    free: list[int] = []
    expected: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, left in enumerate(free) if left >= lengths[i]), len(free))
        if row == len(free):
            free, expected = [*free, 100], [*expected, []]
        free[row] -= lengths[i]
        expected[row].append(i)
    assert packing.first_fit(lengths, 100) == expected
    steps = 0

    def count(frame, event, arg):
        nonlocal steps
        steps += 1
        return count

    many = rng.integers(50, 100, 2000).tolist()  # each in a row of its own
    sys.settrace(count)
    try:
        packing.first_fit(many, 100)
    finally:
        sys.settrace(None)
    assert steps < 200 * len(many)


def test_texts_of_a_batch_are_laid_out_in_fewer_rows():
    rng = np.random.default_rng(0)
    lengths = np.array([[3, 8, 2, 5, 1, 0], [8, 8, 4, 4, 2, 6]])
    segments = (np.arange(8)[None, None] < lengths[..., None]).astype(np.int32)
    batch = dict(tokens=rng.integers(1, 99, (2, 6, 8)) * segments, segments=segments, weights=1.0 * segments)
    got = packing.pack_batch(batch)
    assert got["tokens"].shape == (2, 4, 8)
    for m in range(2):
        whole = [batch["tokens"][m, i, :n].tolist() for i, n in enumerate(lengths[m]) if n]
        found = [got["tokens"][m, r][got["segments"][m, r] == s].tolist() for r in range(4) for s in range(1, 9)]
        assert sorted(whole) == sorted(x for x in found if x)
    assert got["weights"].sum() == batch["weights"].sum()
    assert packing.pack_batch(batch, ways=8)["tokens"].shape == (2, 8, 8)
    assert packing.first_fit([4, 4, 4, 1, 1], 9, most=2) == [[0, 1], [2, 3], [4]]
    of_texts = dict(target=np.arange(24.0).reshape(2, 6, 2), at=np.full((2, 6), 1), rows=np.ones((2, 6)))
    wide = {name: np.pad(leaf, [(0, 0), (0, 0), (0, 16)]) for name, leaf in batch.items()}
    got = packing.pack_batch(wide | of_texts)
    assert got["target"].shape == (2, 2, 3, 2) and got["rows"].sum() == 12
    for m in range(2):
        for r, k in np.argwhere(got["rows"][m]):
            i = int(got["target"][m, r, k, 0]) // 2 - 6 * m
            mine = got["segments"][m, r] == k + 1
            assert got["tokens"][m, r][mine].tolist() == batch["tokens"][m, i, : lengths[m, i]].tolist()
            assert not mine.any() or got["at"][m, r, k] == 1 + mine.argmax()
    of_rows = {"target": np.zeros((2, 1, 8)), "at": np.zeros((2, 1, 8), np.int32), "rows": np.zeros((2, 1))}
    short = packing.trim_padding({k: v[:, 2:3] for k, v in batch.items()} | of_rows, multiple=4)
    assert {k: v.shape[2:] for k, v in short.items()} == {
        "tokens": (4,), "segments": (4,), "weights": (4,), "target": (8,), "at": (8,), "rows": (),
    }  # fmt: skip


def test_rows_are_shorter_where_that_saves_a_fifth_of_the_positions():
    def batch(lengths: list[int], T: int) -> dict[str, np.ndarray]:
        return dict(segments=(np.arange(T)[None, None] < np.array(lengths)[None, :, None]).astype(np.int32))

    shapes = {n: packing.pack_batch(batch([7] * n, 512))["segments"].shape[1:] for n in (1, 8, 32, 146)}
    assert shapes == {1: (1, 32), 8: (1, 64), 32: (1, 256), 146: (2, 512)}
    assert packing.pack_batch(batch([129], 512))["segments"].shape == (1, 1, 256), "a text is never cut"
    assert packing.pack_batch(batch([7] * 32, 512), ways=8)["segments"].shape == (1, 8, 32), "each of 8 devices has one"
