"""Conversations in every usual form; exactly what the assistant says is learned, at token precision."""

import json
import re
from functools import partial

import pytest

from jaxlm.data import render_chat
from jaxlm.data.conversations import Conversation, parse_record, read, unread_fields
from jaxlm.data.render_chat import encode_by_template, encode_plainly
from jaxlm.data.tokenizer import Bytes, HuggingFace, SentencePiece

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
        ('{"messages": "x"}', "'messages' is a text, where a list of messages is due"),
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
    [short, long] = encode_by_template(
        [Conversation("a:1", [USER, BOT]), Conversation("a:2", more)], render(CHATML), TOKENS
    )
    assert learned(short) == "hello</s>" and learned(long) == "hello</s>hi</s>"
    whole = "".join(TOKENS.piece(i) for i in long.ids)
    assert whole == "<s>system:be kind</s><s>user:hi</s><s>assistant:hello</s><s>user:hello?</s><s>assistant:hi</s>"


def test_a_template_that_rewrites_what_came_before_is_refused():
    last = "{{ messages[-1].content }}{% if add_generation_prompt %}>{% endif %}"
    with pytest.raises(ValueError, match="a:1: the chat template does not only add"):
        encode_by_template([Conversation("a:1", [USER, BOT])], render(last), TOKENS)
    silent = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="the chat template"):
        encode_by_template([Conversation("a:1", [USER, BOT])], render(silent), TOKENS)


def test_without_a_template():
    found = encode_plainly(Conversation("a:1", [USER, BOT]), TOKENS)
    assert found.ids == [TOKENS.bos_id, *b"hihello", TOKENS.eos_id] and learned(found) == "hello</s>"
    with pytest.raises(ValueError, match="nothing to learn"):
        encode_plainly(Conversation("a:1", [USER]), TOKENS)


# ------------------------------------------------------------------------------------------- tokens of the whole text


def metaspace() -> HuggingFace:
    """A BPE that puts a space before a text, as Llama's tokenizers do, with a piece for a space and "Blood"."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    text = "▁abcdefghijklmnopqrstuvwxyzB:?!"
    merges = [("B", "l"), ("o", "o"), ("oo", "d"), ("Bl", "ood"), ("▁", "Blood"), ("▁", "h")]
    vocab = {c: i for i, c in enumerate([*text, *(a + b for a, b in merges), "<unk>"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return HuggingFace(made.to_str(), {"bos": "<s>", "eos": "</s>"})


def sentence_piece() -> SentencePiece:
    """A model with a dummy prefix and pieces that cross a blank."""
    import io

    import sentencepiece

    model = io.BytesIO()
    lines = ["Blood is red", "assistant: Blood", "hi there Blood", "user: hi"] * 30
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, vocab_size=310,
                                             model_type="bpe", byte_fallback=True, minloglevel=2)  # fmt: skip
    return SentencePiece(model.getvalue())


TALK = [dict(role=role, content=content) for role, content in (
    ("user", "hi"), ("assistant", "Blood"), ("user", "oh?"), ("assistant", "Blood!"))]  # fmt: skip


@pytest.mark.parametrize("make", [metaspace, sentence_piece, Bytes])
def test_a_conversation_has_the_tokens_of_its_whole_text(make):
    """What is generated for the second turn is the beginning of what is trained."""
    tokens, c = make(), Conversation("a:1", TALK)
    [found] = render_chat.encode_for_training([c], tokens, CHATML)
    whole = "<s>user:hi</s><s>assistant:Blood</s><s>user:oh?</s><s>assistant:Blood!</s>"
    assert found.ids == tokens.encode_special(whole) and not found.joined
    prompt = render_chat.encode(tokens, CHATML, TALK[:3])
    assert found.ids[: len(prompt)] == prompt and found.learned[len(prompt) - 1 :] == [False] + [True] * (
        len(found.ids) - len(prompt)
    )
    turns = [tokens.encode_special(text) for text in ("x:Blood</s>", "x:Blood!</s>")]
    said = [id for id, learned in zip(found.ids, found.learned, strict=True) if learned]
    first = said.index(tokens.eos_id) + 1
    assert turns[0][-first:] == said[:first] and turns[1][first - len(said) :] == said[first:]


@pytest.mark.parametrize("make", [metaspace, sentence_piece])
def test_an_answer_that_begins_within_a_token_is_learned_and_counted(make):
    """As transformers' mask of the assistant's tokens has it: the token with the answer's first character counts."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
    template += "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    tokens = make()
    [found] = render_chat.encode_for_training([Conversation("a:1", TALK[:2])], tokens, template)
    assert found.joined and found.ids == tokens.encode_special("user: hiassistant: Blood</s>")
    assert [tokens.piece(i) for i, said in zip(found.ids, found.learned, strict=True) if said] == ["▁Blood", "</s>"]


