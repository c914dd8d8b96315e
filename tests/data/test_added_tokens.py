"""Added tokens take spaces and stand for words as the library of Hugging Face has it, wherever a file says so."""

import itertools
import json

import numpy as np
import pytest

from jaxlm.data import tokenizer as tokenizers
from jaxlm.data import train_tokenizer

library = pytest.importorskip("tokenizers")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SETTINGS = [dict(zip(FLAGS, values, strict=True)) for values in itertools.product((False, True), repeat=5)]
HARD = [" ", "  ", "\n", "\t", "\u00a0", "\u3000", "a", "B", "_", "9", "é", "e\u0301", "漢", "😀", ".", "<", ""]


def vocabulary(normalizer: bool = True) -> dict:
    """A tokenizer.json of single bytes, which lower-cases text."""
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    if normalizer:
        made.normalizer = library.normalizers.Lowercase()
    letters = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    return json.loads(made.to_str()) | {
        "model": json.loads(made.to_str())["model"] | {"vocab": {letter: i for i, letter in enumerate(letters)}}
    }


def added(seed: int) -> list[dict]:
    """Tokens with every combination of flags; some are parts of others."""
    order = np.random.default_rng(seed).permutation(len(SETTINGS))
    names = [f"<T{i}>" for i in range(24)] + ["word", "Weird", "wo", "<T1", "[X Y]", "w9", "漢字", "aB"]
    return [dict(id=256 + n, content=name) | SETTINGS[i] for n, (name, i) in enumerate(zip(names, order, strict=True))]


def texts(seed: int, tokens: list[dict], n: int = 150) -> list[str]:
    rng = np.random.default_rng(seed)
    parts = [t["content"] for t in tokens] + HARD * 3
    return ["".join(rng.choice(parts, rng.integers(1, 14))) for _ in range(n)]


def theirs(values: dict, tokens: list[dict]):
    """The library's own tokenizer, whose tokens are added one by one, as transformers adds them."""
    made = library.Tokenizer.from_str(json.dumps(values))
    for t in tokens:
        token = library.AddedToken(t["content"], **{f: t[f] for f in FLAGS if f != "special"})
        (made.add_special_tokens if t["special"] else made.add_tokens)([token])
    return made


@pytest.mark.parametrize("place", ["tokenizer.json", "tokenizer_config.json", "both"])
@pytest.mark.parametrize("seed", range(3))
def test_they_are_read_and_written_as_the_library_reads_them(place, seed, tmp_path):
    """Wherever they are described; where both files do, what tokenizer_config.json says holds, as in transformers."""
    values, tokens = vocabulary(), added(seed)
    other = [t | SETTINGS[-1 - i] for i, t in enumerate(tokens)]
    in_file = {"tokenizer.json": tokens, "tokenizer_config.json": [], "both": other}[place]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values | {"added_tokens": in_file}))
    if place != "tokenizer.json":
        stated = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokens}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": stated}))
    ours = tokenizers.load(tmp_path)
    ours.save(tmp_path / "saved")
    again, expected = tokenizers.load(tmp_path / "saved"), theirs(values, tokens)
    assert again.fingerprint == ours.fingerprint and ours.vocab_size == 256 + len(tokens)
    for text in texts(seed, tokens):
        wanted = expected.encode(text, add_special_tokens=False)
        assert ours.encode_special(text) == again.encode_special(text) == wanted.ids, text
        assert ours.encode_special_offsets(text)[1] == wanted.offsets, text
    expected.encode_special_tokens = True
    for text in texts(seed + 10, tokens):
        assert ours.encode(text) == again.encode(text) == expected.encode(text, add_special_tokens=False).ids, text


def test_flags_that_are_not_stated(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary()))
    stated = {"256": dict(content="<M>", lstrip=True, special=True), "257": dict(content="Foo")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": stated}))
    ours = tokenizers.load(tmp_path)
    assert ours.encode_special("a  <M>foo") == [ours.id_of("a"), 256, 257], "a plain token is found in lower-case text"
    assert 256 not in ours.encode_special("<m>")


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (dict(content="<M>", lstrip=1), "not a content and true or false flags"),
        (dict(lstrip=True), "not a content and true or false flags"),
        ("<M>", "not a content and true or false flags"),
        (dict(content="a"), "a has id 256, and .* in tokenizer.json; correct one"),
    ],
)
def test_damaged_entries_are_refused(entry, why, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"256": entry}}))
    with pytest.raises(ValueError, match=why) as caught:
        tokenizers.load(tmp_path)
    assert "tokenizer_config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_sentencepiece_model_never_loses_them_in_silence(tmp_path):
    made = train_tokenizer.train_sentencepiece(
        ["some words of text 12"] * 9, tmp_path / "tokenizer.model", vocab_size=300
    )
    eos, config = made.piece(made.eos_id), tmp_path / "tokenizer_config.json"

    def load(id: int, **entry) -> tokenizers.Tokenizer:
        config.write_text(json.dumps({"added_tokens_decoder": {str(id): entry | {"special": True}}}))
        return tokenizers.load(tmp_path)

    assert load(made.eos_id, content=eos).fingerprint == made.fingerprint
    with pytest.raises(ValueError, match=f"sets rstrip of {eos}, which only a tokenizer.json can hold; make one"):
        load(made.eos_id, content=eos, rstrip=True)
    with pytest.raises(ValueError, match=r"adds the token <\|user\|>, which only"):
        load(made.vocab_size, content="<|user|>")
