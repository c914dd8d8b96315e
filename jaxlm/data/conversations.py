"""Reads conversations from files in any of the usual formats, and encodes them as tokens of which some are learned.

The formats are OpenAI's `messages`, ShareGPT's `conversations`, Alpaca's `instruction`, `input`, `output`, and pairs of
`prompt` and `completion` or `question` and `answer`; as JSON lines or a JSON list.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.data.text_input import kind_of, parse_json, read_json, read_lines, read_text

Messages = list[dict[str, str]]
Render = Callable[[Sequence[tuple[Messages, bool]]], list[str]]
"""A chat template: it maps many (messages, whether the assistant's turn begins at the end) to their texts."""

ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function": "tool",
}  # fmt: skip
PAIRS = (("prompt", "completion"), ("question", "answer"))


class Conversation(NamedTuple):
    """A conversation has messages, and knows where it stands in which file."""

    where: str
    """File and line, for error messages."""
    messages: Messages


class Tokens(NamedTuple):
    """A conversation is encoded as token ids, each with whether it is learned."""

    ids: list[int]
    learned: list[bool]
    """Whether the assistant said each token."""


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
    return [Conversation(where, parse_record(where, record)) for where, record in read_records(source)]


def parse_record(where: str, record: dict[str, Any]) -> Messages:
    """Returns the messages of a record in any of the known forms.

    Raises ValueError, which names `where`, if the form is unknown or the assistant says nothing.
    """
    for name in ("messages", "conversations", "conversation"):
        if name in record:
            messages = parse_messages(where, record[name])
            break
    else:
        if "instruction" in record and "output" in record:
            task = "\n\n".join(filter(None, (record["instruction"], record.get("input"))))
            messages = [_message("user", task), _message("assistant", record["output"])]
        elif pair := next((pair for pair in PAIRS if record.keys() >= set(pair)), None):
            user, assistant = pair
            messages = [
                *parse_messages(where, record[user], "user"),
                *parse_messages(where, record[assistant], "assistant"),
            ]
        else:
            fields = ", ".join(record) or "none"
            raise ValueError(
                f"{where}: no conversation; fields there: {fields}; known are messages, conversations, "
                "instruction with output, prompt with completion, and question with answer"
            )
        if record.get("system"):
            messages = [_message("system", record["system"]), *messages]
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError(f"{where}: the assistant says nothing in this conversation; remove it")
    return messages


def parse_messages(where: str, value: Any, role: str = "") -> Messages:
    """Returns the messages of a list, or of a single text that `role` says.

    Raises ValueError, which names `where`, if a message has no known role or no text.
    """
    if isinstance(value, str) and role:
        return [_message(role, value)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: a {type(value).__name__}, where a list of messages is due")
    messages = []
    for i, m in enumerate(value):
        speaker, content = (next((m[k] for k in names if k in m), None) if isinstance(m, dict) else None
                            for names in (("role", "from"), ("content", "value", "text")))  # fmt: skip
        if not isinstance(speaker, str) or not isinstance(content, str):
            raise ValueError(f"{where}: message {i} has no role (role, from) or no text (content, value)")
        if speaker.lower() not in ROLES:
            raise ValueError(f"{where}: message {i} is of unknown role {speaker!r}; known: {', '.join(ROLES)}")
        messages.append(_message(ROLES[speaker.lower()], content))
    return messages


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# -------------------------------------------------------------------------------------------------------------- tokens


def encode(conversations: Sequence[Conversation], render: Render, tokens: Any) -> list[Tokens]:
    """Encodes conversations by a chat template; only what the assistant says is learned.

    Its turns begin where the template's text ends when it is asked to let the assistant begin, so no template needs
    marks for them. Raises ValueError if a template changes what it wrote of earlier messages.
    """
    requests = [request for c in conversations for request in _prefixes(c.messages)]
    texts = iter(render(requests))
    return [_encode_turns(c, [next(texts) for _ in _prefixes(c.messages)], tokens) for c in conversations]


def _prefixes(messages: Messages) -> list[tuple[Messages, bool]]:
    """Returns the whole conversation, and its prefixes up to the beginning and the end of each assistant turn."""
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    return [(messages, False), *((messages[: i + end], not end) for i in turns for end in (0, 1))]


def _encode_turns(c: Conversation, texts: list[str], tokens: Any) -> Tokens:
    whole, at = texts[0], 0
    pieces: list[tuple[str, bool]] = []
    for begin, end in zip(texts[1::2], texts[2::2], strict=True):
        if not (whole.startswith(begin) and whole.startswith(end) and at <= len(begin) < len(end)):
            raise ValueError(
                f"{c.where}: the chat template does not only add to what it wrote of earlier messages, so what the "
                f"assistant says is missing or can't be told apart (at {whole[at : at + 40]!r}); use another template"
            )
        pieces += [(whole[at : len(begin)], False), (whole[len(begin) : len(end)], True)]
        at = len(end)
    pieces.append((whole[at:], False))
    parts = [(tokens.encode_special(text), said) for text, said in pieces if text]
    return _concatenate(c, parts)


def _concatenate(c: Conversation, parts: Iterable[tuple[Sequence[int], bool]]) -> Tokens:
    ids: list[int] = []
    learned: list[bool] = []
    for new, said in parts:
        ids += new
        learned += [said] * len(new)
    if not any(learned):
        raise ValueError(f"{c.where}: the assistant's texts are empty; there is nothing to learn")
    return Tokens(ids, learned)


def encode_plainly(c: Conversation, tokens: Any) -> Tokens:
    """Encodes a conversation with no template: BOS, then the texts, with EOS after each of the assistant's."""
    return _concatenate(c, plain_parts(c.messages, tokens))


def plain_parts(messages: Messages, tokens: Any) -> list[tuple[list[int], bool]]:
    """Returns (ids, whether the assistant said it) for BOS and each message, EOS included after each assistant text."""
    parts: list[tuple[list[int], bool]] = [([tokens.bos_id], False)]
    for m in messages:
        said = m["role"] == "assistant"
        parts.append(([*tokens.encode(m["content"]), *([tokens.eos_id] if said else [])], said))
    return parts