def test_marks_of_a_template_say_what_is_learned():
    """A template that opens a thought, or drops earlier ones, is usable so."""
    think = (
        "{% for m in messages %}<s>{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}"
        "{% if m.reasoning_content and loop.last %}[{{ m.reasoning_content }}]{% endif %}{{ m.content }}</s>"
        "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant:[{% endif %}"
    )
    said = [dict(m, reasoning_content="hm") if m["role"] == "assistant" else m for m in TALK]
    [found] = encode_by_template([Conversation("a:1", said)], render(think), TOKENS)
    assert learned(found) == "Blood</s>[hm]Blood!</s>"
    [found] = encode_by_template([Conversation("a:1", said, unlearned=frozenset([1]))], render(think), TOKENS)
    assert learned(found) == "[hm]Blood!</s>"
    last = think.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    with pytest.raises(ValueError, match="marks 1 texts of 2 turns as the assistant's, so it can't be told which one"):
        encode_by_template([Conversation("a:1", said, unlearned=frozenset([3]))], render(last), TOKENS)
    with pytest.raises(ValueError, match=r"does not only add .* mark in it what is learned"):
        encode_by_template([Conversation("a:1", said)], render(re.sub("{% (end)?generation %}", "", think)), TOKENS)


# --------------------------------------------------------------------------------------------- what records say beside

