"""Reads conversations from files in any of the usual formats.

The formats are OpenAI's `messages`, ShareGPT's `conversations`, Alpaca's `instruction`, `input`, `output` with
`history`, and pairs of `prompt` and `completion` or `question` and `answer`; as JSON lines or a JSON list. What else a
message or a record may say that a model reads, such as `tool_calls` and `tools`, is kept for the chat template.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.data.text_input import kind_of, parse_json, read_json, read_lines, read_text

Messages = list[dict[str, Any]]
"""Each message has a `role`, a text as `content`, and perhaps more that a template reads."""

ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function": "tool",
}  # fmt: skip
PAIRS = (("prompt", "completion"), ("question", "answer"))
SPEAKER, CONTENT = ("role", "from"), ("content", "value", "text")
SAID = ("tool_calls", "function_call", "tool_plan", "reasoning_content", "reasoning", "thinking", "name", "citations",
        "images", "videos", "audio")  # fmt: skip
"""Fields of a message, beside its content, that a model may read."""
IDS = ("id", "tool_call_id")
"""Fields that only tell messages apart; a template may leave them out."""
WEIGHTS = ("weight", "train", "loss")
"""Fields that say by 0 or 1 whether an assistant's message is learned."""
SYSTEM = ("system", "system_prompt")
VARIABLES = ("tools", "functions", "documents", "images", "videos", "audios")
"""Fields of a record that a model may read."""


class Conversation(NamedTuple):
    """A conversation has messages, and knows where it stands in which file."""

    where: str
    """File and line, for error messages."""
    messages: Messages
    variables: Mapping[str, Any] = {}
    """What the template reads beside the messages: `tools`, `documents`, and all of `chat_template_kwargs`."""
    settings: frozenset[str] = frozenset()
    """Those of `variables` that are settings of the template, not content."""
    unlearned: frozenset[int] = frozenset()
    """Numbers of assistant messages that are read but not learned."""
    unread: tuple[str, ...] = ()
    """Fields of the record that are of no known meaning and are left out."""


# ------------------------------------------------------------------------------------------------------------- reading


def read_records(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file and line, record) of a file of JSON lines or of a JSON list.

    Raises ValueError if the file is missing, empty or not JSON, or a record is no object.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"data source {str(source)!r} does not exist: give a .jsonl or .json file of conversations")
    text = read_text(path)
    if text.lstrip().startswith("["):
        records = [(f"{path}[{i}]", value) for i, value in enumerate(read_json(path))]
    else:
        lines = [(f"{path}:{n}", line) for n, line in read_lines(path) if line.strip()]
        records = [(where, parse_json(line, where)) for where, line in lines]
    if not records:
        raise ValueError(f"data source {str(source)!r} is empty: it holds no conversation")
    for where, value in records:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {kind_of(value)}, where an object is due")
        yield where, value


def read(source: str | Path) -> list[Conversation]:
    """Reads all conversations of a file; see `read_records` and `parse_record`."""
    return [parse_record(where, record) for where, record in read_records(source)]


def unread_fields(source: str | Path, conversations: Sequence[Conversation]) -> list[str]:
    """Returns a line that names the fields of a source that are left out, or no line if there are none."""
    counts = {name: sum(name in c.unread for c in conversations) for c in conversations for name in c.unread}
    named = ", ".join(f"{name} ({n:,})" for name, n in list(counts.items())[:10])
    more = ", …" if len(counts) > 10 else ""
    return [f"{source}: fields that are not read, with their numbers: {named}{more}"] if counts else []


def parse_record(where: str, record: dict[str, Any]) -> Conversation:
    """Returns the conversation of a record in any of the known forms.

    Raises ValueError, which names `where`, if the form is unknown, the assistant says nothing that is learned, or a
    field that a model reads isn't of its kind.
    """
    used, messages = _turns(where, record)
    return make(where, messages, record, used)


def make(where: str, messages: Messages, record: dict[str, Any], used: Sequence[str]) -> Conversation:
    """Returns a conversation of a record's messages and of what else the record says; `used` holds the messages."""
    system = [(name, record[name]) for name in SYSTEM if record.get(name)]
    for name, text in system:
        if not isinstance(text, str):
            raise ValueError(f"{where}: {name!r} is {kind_of(text)}, where a text is due; correct the record")
        if messages[0]["role"] != "system":
            messages = [dict(role="system", content=text), *messages]
        elif messages[0]["content"] != text:
            raise ValueError(f"{where}: {name!r} and the first message are two system texts; leave one of them out")
    variables, settings = _variables(where, record)
    unlearned = [i for i, m in enumerate(messages) if not _is_learned(where, i, m)]
    messages = [{k: v for k, v in m.items() if k not in WEIGHTS} for m in messages]
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        raise ValueError(f"{where}: the assistant says nothing in this conversation; remove it")
    if not set(turns) - set(unlearned):
        raise ValueError(f"{where}: nothing the assistant says is learned, for its weights are 0; remove the record")
    known = {*used, *SYSTEM, *VARIABLES, "chat_template_kwargs"}
    unread = [name for name, value in record.items() if name not in known and not _is_empty(value)]
    unread += [f"message.{k}" for k in dict.fromkeys(k for m in messages for k in m) if k not in _MESSAGE]
    messages = [{k: v for k, v in m.items() if k in _MESSAGE} for m in messages]
    return Conversation(where, messages, variables, settings, frozenset(unlearned), tuple(unread))


_MESSAGE = ("role", "content", *SAID, *IDS)


