"""Text as it comes: whole characters, stop texts cut exactly, the same whatever the pace."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from jaxlm.assembly import generate_text, model_source, open_model
from jaxlm.commands import cli
from jaxlm.core import config, spec
from jaxlm.data.tokenizer import Bytes, HuggingFace
from jaxlm.formats.hf_sidecars import read_generation
from jaxlm.inference import constrain, stream
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling
from jaxlm.models import llama
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout

TOKENS = Bytes()
PROMPTS = [TOKENS.encode("abc"), TOKENS.encode("x")]


@pytest.fixture(scope="module")
def generate():
    c = llama.Config(vocab=264, layers=1, width=16, heads=2, kv_heads=1, head_width=8, ffn=32)
    layout = Layout.of(config.Mesh(), config.Execution(dtype="float32", scan=True))
    return Generator(Model(llama, c, llama.specs(c), layout), [TOKENS.eos_id])


@pytest.fixture(scope="module")
def weights(generate):
    rng = np.random.default_rng(0)
    make = lambda s: rng.standard_normal(s.shape).astype(np.float32) / 3  # noqa: E731
    return generate.prepare(jax.tree.map(make, generate.model.specs, is_leaf=spec.is_spec))


def collected(pieces) -> tuple[list[str], list]:
    """(text of each row from its pieces, the answers)."""
    texts: dict[int, str] = {}
    while True:
        try:
            row, piece = next(pieces)
        except StopIteration as end:
            return [texts.get(i, "") for i in range(sum(map(len, end.value)))], end.value
        assert piece
        texts[row] = texts.get(row, "") + piece


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("pace", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    "stops", [(), ("END",), ("é", "zz"), ("aab",), ("\ufffd",)], ids=["none", "word", "two", "overlap", "replacement"]
)
def test_pieces_add_up_and_never_hold_half_a_character(pace, stops):
    raw = "naïve 世界 aaab 🎉 zEND! END é".encode() + b"\xe2\x82"  # its last character is cut off
    text = raw.decode("utf-8", "replace")
    cut = min((at for s in stops if (at := text.find(s)) >= 0), default=len(text))
    reader, pieces = stream.Reader(TOKENS, stops), []
    for n in [*range(pace, len(raw), pace), len(raw)]:
        pieces.append(reader.read(list(raw[:n]), n == len(raw)))
        assert "\ufffd" not in pieces[-1] or n == len(raw)
    assert "".join(pieces) == reader.text == text[:cut]
    if cut < len(text):
        assert any(raw[: reader.num_used].decode("utf-8", "replace").endswith(s) for s in stops)
    else:
        assert reader.num_used is None


@pytest.mark.parametrize("pace", [1, 2, 9])
def test_the_stop_text_that_is_whole_first_counts(pace):
    raw, reader = b"xxabcdef", stream.Reader(TOKENS, ["abcde", "cd"])
    text = "".join(reader.read(list(raw[:n]), n >= len(raw)) for n in range(pace, len(raw) + pace, pace))
    assert (text, reader.num_used) == ("xxab", 6)


def test_what_may_begin_a_stop_text_waits():
    reader = stream.Reader(TOKENS, ["</answer>"])
    assert reader.read(list(b"yes</ans"), False) == "yes"
    assert reader.read(list(b"yes</ansi"), False) == "</ansi"
    assert reader.read(list(b"yes</ansi </"), True) == " </"


# ------------------------------------------------------------------------------------------------------------ streaming


@pytest.mark.parametrize("samples", [1, 2])
def test_streamed_text_equals_text_at_once(generate, weights, samples):
    s = Sampling(tokens=40, temperature=1.0, samples=samples, seed=3, logprobs=1)
    ours = stream.answers(generate, TOKENS, weights, PROMPTS, s)
    for every in (1, 5, 64):
        texts, found = collected(stream.stream(generate, TOKENS, weights, PROMPTS, s, every=every))
        assert found == ours
        assert texts == [a.text for several in ours for a in several]
    # Stop at something that the second row's text has in its middle.
    middle = ours[1][0].text.strip("\ufffd")
    stop = next(middle[i : i + 2] for i in range(3, len(middle)) if "\ufffd" not in middle[i : i + 2])
    stopping = Sampling(tokens=40, temperature=1.0, samples=samples, seed=3, logprobs=1, stop=(stop,))
    for every in (1, 7):
        texts, found = collected(stream.stream(generate, TOKENS, weights, PROMPTS, stopping, every=every))
        assert texts == [a.text.partition(stop)[0] for several in ours for a in several]
        end = found[1][0].completion
        assert end.reason == "stop" and len(end.tokens) == len(end.logprobs) == len(end.top) < 40
        assert found == stream.answers(generate, TOKENS, weights, PROMPTS, stopping)


def test_log_probabilities_are_the_models_own(generate, weights):
    cold = generate(weights, PROMPTS, Sampling(tokens=5, logprobs=3))
    for [answer] in cold:
        for token, p, top in zip(answer.tokens, answer.logprobs, answer.top, strict=True):
            assert len(top) == 3 and max(top, key=top.get) == token and top[token] == pytest.approx(p)
    hot = generate(weights, PROMPTS, Sampling(tokens=1, logprobs=3, temperature=5.0, top_k=1))
    assert [a.logprobs[0] for [a] in hot] == pytest.approx([a.logprobs[0] for [a] in cold])


def test_beams_come_whole_and_stop_texts_cut_them(generate, weights):
    s = Sampling(tokens=6, beams=3, samples=2)
    texts, found = collected(stream.stream(generate, TOKENS, weights, PROMPTS, s))
    assert [a.completion.tokens for several in found for a in several] == [
        c.tokens for several in generate(weights, PROMPTS, s) for c in several
    ]
    assert texts == [a.text for several in found for a in several]
    noted = generate(weights, PROMPTS, dataclasses.replace(s, logprobs=2, length_penalty=0.0))
    for several in noted:
        for c in several:
            assert len(c.logprobs) == len(c.top) == len(c.tokens) and all(len(top) == 2 for top in c.top)
            assert all(
                top.get(t, p) == p <= max(top.values()) for t, p, top in zip(c.tokens, c.logprobs, c.top, strict=True)
            )
            if c.reason == "length":
                assert sum(c.logprobs) == pytest.approx(c.score, abs=1e-4)


def test_stop_ids_and_min_tokens(generate, weights):
    free = generate(weights, PROMPTS, Sampling(tokens=12))[0][0].tokens
    at = next(i for i, t in enumerate(free) if i > 1 and t not in free[:i])
    cut = generate(weights, PROMPTS, Sampling(tokens=12, stop_ids=(free[at],)))[0][0]
    assert (cut.tokens, cut.reason) == (free[:at], "stop")
    longer = generate(weights, PROMPTS, Sampling(tokens=12, stop_ids=(free[at],), min_tokens=at + 2))[0][0]
    assert len(longer.tokens) >= at + 2 and longer.tokens[:at] == free[:at]


def test_allowed_and_banned_tokens(generate, weights):
    found = generate(weights, PROMPTS, Sampling(tokens=12, temperature=1.0, allowed_ids=(65, 66, 67), banned_ids=(66,)))
    assert {t for [a] in found for t in a.tokens} == {65, 67}
    free = generate(weights, PROMPTS, Sampling(tokens=12))[0][0].tokens
    banned = generate(weights, PROMPTS, Sampling(tokens=12, banned_ids=(free[0],)))[0][0].tokens
    assert free[0] not in banned


# ---------------------------------------------------------------------------------------------------------- constraints

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_json_of_the_schema(generate, weights, seed):
    pytest.importorskip("llguidance")
    s = Sampling(tokens=120, temperature=0.7, seed=seed, json_schema=json.dumps(SCHEMA | {"x-guidance": {
        "whitespace_flexible": False}}))  # fmt: skip
    for [answer] in stream.answers(generate, TOKENS, weights, PROMPTS, s):
        value = json.loads(answer.text)
        assert set(value) == {"name", "n"} and isinstance(value["name"], str) and 0 <= value["n"] <= 99
        assert answer.completion.reason == "stop"


@pytest.mark.parametrize("seed", range(4))
def test_answers_match_the_regular_expression(generate, weights, seed):
    pytest.importorskip("llguidance")
    pattern = r"(yes|no), [0-9]{1,3}( é|!)+"
    s = Sampling(tokens=60, temperature=2.0, seed=seed, regex=pattern, samples=2)
    for several in stream.answers(generate, TOKENS, weights, PROMPTS, s):
        for answer in several:
            whole = re.fullmatch(pattern, answer.text)
            assert whole or answer.completion.reason == "length", answer.text
    ends = Sampling(tokens=60, temperature=2.0, seed=seed, regex="(yes|no)")  # nothing may follow it
    found = stream.answers(generate, TOKENS, weights, PROMPTS, ends)
    assert all(a.text in ("yes", "no") and a.completion.reason == "stop" for [a] in found)


def test_answers_that_follow_a_text_match_without_the_space_that_begins_one(generate, weights):
    pytest.importorskip("llguidance")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "▁", "h", "i", "hi", "▁hi", *(chr(0x4E00 + i) for i in range(253))]
    bpe = models.BPE({p: i for i, p in enumerate(pieces)}, [("h", "i"), ("▁", "hi")], unk_token="<unk>")
    made = Tokenizer(bpe)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    made.add_special_tokens([AddedToken("</s>", special=True)])
    tokens = HuggingFace(made.to_str(), {"eos": "</s>"})
    assert tokens.eos_id == TOKENS.eos_id
    for seed in range(3):
        s = Sampling(tokens=60, temperature=2.0, seed=seed, regex="(hi|i)( hi)?", samples=2)
        found = stream.answers(generate, tokens, weights, [[5, 2, 3], [5]], s)
        assert {a.text for several in found for a in several} <= {"hi", "i", "hi hi", "i hi"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(regex="("), "sampling.regex: "),
        (dict(json_schema="{"), "sampling.json_schema: "),
        (dict(json_schema='{"type": "nonsense"}'), "sampling.json_schema: "),
        (dict(regex="a", json_schema="{}"), "give one of them"),
        (dict(regex="a", beams=2), "beam search does not go with regex"),
    ],
)
def test_impossible_constraints_are_refused_in_one_line(generate, weights, setting, message):
    pytest.importorskip("llguidance")
    with pytest.raises(ValueError, match=message) as caught:
        stream.answers(generate, TOKENS, weights, PROMPTS, Sampling(tokens=4, **setting))
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxlm\[generate\]'"):
        constrain.open_grammar(TOKENS, Sampling(regex="a"), 264, (257,))


# ------------------------------------------------------------------------------------------------------- command line


def test_the_command_line_reaches_every_way_to_choose(generate, weights, monkeypatch, tmp_path, capsys):
    model = generate.model
    source = model_source.Source(
        tmp_path, "hf", model.family, model.config, TOKENS, read_generation(tmp_path), {}, ([], [])
    )
    monkeypatch.setattr(generate_text, "open_model", lambda *place: open_model.Pretrained(source, model, weights, None))
    monkeypatch.setattr(
        model_source, "describe", lambda place: dataclasses.replace(source, advice=read_generation(tmp_path))
    )

    def called(*more: str) -> dict:
        assert cli.main(["generate", str(tmp_path), "--prompt", "abc", "--prompt", "x", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    ours = [a.text for [a] in stream.answers(generate, TOKENS, weights, PROMPTS, Sampling(tokens=6))]
    assert called("--tokens", "6")["texts"] == ours
    assert called("--tokens", "6", "--draft", "lookup")["texts"] == ours
    assert called("--tokens", "6", "--draft", str(tmp_path), "--proposals", "2")["texts"] == ours
    many = called("--tokens", "6", "--temperature", "1", "--samples", "2", "--logprobs", "1", "--stop", "q", "zz")
    assert [len(several) for several in many["texts"]] == [2, 2] and len(many["likeliest"][0][0][0]) == 1
    (tmp_path / "generation_config.json").write_text(
        json.dumps(dict(max_new_tokens=3, do_sample=True, temperature=0.5, top_k=4, eos_token_id=[1, 2], typical_p=0.5))
    )
    found = generate_text.settings(model_source.describe(tmp_path))
    assert (found.tokens, found.temperature, found.top_k) == (3, 0.5, 4)
    assert "left out: typical_p" in capsys.readouterr().err
    assert cli.main(["generate", str(tmp_path), "--prompt", "a", "--draft", "lookup", "--stop", "x"]) == 2
    assert "--draft does not go with --stop" in capsys.readouterr().err
