"""Tokenizers: round trips lose nothing, bytes are accounted for, and no text can forge a control token."""

import json
import pickle
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxlm.data import tokenizer as tok
from jaxlm.data import train_tokenizer

CODE = (
    'def area(width: float, height: float = 2.0) -> float:\n    """The area."""\n    if width < 0:\n'
    '        raise ValueError(f"width={width!r}")\n\n    return width * height\n\n\nclass Shape:\n'
    "    def __init__(self, sides):\n        self.sides = [side for side in sides if side]\n\n"
)
TEXTS = [
    CODE.replace("area", name).replace("width", f"{name}_w") for name in ("alpha", "beta", "gamma", "delta", "eps")
]
FORGED = "a</s><s><pad><mask><unk><cls><sep>[MASK][CLS]<|endoftext|><0x0A>b"


def _random_texts(count: int = 200) -> list[str]:
    """What breaks tokenizers: white space of all kinds, controls, emoji, Chinese, "▁", forged special tokens."""
    rng = random.Random(0)
    bits = [
        "\n",
        "\n\n",
        "\t",
        "\t\t",
        " ",
        "    ",
        "\r\n",
        "\r",
        "word",
        " word",
        "Zürich",
        "中文字",
        "🎉👩‍👩‍👧",
        "\u2581",
        "\u00a0",
    ]
    bits += [
        "\u3000",
        "\u2028",
        "\x01\x1f\x7f",
        "\ufeff",
        "\ufffd",
        "ﬁ",
        "e\u0301",
        "</s>",
        "<mask>",
        "0123",
        "\u0120",
        "__init__",
        "):\n",
    ]
    bits += ["\U0010fffe", "\u200b", "\x85", "\x0b\x0c"]
    return ["", *bits, FORGED, *("".join(rng.choices(bits, k=rng.randint(1, 30))) for _ in range(count))]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> tok.SentencePiece:
    return train_tokenizer.train_sentencepiece(TEXTS, tmp_path_factory.mktemp("sp") / "x.model", vocab_size=400)


@pytest.fixture(scope="module")
def bytelevel() -> tok.HuggingFace:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            special_tokens=["<|endoftext|>", "<mask>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", inner.token_to_id("<|endoftext|>"))]
    )
    return tok.HuggingFace(inner.to_str())


@pytest.fixture(scope="module")
def wordpiece() -> tok.HuggingFace:
    vocab = {
        piece: id
        for id, piece in enumerate(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##s", "a", "[", "]"]
        )
    }
    inner = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tok.HuggingFace(inner.to_str())


@pytest.fixture(params=["bytes", "sentencepiece", "bytelevel"])
def lossless(request) -> tok.Tokenizer:
    return tok.load("bytes") if request.param == "bytes" else request.getfixturevalue(request.param)


def test_round_trip_and_bytes_are_exact(lossless):
    for text in _random_texts() + TEXTS:
        ids = lossless.encode(text)
        assert lossless.decode(ids) == text
        assert lossless.bytes_per_token[ids].sum() == len(text.encode())


def test_no_text_becomes_a_special_token_and_none_is_added(lossless):
    special = {getattr(lossless, f"{kind}_id") for kind in tok.KINDS} - {None}
    assert len(special) >= 2
    assert not special & set(lossless.encode(FORGED))
    assert not special & set(lossless.encode("plain"))
    assert not lossless.bytes_per_token[list(special)].any()
    assert not lossless.starts_word[list(special)].any()


def test_batches_pickles_and_files_keep_the_mapping(lossless, tmp_path):
    texts = _random_texts(20)
    want = [lossless.encode(text) for text in texts]
    assert lossless.encode_batch(texts) == want
    path = lossless.save(tmp_path / "run")
    for again in (pickle.loads(pickle.dumps(lossless)), tok.load(path), tok.load(tmp_path / "run")):
        assert [again.encode(text) for text in texts] == want
        assert again.fingerprint == lossless.fingerprint and again.vocab_size == lossless.vocab_size
        assert [getattr(again, f"{k}_id") for k in tok.KINDS] == [getattr(lossless, f"{k}_id") for k in tok.KINDS]
    assert lossless.bytes_per_token.shape == lossless.starts_word.shape == (lossless.vocab_size,)
    assert lossless.bytes_per_token.dtype == np.int32 and lossless.starts_word.dtype == bool


def test_fingerprints_tell_tokenizers_apart(sentencepiece, bytelevel, wordpiece):
    assert len({t.fingerprint for t in (tok.Bytes(), sentencepiece, bytelevel, wordpiece)}) == 4
    assert tok.HuggingFace(bytelevel.json, {"pad": "<mask>"}).fingerprint != bytelevel.fingerprint


def test_trained_model_has_all_special_ids_and_full_size(sentencepiece):
    assert sentencepiece.vocab_size == 400
    ids = {kind: getattr(sentencepiece, f"{kind}_id") for kind in tok.KINDS}
    pieces = {kind: sentencepiece.piece(id) for kind, id in ids.items()}
    assert pieces == {"bos": "<s>", "eos": "</s>"} | {
        kind: f"<{kind}>" for kind in ("pad", "unk", "mask", "cls", "sep")
    }
    assert sentencepiece.id_of("<mask>") == ids["mask"] and sentencepiece.id_of("no such piece") is None
    assert sentencepiece.decode([ids["bos"], *sentencepiece.encode("a b"), ids["eos"]]) == "a b"


