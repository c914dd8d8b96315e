"""Pairs of texts: targets learned whole with their EOS, sources and padding never, whatever the model's kind."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.data import packing, token_cache
from jaxlm.data.tokenizer import Bytes, HuggingFace, post_processor
from jaxlm.models import bart, llama
from jaxlm.objectives import seq2seq
from jaxlm.objectives.objective import RowShape

C = seq2seq.Config()
PAIRS = [
    ("Two children wait.", "Zwei Kinder warten."),
    ("the dog", "der größte Hund im ganzen Park"),
    ("a", "b"),
    ("climbing on the frame of a swing set in the park", "klettern"),
    ("</s> is text here", "<s> too"),
]
SMALL = {
    "decoder": llama.Config(vocab=400, layers=1, width=16, heads=2, kv_heads=1, head_width=8, ffn=16),
    "encoder_decoder": bart.Config(vocab=400, layers=1, width=16, heads=2, ffn=16, positions=90),
}
MULTI30K = Path(__file__).parents[3] / "shared" / "data" / "multi30k"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def pairs(tmp_path):
    """A cache of pairs, in this order."""

    def make(texts, tokens) -> token_cache.Cache:
        file = tmp_path / f"pairs{len(list(tmp_path.iterdir()))}.jsonl"
        file.write_text("".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in texts))
        found = token_cache.prepare(str(file), tokens, tmp_path / "caches", field=seq2seq.fields(C), workers=1)
        return token_cache.open_cache(found["train"])

    return make


def examples(c, held, tokens, kind: str, seq_len: int, decoder_start=None) -> list[dict]:
    lengths = packing.text_lengths(held, tokens.eos_id)
    _, takes, rooms = seq2seq.fit(c, kind, seq_len, tokens, lengths)
    records = packing.texts(held, lengths, takes, rooms, pack=c.pack)
    row = RowShape(seq_len, kind, decoder_start)
    return [seq2seq.example(c, records[i], row, tokens, rng()) for i in range(len(records))]


def texts_of(out: dict, side: str, segments: str) -> list[list[int]]:
    return [out[side][out[segments] == s].tolist() for s in range(1, out[segments].max() + 1)]


@pytest.fixture(params=["sentencepiece", "t5_like", "byte_level", "bytes"])
def tokens(request):
    return Bytes() if request.param == "bytes" else request.getfixturevalue(request.param)


# ------------------------------------------------------------------------------------------------------ encoder-decoder


@pytest.mark.parametrize("pack", [True, False])
def test_an_encoder_decoder_reads_the_source_and_learns_the_target_and_its_end(pack, pairs, tokens):
    rows = examples(seq2seq.Config(pack=pack), pairs(PAIRS, tokens), tokens, "encoder_decoder", 120)
    assert len(rows) == len(PAIRS) or pack
    start, eos = seq2seq.start_id("", tokens), tokens.eos_id
    seen = []
    for out in rows:
        np.testing.assert_array_equal(out["weights"], (out["segments"] > 0).astype(np.float32))
        sources, targets = texts_of(out, "source", "source_segments"), texts_of(out, "targets", "segments")
        inputs = texts_of(out, "tokens", "segments")
        for source, target, shifted in zip(sources, targets, inputs, strict=True):
            assert shifted == [start, *target[:-1]]
            seen.append((source, target))
    # Exactly one EOS, at the end, and no BOS: not even where a text spells one.
    assert seen == [([*tokens.encode(a), eos], [*tokens.encode(b), eos]) for a, b in PAIRS]
    assert not any({tokens.bos_id, eos} & {*a[:-1], *b[:-1]} for a, b in seen)


def test_targets_begin_after_what_the_model_was_trained_with(t5_like, sentencepiece, byte_level):
    assert seq2seq.start_id("", t5_like) == t5_like.pad_id, "no BOS: T5 begins after padding"
    assert seq2seq.start_id("", sentencepiece) == sentencepiece.eos_id, "BART begins after </s>"
    assert seq2seq.start_id("", byte_level) == byte_level.eos_id, "no padding token either"
    assert seq2seq.start_id("", t5_like, 7) == 7, "the model's own word counts for more"
    assert seq2seq.start_id("<extra_id_3>", t5_like, 7) == t5_like.id_of("<extra_id_3>")


def around(before: list[str], after: list[str]) -> HuggingFace:
    """A tokenizer of letters that puts pieces around a text."""
    from tokenizers import AddedToken, Tokenizer, models

    special = ["<s>", "<pad>", "</s>", "<unk>", "en_XX", "ro_RO"]
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*special, *"bcd"])}, merges=[], unk_token="<unk>"))
    made.add_special_tokens([AddedToken(piece, special=True) for piece in special])
    values = json.loads(made.to_str())
    ids = [{piece: special.index(piece) for piece in pieces} for pieces in (before, after)]
    return HuggingFace(json.dumps(values | {"post_processor": post_processor(*ids)}), {"bos": "<s>", "eos": "</s>"})


# Labels and decoder inputs of `b` → `c d` by transformers 5.24: BartTokenizer, MBartTokenizer, MBart50Tokenizer, and
# `shift_tokens_right` of each model.
PUBLISHED = {
    "bart": (["<s>"], ["</s>"], "", "<s> b </s>", "<s> c d </s>", "</s> <s> c d"),
    "mbart": ([], ["</s>", "en_XX"], "ro_RO", "b </s> en_XX", "c d </s> ro_RO", "ro_RO c d </s>"),
    "mbart50": (["en_XX"], ["</s>"], "ro_RO", "en_XX b </s>", "ro_RO c d </s>", "</s> ro_RO c d"),
    "t5": ([], ["</s>"], "", "b </s>", "c d </s>", "</s> c d"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sources_and_targets_have_what_published_tokenizers_put_around_them(name, pairs):
    before, after, language, *expected = PUBLISHED[name]
    tokens, c = around(before, after), seq2seq.Config(target_language=language, target_len=6)
    (out,) = examples(c, pairs([("b", "cd")], tokens), tokens, "encoder_decoder", 8, 2)
    rows = (("source", "source_segments"), ("targets", "segments"), ("tokens", "segments"))
    assert [" ".join(map(tokens.piece, texts_of(out, *row)[0])) for row in rows] == expected
    prompt, source = seq2seq.prompt(c, "b", RowShape(8, "encoder_decoder", 2), tokens)
    assert out["tokens"][: len(prompt)].tolist() == prompt and " ".join(map(tokens.piece, source)) == expected[0]
    long, _, _ = seq2seq.fit(c, "encoder_decoder", 8, tokens, np.array([[99, 99]]))
    assert long.tolist() == [[8 - len(before) - len(after), 6 - len(before) - len(after)]]
    with pytest.raises(ValueError, match=r"^objective\.target_len: 2 leaves no room|^objective\.source_language: data"):
        if name == "t5":
            seq2seq.check(seq2seq.Config(source_language="en_XX"), tokens)
        seq2seq.fit(seq2seq.Config(target_len=2), "encoder_decoder", 8, around(["<s>"], ["</s>"]), np.array([[1, 1]]))


def test_a_vocabulary_without_a_letter_keeps_what_stands_around_a_text():
    assert around(["<s>"], ["</s>"]).boundary_ids == ([0], [2]), "it has no a"
    assert around(["<s>"], ["</s>", "en_XX"]).boundary_ids == ([0], [2, 4])


def test_padding_is_never_learned_though_it_may_be_eos(pairs, byte_level):
    """Where padding and EOS share an id, masking by id would unlearn the end of every text."""
    assert byte_level.pad_id is None
    (out,) = examples(C, pairs(PAIRS, byte_level), byte_level, "encoder_decoder", 200)
    learned = out["targets"][out["weights"] > 0].tolist()
    assert learned.count(byte_level.eos_id) == len(PAIRS) and out["weights"].sum() < 200


# -------------------------------------------------------------------------------------------------------------- decoder


@pytest.mark.parametrize("pack", [True, False])
def test_a_decoder_reads_both_and_learns_the_target_alone(pack, pairs, tokens):
    rows = examples(seq2seq.Config(pack=pack), pairs(PAIRS, tokens), tokens, "decoder", 120)
    bos, eos, middle = tokens.bos_id, tokens.eos_id, seq2seq.separator(C, tokens)
    seen = []
    for out in rows:
        whole = np.append(out["tokens"], out["targets"][-1])
        for s in range(1, out["segments"].max() + 1):
            places = np.flatnonzero(out["segments"] == s)
            if out["weights"][-1] and places[-1] == len(out["tokens"]) - 1:
                places = np.append(places, len(out["tokens"]))
            ids = whole[places].tolist()
            learned = out["targets"][places[:-1]][out["weights"][places[:-1]] > 0].tolist()
            seen.append((ids, learned))
    expected = [([bos, *tokens.encode(a), middle, *tokens.encode(b), eos], [*tokens.encode(b), eos]) for a, b in PAIRS]
    # A segment's own last place predicts nothing, or it would learn its neighbour's BOS.
    assert [(ids if ids[-1] == eos else [*ids, eos], learned) for ids, learned in seen] == expected
    assert sum(out["weights"].sum() for out in rows) == sum(len(tokens.encode(b)) + 1 for _, b in PAIRS)


def test_a_prompt_is_what_training_showed(pairs, sentencepiece):
    (a, _), eos = PAIRS[0], sentencepiece.eos_id
    (out, *_) = examples(seq2seq.Config(pack=False), pairs(PAIRS, sentencepiece), sentencepiece, "decoder", 120)
    prompt, source = seq2seq.prompt(C, a, RowShape(120), sentencepiece)
    assert source is None
    assert out["tokens"][: len(prompt)].tolist() == prompt and out["weights"][len(prompt) - 1] == 1
    assert not out["weights"][: len(prompt) - 1].any()
    assert seq2seq.prompt(C, a, RowShape(120, "encoder_decoder"), sentencepiece) == (
        [eos],
        [*sentencepiece.encode(a), eos],
    )


@pytest.mark.parametrize("kind", SMALL)
def test_packed_equals_unpacked_and_any_split_of_a_batch(kind, model, summed, pairs, sentencepiece):
    net, weights = model(SMALL[kind])
    assert net.family.kind == kind
    held = pairs(PAIRS, sentencepiece)
    packed = examples(C, held, sentencepiece, kind, 90)
    single = examples(seq2seq.Config(pack=False), held, sentencepiece, kind, 90)
    assert len(packed) < len(single) == len(PAIRS)
    together, totals = summed(seq2seq.objective, C, net, weights, packed, len(single))
    alone, total = summed(seq2seq.objective, C, net, weights, single)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), together, alone)
    assert totals == total


# ------------------------------------------------------------------------------------------------------ what fits a row


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder"])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("seq_len", [4, 9, 16, 33])
def test_a_text_that_is_too_long_loses_its_end_but_not_its_eos(kind, pack, seq_len, pairs, sentencepiece):
    rows = examples(seq2seq.Config(pack=pack), pairs(PAIRS, sentencepiece), sentencepiece, kind, seq_len)
    encode, eos = sentencepiece.encode, sentencepiece.eos_id
    learned = [out["targets"][out["weights"] > 0].tolist() for out in rows]
    found, flat = [], [i for row in learned for i in row]
    while flat:
        end = flat.index(eos) + 1
        found.append(flat[:end])
        flat = flat[end:]
    assert len(found) == len(PAIRS)
    for target, (_, b) in zip(found, PAIRS, strict=True):
        assert target[-1] == eos and target[:-1] == encode(b)[: len(target) - 1] and len(target) > 1
    assert all(v.shape == (seq_len,) for out in rows for v in out.values())


def test_in_a_decoders_row_each_text_may_have_half():
    lengths = np.array([[3, 4], [50, 4], [4, 50], [50, 50], [10, 12]])
    kept, takes, rooms = seq2seq.fit(C, "decoder", 22, Bytes(), lengths)  # 23 tokens: 20 beside BOS, separator and EOS
    assert kept.tolist() == [[3, 4], [16, 4], [4, 16], [10, 10], [10, 10]]
    odd, _, _ = seq2seq.fit(C, "decoder", 21, Bytes(), lengths)
    assert odd.tolist()[1:] == [[15, 4], [4, 15], [10, 9], [10, 9]]
    assert rooms == (23, 1) and takes[:, 0].tolist() == [10, 23, 23, 23, 23] and not takes[:, 1].any()


def test_targets_may_have_a_shorter_row_than_sources(pairs, sentencepiece):
    (out, *_) = examples(
        seq2seq.Config(target_len=24), pairs(PAIRS, sentencepiece), sentencepiece, "encoder_decoder", 96
    )
    assert {k: v.shape for k, v in out.items()} == {k: (96,) if k.startswith("source") else (24,) for k in out}
    for c, kind, words in (
        (seq2seq.Config(target_len=24), "decoder", "a decoder's row holds both"),
        (seq2seq.Config(target_len=1), "encoder_decoder", "objective.target_len: 1"),
    ):
        with pytest.raises(ValueError, match=words):
            seq2seq.fit(c, kind, 96, Bytes(), np.array([[1, 1]]))


@pytest.mark.parametrize("changes", [{"separator": "<nope>"}, {"decoder_start": "<nope>"}, {"target": "source"}])
def test_settings_that_will_not_do_are_refused(changes, sentencepiece):
    with pytest.raises(ValueError, match=r"^objective\."):
        seq2seq.check(seq2seq.Config(**changes), sentencepiece)
    seq2seq.check(C, sentencepiece)


# ---------------------------------------------------------------------------------------------------------- real pairs


@pytest.mark.skipif(not MULTI30K.is_dir(), reason=f"no {MULTI30K}: the Multi30k slice is not tested")
def test_multi30k(tmp_path, sentencepiece):
    """A slice of English and German captions, from the two files it is published as."""
    lines = {end: (MULTI30K / f"val.{end}").read_text().split("\n")[:100] for end in ("en", "de")}
    for end, texts in lines.items():
        (tmp_path / f"val.{end}").write_text("\n".join(texts) + "\n")
    c = seq2seq.Config(source="en", target="de")
    found = token_cache.prepare(
        str(tmp_path / "val"), sentencepiece, tmp_path / "caches", field=seq2seq.fields(c), workers=1
    )
    held = token_cache.open_cache(found["train"])
    assert len(held) == 100 and held.raw_bytes.sum() == sum(len(x.encode()) for texts in lines.values() for x in texts)
    rows = examples(c, held, sentencepiece, "encoder_decoder", 256)
    decode = lambda ids: sentencepiece.decode(ids[:-1])  # noqa: E731
    seen = [
        (decode(a), decode(b))
        for out in rows
        for a, b in zip(texts_of(out, "source", "source_segments"), texts_of(out, "targets", "segments"), strict=True)
    ]
    assert seen == list(zip(lines["en"], lines["de"], strict=True))
    filled = np.mean([np.count_nonzero(out["segments"]) / 256 for out in rows])
    assert len(rows) < 60 and filled > 0.6, "rows are filled with several pairs each"
