"""Conversations from files, whatever their makers call the parts, and as tokens of which some are learned.

Read: OpenAI's `messages`, ShareGPT's `conversations`, Alpaca's `instruction`, `input`, `output`, and pairs of `prompt`
and `completion` or `question` and `answer`; as JSON lines or a JSON list.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Messages = list[dict[str, str]]
Render = Callable[[Sequence[tuple[Messages, bool]]], list[str]]
"""(messages, whether the assistant's turn begins at the end) of many → their texts by a chat template."""

ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function": "tool",
}  # fmt: skip
PAIRS = (("prompt", "completion"), ("question", "answer"))


class Conversation(NamedTuple):
    where: str
    """File and line."""
    messages: Messages


class Tokens(NamedTuple):
    ids: list[int]
    learned: list[bool]
    """Of each token, whether the assistant said it."""


# ------------------------------------------------------------------------------------------------------------- reading


def rows(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, record) of JSON lines or of a JSON list."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"data source {str(source)!r} does not exist: give a .jsonl or .json file of conversations")
    text = path.read_text("utf-8")
    try:
        if text.lstrip().startswith("["):
            found = [(f"{path}[{i}]", value) for i, value in enumerate(json.loads(text))]
        else:
            lines = enumerate(text.split("\n"), 1)
            found = [(f"{path}:{n}", json.loads(line)) for n, line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON lines ({error.msg} near line {error.lineno})") from error
    if not found:
        raise ValueError(f"data source {str(source)!r} is empty: it holds no conversation")
    for where, value in found:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: a {type(value).__name__}, where an object is due")
        yield where, value


def read(source: str | Path) -> list[Conversation]:
    return [Conversation(where, messages_of(where, row)) for where, row in rows(source)]


def messages_of(where: str, row: dict[str, Any]) -> Messages:
    """A record in any of the known forms; it must hold an answer."""
    for name in ("messages", "conversations", "conversation"):
        if name in row:
            found = listed(where, row[name])
            break
    else:
        if "instruction" in row and "output" in row:
            task = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
            found = [_said("user", task), _said("assistant", row["output"])]
        elif pair := next((pair for pair in PAIRS if row.keys() >= set(pair)), None):
            found = [*listed(where, row[pair[0]], "user"), *listed(where, row[pair[1]], "assistant")]
        else:
            there = ", ".join(row) or "none"
            raise ValueError(
                f"{where}: no conversation; fields there: {there}; known are messages, conversations, "
                "instruction with output, prompt with completion, and question with answer"
            )
        if row.get("system"):
            found = [_said("system", row["system"]), *found]
    if not any(m["role"] == "assistant" for m in found):
        raise ValueError(f"{where}: the assistant says nothing in this conversation; remove it")
    return found


def listed(where: str, value: Any, role: str = "") -> Messages:
    """Messages from a list of them, or from a text that `role` says."""
    if isinstance(value, str) and role:
        return [_said(role, value)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: a {type(value).__name__}, where a list of messages is due")
    found = []
    for i, m in enumerate(value):
        told, said = (next((m[k] for k in names if k in m), None) if isinstance(m, dict) else None
                      for names in (("role", "from"), ("content", "value", "text")))  # fmt: skip
        if not isinstance(told, str) or not isinstance(said, str):
            raise ValueError(f"{where}: message {i} has no role (role, from) or no text (content, value)")
        if told.lower() not in ROLES:
            raise ValueError(f"{where}: message {i} is of unknown role {told!r}; known: {', '.join(ROLES)}")
        found.append(_said(ROLES[told.lower()], said))
    return found


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# -------------------------------------------------------------------------------------------------------------- tokens


def encode(conversations: Sequence[Conversation], render: Render, tokens: Any) -> list[Tokens]:
    """By a chat template; learned is what follows each point where the assistant's turn begins.

    Such a point is where the template ends when it is asked to let the assistant begin: no template needs marks for it.
    """
    asked = [request for c in conversations for request in _points(c.messages)]
    texts = iter(render(asked))
    return [_tokens(c, [next(texts) for _ in _points(c.messages)], tokens) for c in conversations]


def _points(messages: Messages) -> list[tuple[Messages, bool]]:
    """The whole, and up to the beginning and the end of each of the assistant's turns."""
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    return [(messages, False), *((messages[: i + end], not end) for i in turns for end in (0, 1))]


def _tokens(c: Conversation, texts: list[str], tokens: Any) -> Tokens:
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
    return _joined(c, parts)


def _joined(c: Conversation, parts: Iterable[tuple[Sequence[int], bool]]) -> Tokens:
    ids: list[int] = []
    learned: list[bool] = []
    for new, said in parts:
        ids += new
        learned += [said] * len(new)
    if not any(learned):
        raise ValueError(f"{c.where}: the assistant's texts are empty; there is nothing to learn")
    return Tokens(ids, learned)


def encode_plainly(c: Conversation, tokens: Any) -> Tokens:
    """Without a template: BOS, the texts one after another, EOS after each of the assistant's."""
    return _joined(c, plain_parts(c.messages, tokens))


def plain_parts(messages: Messages, tokens: Any) -> list[tuple[list[int], bool]]:
    """(ids, whether the assistant said it) of BOS and each message."""
    parts: list[tuple[list[int], bool]] = [([tokens.bos_id], False)]
    for m in messages:
        said = m["role"] == "assistant"
        parts.append(([*tokens.encode(m["content"]), *([tokens.eos_id] if said else [])], said))
    return parts