KNOWS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<s>{{ m.role }}{{ m.name or '' }}:"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content or '' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% if loud is defined and loud %}!{% endif %}{% endif %}"
)
CALL = dict(id="c", type="function", function=dict(name="w", arguments=dict(city="Oslo")))
FIELDS = {
    "tools": (dict(tools=[dict(name="w")]), {}, '[{"name": "w"}]'),
    "tools as text": (dict(tools='[{"name": "w"}]'), {}, '[{"name": "w"}]'),
    "tool_calls": ({}, dict(tool_calls=[CALL]), '{"name": "w", "arguments": {"city": "Oslo"}}'),
    "reasoning_content": ({}, dict(reasoning_content="hm"), "(hm)hello"),
    "name": ({}, dict(name="Ann"), "assistantAnn:"),
    "chat_template_kwargs": (dict(chat_template_kwargs=dict(loud=False)), {}, "hello"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_a_template_reads_are_used_and_others_refused(name):
    record, message, expected = FIELDS[name]
    c = parse_record("a:1", dict(messages=[USER, BOT | message, dict(role="user", content="x")], **record))
    knows = KNOWS if name != "name" else KNOWS.replace("<s>assistant:", "<s>assistantAnn:")  # or nothing is only added
    [found] = encode_by_template([c], render(knows), TOKENS)
    assert expected in "".join(map(TOKENS.piece, found.ids))
    field = {"chat_template_kwargs": "loud"}.get(name, name.split()[0])
    with pytest.raises(ValueError, match=f"a:1: the chat template does not read '{field}', so what it says would be"):
        encode_by_template([c], render(CHATML), TOKENS)
    with pytest.raises(ValueError, match=f"a:1: without a chat template nothing reads '{field}'"):
        encode_plainly(c, TOKENS)


def test_prompts_of_answers_read_the_same_fields():
    c = parse_record("a:1", dict(messages=[USER, BOT], tools=[dict(name="w")]))
    [prompt], answers = render_chat.prompts_and_answers([c], TOKENS, KNOWS)
    assert "".join(map(TOKENS.piece, prompt)) == '[{"name": "w"}]<s>user:hi</s><s>assistant:' and answers == ["hello"]
    with pytest.raises(ValueError, match="a:1: the chat template does not read 'tools', so what it says would be lost"):
        render_chat.prompts_and_answers([c], TOKENS, CHATML)


def test_tool_calls_may_have_no_text_and_empty_fields_say_nothing():
    calls = dict(role="assistant", content=None, tool_calls=[CALL])
    row = dict(messages=[USER, calls, dict(role="tool", content="4 C", tool_call_id="c", name="w"), BOT], tools=None)
    c = parse_record("a:1", row)
    [found] = encode_by_template([c], render(KNOWS.replace("{{ m.name or '' }}", "")), TOKENS)
    assert learned(found) == '{"name": "w", "arguments": {"city": "Oslo"}}</s>hello</s>'
    empty = dict(tool_calls=None, reasoning_content="", name=None, weight=None)
    assert parse_record("a:1", dict(messages=[USER | empty, BOT | empty], tools=[], system="")).messages == [USER, BOT]
    with pytest.raises(ValueError, match="a:1: the assistant's last message calls a tool"):
        render_chat.prompts_and_answers([parse_record("a:1", dict(messages=[USER, calls]))], TOKENS, KNOWS)


@pytest.mark.parametrize("weights", [dict(weight=0), dict(train=False), dict(weight=0.0)])
def test_a_weight_of_0_is_read_but_not_learned(weights):
    row = dict(messages=[USER | weights, BOT | weights, USER, dict(role="assistant", content="yo", weight=1)])
    c = parse_record("a:1", row)
    assert learned(encode_plainly(c, TOKENS)) == "yo</s>"
    [found] = encode_by_template([c], render(CHATML), TOKENS)
    assert learned(found) == "yo</s>" and "assistant:hello" in "".join(map(TOKENS.piece, found.ids))


def test_system_texts_and_history(tmp_path):
    system = dict(role="system", content="be kind")
    spoken = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    for row in (dict(messages=[USER, BOT]), dict(conversations=spoken), dict(messages=[system, USER, BOT]),
                dict(question="hi", answer="hello")):  # fmt: skip
        for name in ("system", "system_prompt"):
            assert parse_record("a:1", row | {name: "be kind"}).messages == [system, USER, BOT]
    for row in (dict(instruction="hi", output="hello"), dict(prompt="hi", completion="hello")):
        said = parse_record("a:1", row | dict(history=[["a", "b"]])).messages
        assert [m["content"] for m in said] == ["a", "b", "hi", "hello"]
    (tmp_path / "a.jsonl").write_text(json.dumps(dict(messages=[USER | dict(at=1), BOT], id=7, source="x", history=[])))
    assert unread_fields("a", read(tmp_path / "a.jsonl")) == [
        "a: fields that are not read, with their numbers: id (1), source (1), message.at (1)"
    ]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (dict(messages=[USER, BOT | dict(weight=0.5)]), "message 1: 'weight' is 0.5, where 0 or 1 is due"),
        (dict(messages=[USER | dict(weight=1), BOT]), "message 0: 'weight' is 1, but only what the assistant says"),
        (dict(messages=[USER, BOT | dict(weight=0)]), "nothing the assistant says is learned, for its weights are 0"),
        (dict(messages=[USER, BOT], system=["x"]), "'system' is a list, where a text is due"),
        (dict(messages=[dict(role="system", content="a"), USER, BOT], system="b"), "are two system texts"),
        (dict(messages=[USER, BOT], history=[["a", "b"]]), "'history' beside 'messages'"),
        (dict(instruction="a", output="b", history=["x"]), "'history' is no list of"),
        (dict(messages=[USER, BOT], tools={"a": 1}), "'tools' is an object, where a list is due"),
        (dict(messages=[USER, BOT], tools="["), "'tools': not a JSON record"),
        (dict(messages=[USER, BOT], chat_template_kwargs=[1]), "'chat_template_kwargs' is no object"),
        (dict(messages=[USER, BOT], chat_template_kwargs=dict(messages=[])), "'chat_template_kwargs' is no object"),
        (dict(messages=[USER, BOT | dict(tool_calls="x")]), "message 1: 'tool_calls' is a text, where a list"),
        (dict(messages=[USER, dict(role="assistant", content=None)]), "message 1: 'content' is null, where a text"),
        (dict(messages=[USER, 3]), "message 1 is a number"),
        (dict(messages=[USER, dict(role="assistant", content=[dict(type="image")])]), "'content' is a list"),
        (dict(instruction="2+2?", input="", output=4), "'output' is a number, where a text is due"),
        (dict(instruction="2+2?", input=None, output=None), "'output' is null, where a text is due"),
    ],
)  # fmt: skip
def test_what_a_record_may_not_say(row, why):
    with pytest.raises(ValueError, match="^a:1: .*" + re.escape(why)):
        parse_record("a:1", row)