def _turns(where: str, record: dict[str, Any]) -> tuple[Sequence[str], Messages]:
    """Returns (the fields that hold a record's messages, the messages)."""
    for name in ("messages", "conversations", "conversation"):
        if name in record:
            if not _is_empty(record.get("history")):
                raise ValueError(f"{where}: 'history' beside {name!r}; put its turns among the messages")
            return (name, "history"), parse_messages(where, record[name])
    if "instruction" in record and "output" in record:
        for name in ("instruction", "input", "output"):
            if not isinstance(record.get(name), str) and (name != "input" or record.get(name) is not None):
                raise ValueError(f"{where}: {name!r} is {kind_of(record[name])}, where a text is due; correct it")
        task = "\n\n".join(filter(None, (record["instruction"], record.get("input"))))
        messages = [*_history(where, record.get("history")), _message("user", task)]
        return ("instruction", "input", "output", "history"), [*messages, _message("assistant", record["output"])]
    if pair := next((pair for pair in PAIRS if record.keys() >= set(pair)), None):
        sides = (parse_messages(where, record[name], role, name)
                 for name, role in zip(pair, ("user", "assistant"), strict=True))  # fmt: skip
        return (*pair, "history"), [*_history(where, record.get("history")), *(m for side in sides for m in side)]
    fields = ", ".join(record) or "none"
    raise ValueError(
        f"{where}: no conversation; fields there: {fields}; known are messages, conversations, "
        "instruction with output, prompt with completion, and question with answer"
    )


def _history(where: str, value: Any) -> Messages:
    """Returns the messages of earlier turns, each a pair of what the user and the assistant said."""
    turns = [] if _is_empty(value) else value
    if not isinstance(turns, list) or not all(
        isinstance(t, list) and len(t) == 2 and all(isinstance(x, str) for x in t) for t in turns
    ):
        raise ValueError(f"{where}: 'history' is no list of [what the user said, what the assistant said]; correct it")
    return [_message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]


def _variables(where: str, record: dict[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """Returns what a template reads of a record beside its messages, and which of it are settings of the template."""
    variables = {name: record[name] for name in VARIABLES if not _is_empty(record.get(name))}
    for name, value in variables.items():
        if isinstance(value, str):  # as data sets have it whose columns hold one kind of value
            value = variables[name] = parse_json(value, f"{where}: {name!r}")
        if not isinstance(value, list):
            raise ValueError(f"{where}: {name!r} is {kind_of(value)}, where a list is due; correct the record")
    settings = record.get("chat_template_kwargs") or {}
    if not isinstance(settings, dict) or settings.keys() & {"messages", "add_generation_prompt", *variables}:
        raise ValueError(f"{where}: 'chat_template_kwargs' is no object of settings of the template; correct it")
    return variables | settings, frozenset(settings)


def parse_messages(where: str, value: Any, role: str = "", field: str = "messages") -> Messages:
    """Returns the messages of a list, or of a single text that `role` says.

    Raises ValueError, which names `where`, if a message has no known role or no text.
    """
    if isinstance(value, str) and role:
        return [_message(role, value)]
    if not isinstance(value, list) or not value:
        due = "a text or a list of messages" if role else "a list of messages"
        raise ValueError(f"{where}: {field!r} is {'empty' if value == [] else kind_of(value)}, where {due} is due")
    return [_parse_message(f"{where}: message {i}", m) for i, m in enumerate(value)]


def _parse_message(where: str, m: Any) -> dict[str, Any]:
    if not isinstance(m, dict):
        raise ValueError(f"{where} is {kind_of(m)}, where an object with role and content is due; correct it")
    speaker = next((m[k] for k in SPEAKER if k in m), None)
    name = next((k for k in CONTENT if k in m), None)
    if not isinstance(speaker, str) or (name is None and not m.get("tool_calls")):
        raise ValueError(f"{where} has no role (role, from) or no text (content, value)")
    if speaker.lower() not in ROLES:
        raise ValueError(f"{where} is of unknown role {speaker!r}; known: {', '.join(ROLES)}")
    more = {k: v for k, v in m.items() if k not in (*SPEAKER, name) and not (_is_empty(v) and k not in WEIGHTS)}
    if "tool_calls" in more and not (isinstance(c := more["tool_calls"], list) and all(isinstance(x, dict) for x in c)):
        raise ValueError(f"{where}: 'tool_calls' is {kind_of(c)}, where a list of objects is due; correct it")
    content = None if name is None else _text(m[name])
    if content is None and not ("tool_calls" in more and (name is None or m[name] is None)):
        raise ValueError(f"{where}: {name!r} is {kind_of(m[name])}, where a text is due; correct it")
    return dict(role=ROLES[speaker.lower()], content=content) | more


def _text(content: Any) -> str | None:
    """Returns a message's content if it is a text or a list of parts that are texts, else None."""
    if isinstance(content, list) and content:
        parts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
        texts = [text for text in parts if isinstance(text, str)]
        return "".join(texts) if len(texts) == len(content) else None
    return content if isinstance(content, str) else None


def _is_learned(where: str, i: int, m: dict[str, Any]) -> bool:
    """Returns whether the weights of a message let it be learned. Raises ValueError for any but 0 and 1."""
    given = [(name, m[name]) for name in WEIGHTS if m.get(name) is not None]
    for name, value in given:
        if not isinstance(value, int | float) or math.isnan(value) or value not in (0, 1):
            raise ValueError(f"{where}: message {i}: {name!r} is {value!r}, where 0 or 1 is due; correct it")
        if value and m["role"] != "assistant":
            raise ValueError(f"{where}: message {i}: {name!r} is 1, but only what the assistant says is learned; "
                             "set it to 0")  # fmt: skip
    return all(value for _, value in given)


def _is_empty(value: Any) -> bool:
    """Returns whether a field says nothing, as where a table has a column that few rows fill."""
    return value is None or value in ("", [], {})


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
