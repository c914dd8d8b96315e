"""Calls of tools are found in every format, however the text comes, and no text is lost."""

import json

import pytest

from jaxlm.inference.server.tool_calls import FORMATS, Call, Reader, format_of, required_schema

NAMES = ["weather", "time"]
ONE = '{"name": "weather", "arguments": {"city": "a}<b"}}'
LLAMA = '{"name": "weather", "parameters": {"city": "a}<b"}}'
OTHER = '<tool_call>{"name": "rm"}</tool_call>'
ROWS = {
    # name: (format, text, content, calls)
    "hermes": ("hermes", f"Well. <tool_call>{ONE}</tool_call>", "Well. ", 1),
    "hermes, two": ("hermes", f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>{ONE}</tool_call>", "", 2),
    "hermes, then text": ("hermes", f"<tool_call>{ONE}</tool_call> done <b>", " done <b>", 1),
    "hermes, no tool of ours": ("hermes", OTHER, OTHER, 0),
    "hermes, cut": ("hermes", '<tool_call>{"name": "wea', '<tool_call>{"name": "wea', 0),
    "hermes, nearly": ("hermes", "a <tool_ b <tool", "a <tool_ b <tool", 0),
    "hermes, arguments as text": ("hermes", '<tool_call>{"name": "time", "arguments": "{}"}</tool_call>', "", 1),
    "llama": ("llama", LLAMA, "", 1),
    "llama, spaced": ("llama", f"\n {LLAMA}", "", 1),
    "llama, two": ("llama", f"{LLAMA}; {LLAMA}", "", 2),
    "llama, marked": ("llama", f"<|python_tag|>{LLAMA}", "", 1),
    "llama, other JSON": ("llama", '{"answer": 42}', '{"answer": 42}', 0),
    "llama, JSON later": ("llama", f"See: {LLAMA}", f"See: {LLAMA}", 0),
    "llama, cut": ("llama", LLAMA[:20], LLAMA[:20], 0),
    "mistral": ("mistral", f"[TOOL_CALLS][{ONE}, {ONE}]", "", 2),
    "mistral, with arguments apart": ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "x"}', "", 1),
    "mistral, text": ("mistral", "[TOOL] weather {", "[TOOL] weather {", 0),
    "mistral, cut": ("mistral", '[TOOL_CALLS][{"name"', '[TOOL_CALLS][{"name"', 0),
}  # fmt: skip


def read(reader: Reader, text: str, size: int) -> tuple[str, list[Call]]:
    parts = []
    for i in range(0, len(text), size):
        parts += reader.read(text[i : i + size])
    parts += reader.read("", last=True)
    return "".join(p for p in parts if isinstance(p, str)), [p for p in parts if isinstance(p, Call)]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("row", ROWS)
def test_calls_are_found(row, size):
    form, text, content, count = ROWS[row]
    reader = Reader(FORMATS[form], NAMES)
    found, calls = read(reader, text, size)
    assert found.strip() == content.strip() and len(calls) == reader.called == count
    assert len({call.id for call in calls}) == count
    if "a}<b" in text and count:
        assert all(json.loads(call.arguments) == {"city": "a}<b"} for call in calls)


def test_text_comes_at_once_where_it_can_be_no_call():
    reader = Reader(FORMATS["hermes"], NAMES)
    assert reader.read("Hello ") == ["Hello "] and reader.read("<tool") == [] and reader.read("box>") == ["<toolbox>"]


def test_a_special_token_marks_calls():
    reader = Reader(FORMATS["mistral"], NAMES)
    assert reader.read("", marked=True) == []
    [call] = reader.read(f"[{ONE}]")
    assert call.name == "weather" and len(call.id) == 9 and call.id.isalnum(), "as Mistral's template demands"
    assert reader.read("", last=True) == []


def test_a_whole_answer_is_a_call():
    reader = Reader(FORMATS["hermes"], NAMES, only=True)
    assert read(reader, ONE, 4)[1][0].name == "weather"
    assert read(Reader(FORMATS["hermes"], NAMES, only=True), ONE[:30], 4) == (ONE[:30], [])


def test_the_format_is_that_of_the_template():
    assert format_of("{{ messages }}") is None
    assert format_of("{{ tools }} <tool_call>") is FORMATS["hermes"]
    assert format_of("{{ tools }} [TOOL_CALLS]") is FORMATS["mistral"]
    assert format_of('{{ tools }} {"name": x, "parameters": y}') is FORMATS["llama"]


def test_the_schema_of_a_forced_call_keeps_definitions():
    parameters = {"$ref": "#/$defs/x", "$defs": {"x": {"type": "object"}}}
    schema = json.loads(required_schema([{"function": {"name": "f", "parameters": parameters}}]))
    assert schema["properties"]["name"] == {"const": "f"} and schema["$defs"] == parameters["$defs"]