def test_parts_of_a_content_that_are_texts_are_one_text():
    parts = [dict(type="text", text="hel"), dict(type="text", text="lo")]
    assert parse_record("a:1", dict(messages=[USER, BOT | dict(content=parts)])).messages == [USER, BOT]


def test_many_conversations_are_rendered_in_batches_and_the_one_that_fails_is_named(monkeypatch):
    from jaxlm.data import chat_template

    started, run = [], chat_template.subprocess.run
    monkeypatch.setattr(chat_template.subprocess, "run", lambda *a, **k: started.append(1) or run(*a, **k))
    monkeypatch.setattr(chat_template, "BATCH", 7)
    many = [Conversation(f"a:{i}", [USER, dict(role="assistant", content=f"{i}")]) for i in range(20)]
    found = encode_by_template(many, render(CHATML), TOKENS)
    assert [learned(t) for t in found] == [f"{i}</s>" for i in range(20)] and len(started) == 3
    with monkeypatch.context() as few:  # characters, of which each conversation has some 150
        few.setattr(chat_template, "BATCH_CHARACTERS", 400)
        assert encode_by_template(many[:4], render(CHATML), TOKENS) == found[:4] and len(started) == 3 + 2
    bad = "{% if messages[-1].content == '16' %}{{ raise_exception('odd') }}{% endif %}" + CHATML
    with pytest.raises(ValueError, match=r"^a:16: chat template: odd$"):
        encode_by_template(many, render(bad), TOKENS)
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    slow = bad.replace("{{ raise_exception('odd') }}", "{{ (messages | length + 7) ** 999999999 }}")
    with pytest.raises(ValueError, match=r"^a:16: chat template: took more than 1 s or 1024 MiB"):
        encode_by_template(many, render(slow), TOKENS)
    wide = bad.replace("{{ raise_exception('odd') }}", "{{ 'a' * 10 ** 10 }}")
    with pytest.raises(ValueError, match=r"^a:16: chat template: MemoryError"):
        encode_by_template(many, render(wide), TOKENS)


def test_each_conversation_has_the_time_to_itself(monkeypatch):
    from jaxlm.data import chat_template

    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    busy = "{% for i in range(40) %}{{ '' if range(99999) | sum }}{% endfor %}{{ messages[0].content }}"
    many = [chat_template.Request([USER | dict(content=f"{i}")], [(1, False)]) for i in range(10)]
    assert [text.text for [text] in chat_template.render_all(busy, many)] == [f"{i}" for i in range(10)]
