"""Text that goes on from another: its spaces stay, its characters are whole, and constraints see the text itself."""

import json
import random
import re

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from jaxlm.data import tokenizer as tok
from jaxlm.data import train_tokenizer
from jaxlm.inference import constrain, stream
from jaxlm.inference.sampling import Sampling

TEXTS = ["The cat sat on the mat: yes or no?", "Who returns? A dog said 12, 345.", 'x = {"name": "Jo", "n": 7}\n'] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KINDS = ["legacy", "first", "always", "bytelevel", "bytes", "sentencepiece", "dummy_prefix"]


def llama_like(kind: str) -> tok.HuggingFace:
    """As Llama 2's: `legacy` puts a space before every stretch of text, `first` before a text, `always` before words
    that begin one."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first" if kind == "first" else "always")
    inner.pre_tokenizer = metaspace
    inner.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False),
    )
    if kind == "legacy":
        inner.pre_tokenizer = None
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    inner.add_special_tokens([AddedToken("<|user|>", special=True)])
    values = json.loads(inner.to_str())  # its bytes are pieces like others
    values["added_tokens"] = [piece for piece in values["added_tokens"] if piece["content"] not in BYTES]
    return tok.HuggingFace(json.dumps(values))


@pytest.fixture(scope="module")
def tokens(request, tmp_path_factory) -> tok.Tokenizer:
    kind, file = request.param, tmp_path_factory.mktemp("sp") / "x.model"
    if kind == "bytes":
        return tok.Bytes()
    if kind == "sentencepiece":
        return train_tokenizer.train_sentencepiece(TEXTS, file, vocab_size=320)
    if kind == "dummy_prefix":
        import sentencepiece as spm

        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_prefix=str(file.with_suffix("")), vocab_size=340, minloglevel=2,
            model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        )  # fmt: skip
        return tok.load(file)
    if kind == "bytelevel":
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<s>", "</s>", "<|user|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        )
        inner.train_from_iterator(TEXTS, trainer)
        return tok.HuggingFace(inner.to_str())
    return llama_like(kind)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"const": "Jo"}},
    "required": ["name"],
    "additionalProperties": False,
}
WHOLE = [
    "The cat sat on the mat",
    "A dog said 12, 345.",
    "naïve 世界 🎉 yes",
    'x = {"n": 7}',
    "世界世界世界世界世界世界!",
]


@pytest.mark.parametrize("tokens", KINDS, indirect=True)
def test_the_parts_of_a_text_make_the_text(tokens):
    for text in WHOLE:
        ids = [tokens.bos_id, *tokens.encode(text)]
        for cut in range(1, len(ids) + 1):
            known = tokens.decode(ids[:cut]).rstrip(tok.UNFINISHED)
            assert known + tok.decode_after(tokens, ids[:cut], ids[cut:]) == text
        # SentencePiece drops spaces at the end of a text, which nothing can bring back.
        for at in (at for at in range(len(text) + 1) if tokens.decode(tokens.encode(text[:at])) == text[:at]):
            parts = [*tokens.encode(text[:at]), *(tok.encode_after(tokens, text[at:]) if at else tokens.encode(text))]
            assert tokens.decode(parts) == text


@pytest.mark.parametrize("tokens", KINDS, indirect=True)
def test_stop_texts_with_a_space_are_found(tokens):
    before, new = tokens.encode("The cat"), tokens.encode("The cat sat on")
    new = new[len(before) :]
    reader = stream.Reader(tokens, [" on"], before)
    assert reader.read(new, True) == " sat" and reader.num_used is not None


@pytest.mark.parametrize(
    ("tokens", "text"), [("legacy", "sat"), ("always", "sat"), ("first", " sat")], indirect=["tokens"]
)
def test_a_text_begins_anew_after_a_special_token_as_the_tokenizer_has_it(tokens, text):
    before = tokens.encode_special("The cat<|user|>")
    new = tokens.encode("sat")
    assert tokens.token_bytes[new[0]][:1] == b" "
    assert tok.decode_after(tokens, before, new) == text


@pytest.mark.parametrize("tokens", [*KINDS], indirect=True)
@pytest.mark.parametrize("before", ["", "The cat said "], ids=["alone", "after"])
@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("regex", "(yes|no), [0-9]{1,3}( é|!)+"),
        ("regex", "12 returns|The cat sat"),
        ("json_schema", json.dumps(SCHEMA)),
    ],
)
def test_whatever_a_grammar_allows_matches(tokens, before, name, pattern):
    pytest.importorskip("llguidance")
    s, end = Sampling(**{name: pattern}), tokens.eos_id
    grammar = constrain.open_grammar(tokens, s, tokens.vocab_size, (end,))
    prompt = [tokens.bos_id, *tokens.encode(before)]
    for seed in range(6):
        rng, ids = random.Random(seed), []
        matcher = grammar.start(after_text=bool(tokens.decode(tok.context(tokens, prompt))))
        while not matcher.ended and len(ids) < 60:
            allowed = [int(i) for i in matcher.allowed().nonzero()[0]]
            if end in allowed:
                break
            ids.append(rng.choice(allowed))
            matcher.take(ids[-1])
        text = tok.decode_after(tokens, prompt, ids)
        if name == "json_schema":
            assert len(ids) == 60 or json.loads(text) == {"name": "Jo"}, text
        else:
            assert re.fullmatch(pattern, text) or len(ids) == 60, text


@pytest.mark.parametrize("tokens", KINDS, indirect=True)
def test_a_grammar_allows_the_tokens_that_the_tokenizer_makes_of_a_text(tokens):
    """With the space that it puts before a text that stands alone, and without that after another one."""
    pytest.importorskip("llguidance")
    s, text = Sampling(regex="(The|A) cat sat on the mat: (yes|no)"), "The cat sat on the mat: no"
    grammar = constrain.open_grammar(tokens, s, tokens.vocab_size, (tokens.eos_id,))
    for after_text, ids in ((False, tokens.encode(text)), (True, tok.encode_after(tokens, text))):
        matcher = grammar.start(after_text=after_text)
        for id in ids:
            assert matcher.allowed()[id], (after_text, tokens.piece(id))
            matcher.take(id)
        assert matcher.allowed()[tokens.eos_id]
