"""What a model's generation_config.json says is followed as transformers does, or told; a user's own settings win."""

import dataclasses
import json

import pytest
from support.tiny_models import published

import jaxlm
from jaxlm.assembly import evaluate_model, generate_text, model_source
from jaxlm.assembly.generation_advice import advice
from jaxlm.commands import cli
from jaxlm.inference.chat import Chat
from jaxlm.inference.sampling import Sampling, capped, check


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return {kind: published(place / kind, kind) for kind in ("llama", "t5")}


def advised(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values))
    return advice(model_source.describe(folder))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize(
    ("values", "expected", "line"),
    [
        (dict(max_length=20), dict(length=20, tokens=20), "followed: max_length 20"),
        (dict(max_length=20, max_new_tokens=3), dict(tokens=3),
         "followed: max_new_tokens 3; left out: max_length 20 (max_new_tokens wins)"),
        (dict(min_length=4), dict(min_length=4), "followed: min_length 4"),
        (dict(min_length=4, min_new_tokens=2), dict(min_tokens=2),
         "followed: min_new_tokens 2; left out: min_length 4 (min_new_tokens wins)"),
        (dict(do_sample=True, temperature=0.5, top_k=40, top_p=0.9, min_p=0.1),
         dict(temperature=0.5, top_k=40, top_p=0.9, min_p=0.1),
         "followed: do_sample, temperature 0.5, top_k 40, top_p 0.9, min_p 0.1"),
        (dict(do_sample=True, num_beams=4), dict(temperature=1.0),
         "followed: do_sample, temperature 1; left out: "
         "num_beams 4 (beam search draws nothing here, and do_sample is true)"),
        (dict(temperature=0.5), {}, "left out: temperature 0.5 (do_sample is false)"),
        (dict(num_beams=3, length_penalty=2.0, early_stopping=True, repetition_penalty=1.2, no_repeat_ngram_size=3),
         dict(beams=3, length_penalty=2.0, early_stopping="yes", repetition_penalty=1.2, no_repeat_ngram=3),
         "followed: repetition_penalty 1.2, no_repeat_ngram_size 3, num_beams 3, length_penalty 2, early_stopping yes"),
        (dict(suppress_tokens=[5, 6], bad_words_ids=[[6], [7], [3], [8, 9]], eos_token_id=3, stop_strings="###"),
         dict(banned_ids=(5, 6, 7), stop=("###",)),
         "followed: stop_strings ['###'], suppress_tokens [5, 6, 7]; left out: "
         "bad_words_ids of several tokens (1)"),
        (dict(forced_bos_token_id=4, forced_eos_token_id=[3]), dict(first_id=4, last_id=3),
         "followed: forced_bos_token_id 4, forced_eos_token_id 3"),
        (dict(forced_eos_token_id=[3, 4], typical_p=0.4, num_return_sequences=2, max_time=1.5), {},
         "left out: max_time, num_return_sequences, typical_p, forced_eos_token_id of several"),
        (dict(typical_p=1.0, diversity_penalty=0.0, num_beam_groups=1, use_cache=False, output_scores=True,
              bad_words_ids=None, no_repeat_ngram_size=0, num_beams=1, temperature=1.0, transformers_version="5"),
         {}, ""),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_each_setting_is_followed_or_told(kind, values, expected, line, folders):
    own = advised(folders[kind], decoder_start_token_id=0, **values)
    assert own.sampling == dataclasses.replace(Sampling(), **expected)
    assert own.line(own.sampling) == (f"generation_config.json: {line}" if line else "")
    check(own.sampling, 64)


def test_a_length_beyond_the_model_and_bad_words_of_another_type(folders):
    own = advised(folders["llama"], max_length=10**6, do_sample=True, top_k=10**6)
    positions, vocab = (getattr(model_source.describe(folders["llama"]).config, x) for x in ("positions", "vocab"))
    assert (own.sampling.length, own.sampling.top_k) == (positions, vocab)
    assert f"max_length {10**6} (the model has {positions} positions)" in own.line(own.sampling)
    for wrong in ([3], [[]], [["a"]], "a", [[-1]], [[True]]):
        with pytest.raises(ValueError, match=r"bad_words_ids is .* not a list of lists of token ids"):
            advised(folders["llama"], bad_words_ids=wrong)


def test_a_users_settings_win(folders):
    own = advised(folders["llama"], max_length=20, min_length=9)
    assert own.chosen(tokens=20).length is None and own.chosen(tokens=20).tokens == 20
    assert own.chosen(min_tokens=3).min_length == 0 and own.chosen(length=30).tokens == 30
    assert own.chosen(tokens=5, length=30) == dataclasses.replace(own.sampling, tokens=5, length=30)
    assert own.line(own.chosen(tokens=5)) == "generation_config.json: followed: min_length 9"
    own = advised(folders["llama"], max_new_tokens=4, min_new_tokens=2)
    assert own.changed(dataclasses.replace(own.sampling, length=30)).tokens == 30
    assert own.changed(dataclasses.replace(own.sampling, min_length=5)).min_tokens == 0


def test_a_prompt_that_leaves_no_room_is_refused():
    s = Sampling(tokens=64, length=6)
    assert capped(s, [[1, 2], [1, 2, 3, 4, 5]]).tokens == 4
    with pytest.raises(ValueError, match=r"sampling.length: a prompt has 6 tokens, and prompt and answer may have 6"):
        capped(s, [[1], [1] * 6])


def test_lengths_are_followed_everywhere_and_told_once(folders, capsys, monkeypatch, tmp_path):
    """In Python, on the command line, for a draft, in evaluations and in chats."""
    folder = folders["llama"]
    (folder / "generation_config.json").write_text(json.dumps(dict(max_length=12, min_length=12)))
    model = jaxlm.open(folder)
    capsys.readouterr()
    prompts = ["ab", "abcde"]
    sizes = [len(model.pretrained.prompts([p])[0][0]) for p in prompts]
    found = [len(a.completion.tokens) for [a] in model.answers(prompts)]
    assert found == [12 - n for n in sizes] and len(set(found)) == 2
    line = "generation_config.json: followed: max_length 12, min_length 12"
    assert capsys.readouterr().err.splitlines() == [line]
    assert [len(a.completion.tokens) for [a] in model.answers(prompts, tokens=3)] == [3, 3]
    assert capsys.readouterr().err.splitlines() == ["generation_config.json: followed: min_length 12"]
    model.answers(prompts)
    assert capsys.readouterr().err == ""

    monkeypatch.setattr(generate_text, "open_model", lambda *place: model.pretrained)
    texts = [a.text for [a] in model.answers(prompts)]
    arguments = ["generate", str(folder), "--prompt", *prompts[:1], "--prompt", *prompts[1:], "--json"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["texts"] == texts
    assert [told for told in err.splitlines() if told.startswith("generation_config")] == [line]

    (folder / "generation_config.json").write_text(json.dumps(dict(max_length=12)))
    without = jaxlm.open(folder)
    one = [a.completion.tokens for [a] in without.answers(prompts)]
    drafted = generate_text.generate(without.pretrained, prompts, generate_text.settings(without.pretrained.source),
                                     draft="lookup")  # fmt: skip
    assert [a.completion.tokens for [a] in drafted] == one

    how = evaluate_model.sampling_for(without.pretrained, 128, None, temperature=0.0)
    assert (how.length, how.tokens) == (12, 12)
    assert evaluate_model.sampling_for(without.pretrained, 128, 5).length is None
    (folder / "generation_config.json").write_text("{}")
    assert evaluate_model.sampling_for(folder, 128).tokens == 128

    chat = Chat(without.pretrained.generator(), without.tokenizer, None, "{{ messages[-1].content }}", how)
    pytest.importorskip("jinja2")
    chat.messages.append(dict(role="user", content="abc"))
    prompt = chat._encode_prompt()
    assert len(prompt) + 6 <= 12
    chat.messages.append(dict(role="user", content="abcdefghijklm" * 3))
    with pytest.raises(ValueError, match="an answer up to 6, and `length` allows 12 positions"):
        chat._encode_prompt()