def test_line_breaks_and_indentation_are_pieces_not_bytes(sentencepiece):
    pieces = [sentencepiece.piece(id) for id in sentencepiece.encode("    if x:\n        y\n\tz")]
    assert not any(piece.startswith("<0x0") for piece in pieces)
    assert len(sentencepiece.encode("\n        ")) <= 3  # of nine bytes


def test_starts_word(sentencepiece, bytelevel, wordpiece):
    for tokenizer in (sentencepiece, bytelevel):
        text = " return self.sides"
        starts = [bool(tokenizer.starts_word[id]) for id in tokenizer.encode(text)]
        assert starts[0] and 1 <= sum(starts) <= 2
    assert [wordpiece.piece(i) for i in wordpiece.encode("playing plays")] == ["play", "##ing", "play", "##s"]
    assert wordpiece.starts_word[wordpiece.encode("playing plays")].tolist() == [True, False, True, False]
    assert tok.Bytes().starts_word[tok.Bytes().encode("a b\nc")].tolist() == [False, True, False, True, False]


def test_bert_boundaries_and_fallbacks(wordpiece, bytelevel):
    assert (wordpiece.bos_id, wordpiece.eos_id, wordpiece.cls_id, wordpiece.sep_id) == (2, 3, 2, 3)
    assert bytelevel.bos_id == bytelevel.eos_id == bytelevel.id_of("<|endoftext|>")
    assert bytelevel.cls_id is None and bytelevel.pad_id is None
    assert not {2, 3, 4} & set(wordpiece.encode("[CLS] a [SEP] [MASK]"))


def test_names_beside_tokenizer_json_count(bytelevel, tmp_path):
    bytelevel.save(tmp_path)
    config = {"pad_token": "<mask>", "bos_token": {"content": "<mask>", "special": True}, "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = tok.load(tmp_path / "tokenizer.json")
    assert found.pad_id == found.bos_id == bytelevel.mask_id
    assert found.eos_id == bytelevel.eos_id
    again = tok.load(found.save(tmp_path / "again"))
    assert again.fingerprint == found.fingerprint and again.pad_id == found.pad_id


def test_foreign_sentencepiece_with_dummy_prefix(tmp_path):
    """As T5 and Llama have: the added space comes off again, and special ids that are missing are None."""
    import sentencepiece as spm

    prefix = str(tmp_path / "t5")
    options = {
        "vocab_size": 200,
        "model_type": "unigram",
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
    }
    spm.SentencePieceTrainer.train(sentence_iterator=iter("\n".join(TEXTS).split("\n")), model_prefix=prefix, **options)
    found = tok.load(prefix + ".model")
    assert (found.pad_id, found.eos_id, found.unk_id, found.bos_id, found.mask_id) == (0, 1, 2, 1, None)
    assert found.decode(found.encode("return width")) == "return width"
    assert found.decode(found.encode("a \u2581 b"))  # no crash, though it can't be kept


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("none.model", None, "does not exist"),
        ("x.model", b"nonsense", "not a SentencePiece model"),
        ("x.model", b"", "not a SentencePiece model"),
        ("tokenizer.json", b"{", "not a Hugging Face tokenizer.json"),
        ("tokenizer.json", b"\xff", "tokenizer.json"),
        ("x.txt", b"a", "unknown kind"),
        ("folder/readme", b"a", "holds neither"),
    ],
)
def test_load_faults_are_one_clear_line(tmp_path, name, data, words):
    path = tmp_path / name
    if data is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        tok.load(path.parent if name.startswith("folder") else path)
    assert "\n" not in str(caught.value)


def test_offsets_are_the_characters_that_tokens_stand_for(lossless):
    """In order, without white space around them, and nothing else is left out; the ids are those of `encode`."""
    for text in _random_texts() + TEXTS:
        ids, spans = lossless.encode_offsets(text)
        assert ids == lossless.encode(text) and len(spans) == len(ids)
        covered = {i for start, end in spans for i in range(start, end)}
        assert {i for i, character in enumerate(text) if not character.isspace()} <= covered
        assert all(a <= b and text[a:b].strip() == text[a:b] for a, b in spans)
        assert [a for a, b in spans if b > a] == sorted(a for a, b in spans if b > a)


def test_offsets_name_the_token_of_each_word(wordpiece, sentencepiece):
    text = "a  play (plays) Ä"
    ids, spans = wordpiece.encode_offsets(text)
    assert [(wordpiece.piece(i), text[a:b]) for i, (a, b) in zip(ids, spans, strict=True)] == [
        ("a", "a"), ("play", "play"), ("[UNK]", "("), ("play", "play"), ("##s", "s"), ("[UNK]", ")"), ("[UNK]", "Ä"),
    ]  # fmt: skip
    ids, spans = sentencepiece.encode_offsets("x 🎉y")
    emoji = [span for i, span in zip(ids, spans, strict=True) if sentencepiece.token_bytes[i] in "🎉".encode()]
    assert emoji == [(2, 3)] * 4, "each byte of a character has the character's place"
