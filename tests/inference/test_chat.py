"""Conversations: hostile templates end in one line, history fits, piped input works, no token is written twice."""

import io
import json
import time

import jax
import numpy as np
import pytest

from jaxlm.assembly import generate_text, model_source, open_model
from jaxlm.commands import cli
from jaxlm.core import config, spec
from jaxlm.data import chat_template
from jaxlm.data.render_chat import encode
from jaxlm.data.tokenizer import Bytes, HuggingFace
from jaxlm.formats import hf_sidecars
from jaxlm.inference.chat import Chat, converse
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling
from jaxlm.models import llama
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout

pytest.importorskip("jinja2")

TOKENS = Bytes()
CHATML = """{% for m in messages %}
{{ '<s>' if loop.first }}[{{ m.role }}]{{ m.content | trim }}</s>
{% endfor %}
{% if add_generation_prompt %}
[assistant]
{%- endif %}"""
TALK = [
    dict(role="system", content="Be kind."),
    dict(role="user", content=" hé "),
    dict(role="assistant", content="yo"),
]


def test_a_template_writes_the_conversation():
    assert chat_template.render(CHATML, TALK) == "<s>[system]Be kind.</s>\n[user]hé</s>\n[assistant]yo</s>\n[assistant]"
    assert chat_template.render(CHATML, TALK, answer=False).endswith("yo</s>\n")


def test_what_published_templates_use():
    text = (
        "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}"
        "{% endif %}{% set ns.n = ns.n + 1 %}{{ m | tojson }}{% endfor %}{{ ns.n }}"
        "{% generation %}{{ tools | tojson(indent=1) }}{% endgeneration %}"
        "{{ strftime_now('%Y') | length }}{{ eos_token }}"
    )
    made = chat_template.render(text, TALK, bos="<s>", eos="</s>", variables={"tools": [{"a": "<é>"}]})
    assert made == (
        '<s>{"role": "user", "content": " hé "}{"role": "assistant", "content": "yo"}2[\n {\n  "a": "<é>"\n }\n]4</s>'
    )


HOSTILE = {
    "refusal": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "syntax": ("{% for %}", "Expected"),
    "giant loop": ("{% for i in range(10**9) %}x{% endfor %}", "[Rr]ange too big"),
    "nested loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than"),
    "giant text": ("{{ 'a' * 10**10 }}", "MemoryError|more than"),
    "giant padding": ("{{ ''.ljust(10**10) }}", "MemoryError|more than"),
    "giant power": ("{{ 9 ** 999999999 }}", "more than"),
    "much output": ("{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}", "writes more than 1,048,576"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
    "globals": ("{{ raise_exception.__globals__['json'] }}", "unsafe|undefined"),
    "format": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "unsafe|undefined|attribute"),
    "mutation": ("{{ messages.append(1) }}", "safely callable|unsafe"),
    "file": ("{% include '/etc/passwd' %}", "no loader"),
    "deep": ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_one_line(name, monkeypatch):
    text, message = HOSTILE[name]
    monkeypatch.setattr(chat_template, "SECONDS", 2)
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"chat template: .*({message})") as caught:
        chat_template.render(text, TALK)
    assert "\n" not in str(caught.value) and time.monotonic() - started < 30


# -------------------------------------------------------------------------------------------------------------- tokens


