"""Conversations in every usual form; exactly what the assistant says is learned, at token precision."""

import json
from functools import partial

import pytest

from jaxlm.data import conversations
from jaxlm.data.conversations import Conversation, encode, encode_plainly, read
from jaxlm.data.tokenizer import Bytes

TOKENS = Bytes()
USER, BOT = dict(role="user", content="hi"), dict(role="assistant", content="hello")
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def render(template: str):
    pytest.importorskip("jinja2")
    from jaxlm.data.chat_template import render_all

    return partial(render_all, template)


@pytest.mark.parametrize(
    "row",
    [
        dict(messages=[USER, BOT]),
        dict(conversations=[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]),
        dict(instruction="hi", input="", output="hello"),
        dict(prompt="hi", completion="hello"),
        dict(prompt=[USER], completion=[BOT]),
    ],
)
def test_forms(tmp_path, row):
    for name, text in (("a.jsonl", json.dumps(row) + "\n\n"), ("a.json", json.dumps([row]))):
        (tmp_path / name).write_text(text)
        [found] = read(tmp_path / name)
        assert found.messages == [USER, BOT]
    assert found.where.endswith("a.json[0]")


def test_an_instruction_has_its_input_and_system(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(dict(instruction="do", input="it", output="done", system="be")))
    assert [m["content"] for m in read(tmp_path / "a.jsonl")[0].messages] == ["be", "do\n\nit", "done"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("{", r"a\.jsonl:1: not a JSON record"),
        ("[1]", "a number, where an object is due"),
        ('{"text": "x"}', r"a.jsonl:1: no conversation; fields there: text"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "a.jsonl:1: the assistant says nothing"),
        ('{"messages": [{"role": "king", "content": "x"}]}', "unknown role 'king'"),
        ('{"messages": [{"role": "user"}]}', "message 0 has no role .* or no text"),
        ('{"messages": "x"}', "a str, where a list of messages is due"),
    ],
)
def test_what_is_no_conversation(tmp_path, text, why):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=why):
        read(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "b.jsonl")


def learned(found) -> str:
    return "".join(TOKENS.piece(i) for i, said in zip(found.ids, found.learned, strict=True) if said)


def test_the_assistants_turns_are_learned_and_nothing_else():
    system = dict(role="system", content="be kind")
    more = [system, USER, BOT, dict(role="user", content="hello?"), dict(role="assistant", content="hi")]
    [short, long] = encode([Conversation("a:1", [USER, BOT]), Conversation("a:2", more)], render(CHATML), TOKENS)
    assert learned(short) == "hello</s>" and learned(long) == "hello</s>hi</s>"
    whole = "".join(TOKENS.piece(i) for i in long.ids)
    assert whole == "<s>system:be kind</s><s>user:hi</s><s>assistant:hello</s><s>user:hello?</s><s>assistant:hi</s>"


def test_a_template_that_rewrites_what_came_before_is_refused():
    last = "{{ messages[-1].content }}{% if add_generation_prompt %}>{% endif %}"
    with pytest.raises(ValueError, match="a:1: the chat template does not only add"):
        encode([Conversation("a:1", [USER, BOT])], render(last), TOKENS)
    silent = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="the chat template"):
        encode([Conversation("a:1", [USER, BOT])], render(silent), TOKENS)


def test_without_a_template():
    found = encode_plainly(Conversation("a:1", [USER, BOT]), TOKENS)
    assert found.ids == [TOKENS.bos_id, *b"hihello", TOKENS.eos_id] and learned(found) == "hello</s>"
    with pytest.raises(ValueError, match="nothing to learn"):
        conversations._concatenate(Conversation("a:1", []), [([1], False)])