def byte_level() -> HuggingFace:
    """A byte-level BPE without merges and two special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return HuggingFace(made.to_str(), {"bos": "<s>", "eos": "</s>"})


@pytest.mark.parametrize("make", [Bytes, byte_level])
def test_the_template_alone_writes_special_tokens(make):
    tokens = make()
    ids = encode(tokens, CHATML, TALK)
    assert ids[0] == tokens.bos_id and ids.count(tokens.bos_id) == 1 and ids.count(tokens.eos_id) == 3
    assert tokens.bos_id not in tokens.encode("<s>"), "text outside of a template never becomes a special token"
    assert tokens.encode_special("a<s>b") == [*tokens.encode("a"), tokens.bos_id, *tokens.encode("b")]


@pytest.mark.parametrize("make", [Bytes, byte_level])
def test_bytes_of_tokens(make):
    tokens, text = make(), "naïve 世界 🎉\n\t x"
    assert b"".join(tokens.token_bytes[i] for i in tokens.encode(text)) == text.encode()
    assert tokens.token_bytes[tokens.eos_id] == b"</s>"


# -------------------------------------------------------------------------------------------------------- conversations


@pytest.fixture(scope="module")
def opened():
    """(model, weights, generator) with 128 positions: conversations share the generator's programs."""
    c = llama.Config(vocab=264, layers=1, width=16, heads=2, kv_heads=1, head_width=8, ffn=32, positions=128)
    layout = Layout.of(config.Mesh(), config.Execution(dtype="float32", scan=True))
    specs, rng = llama.specs(c), np.random.default_rng(0)
    make = lambda s: rng.standard_normal(s.shape).astype(np.float32) / 3  # noqa: E731
    model, weights = Model(llama, c, specs, layout), jax.tree.map(make, specs, is_leaf=spec.is_spec)
    return model, weights, Generator(model, [TOKENS.eos_id])


def new_chat(opened, **more) -> Chat:
    _, weights, generator = opened
    return Chat(generator, TOKENS, weights, CHATML, Sampling(tokens=6), **more)


def test_the_history_is_part_of_the_next_prompt(opened):
    chat = new_chat(opened, system="Hm.")
    first = "".join(chat.say("hello"))
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] and chat.messages[1]["content"] == first
    again = "".join(chat.say("hello"))
    expected = new_chat(opened, system="Hm.", messages=[*chat.messages[:2]])
    assert "".join(expected.say("hello")) == again
    chat.reset()
    assert chat.messages == [] and "".join(chat.say("hello")) == first


def test_the_oldest_turns_go_when_the_window_is_full(opened):
    chat = new_chat(opened, system="S")
    for turn in range(6):
        "".join(chat.say(f"turn {turn} of several"))
        ids = encode(TOKENS, CHATML, [dict(role="system", content="S"), *chat.messages])
        assert chat.messages[0]["role"] == "user" and len(ids) <= 128 + 16
    assert chat.dropped and chat.messages[-2]["content"] == "turn 5 of several"
    with pytest.raises(ValueError, match=r"this message takes .* 128 positions; shorten it"):
        "".join(chat.say("x" * 200))
    assert chat.messages[-1]["role"] == "assistant", "the message that doesn't fit is not remembered"


def test_lines_are_turns_and_an_interrupted_answer_is_kept(opened):
    chat, shown = new_chat(opened), []

    def say(text: str) -> None:
        shown.append(text)
        if "stop me" in str(chat.messages) and text and text not in ("\n", " …", "> "):
            raise KeyboardInterrupt

    converse(chat, iter(["hello\n", "\n", "stop me\n", "/reset\n", "again\n", "/exit\n", "never\n"]), say, "> ")
    assert " …" in shown and "(forgotten)\n" in shown
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["again"]


def test_piped_input_from_the_command_line(opened, monkeypatch, tmp_path, capsys):
    model, weights, _ = opened

    def describe(place):
        found = hf_sidecars.chat_templates(place)
        return model_source.Source(place, "hf", llama, model.config, TOKENS, hf_sidecars.Generation(), found, ([], []))

    monkeypatch.setattr(model_source, "describe", describe)
    monkeypatch.setattr(
        generate_text, "open_model", lambda source, _: open_model.Pretrained(source, model, weights, None)
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nhello\n/exit\n"))
    assert cli.main(["chat", str(tmp_path), "--tokens", "6"]) == 2
    assert "no chat template; give one with --template" in capsys.readouterr().err
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    assert cli.main(["chat", str(tmp_path), "--tokens", "6"]) == 0
    chat = new_chat(opened)
    assert capsys.readouterr().out == "".join(["".join(chat.say("hello")) + "\n" for _ in range(2)])
    assert cli.main(["chat", str(tmp_path), "--tokns", "6"]) == 2
    assert "unknown option --tokns" in capsys.readouterr().err
    assert cli.main(["chat", str(tmp_path), "--tokens", "many"]) == 2
    assert "--tokens: 'many' is not a valid int" in capsys.readouterr().err
