"""Turns conversations into text and token ids, by a model's chat template or, without one, plainly."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from jaxlm.data.chat_template import Renderer, Request, Text, render, render_all
from jaxlm.data.conversations import IDS, Conversation, Messages
from jaxlm.data.sealed_text import Sealed

Render = Callable[[Sequence[Request]], Iterator[list[Text]]]
"""A chat template: it gives the texts of each request."""
Span = tuple[int, int]
PROBES = 20  # conversations that show whether a template reads a field


class Tokens(NamedTuple):
    """A conversation is encoded as token ids, each with whether it is learned."""

    ids: list[int]
    learned: list[bool]
    """Whether the assistant said each token."""
    joined: bool = False
    """Whether an answer begins within a token, which then is none of a prompt's that ends there."""


def _boundary_pieces(tokens: Any) -> tuple[str, str]:
    bos, eos = ("" if id is None else tokens.piece(id) for id in (tokens.bos_id, tokens.eos_id))
    return bos, eos


def render_text(tokens: Any, template: str, messages: list[dict[str, Any]], answer: bool = True) -> str:
    """Returns the text of a conversation; with `answer` it ends where the model's answer begins."""
    bos, eos = _boundary_pieces(tokens)
    return render(template, messages, bos=bos, eos=eos, answer=answer)


def encode(tokens: Any, template: str, messages: list[dict[str, Any]], answer: bool = True) -> list[int]:
    """Returns the token ids of a conversation; see `render_text`.

    The template alone decides whether a begin-of-text token comes first.
    """
    return tokens.encode_special(render_text(tokens, template, messages, answer))


def encode_sealed(
    tokens: Any, by: Renderer, messages: list[dict[str, Any]], variables: Mapping[str, Any], answer: bool = True
) -> list[int]:
    """Returns the token ids of a conversation whose messages and variables come from strangers: special tokens that
    they spell stay text, and only the template writes others."""
    sealed = Sealed(tokens.special_pieces)
    given, named = sealed.seal(messages), sealed.seal(dict(variables))
    return tokens.encode_parts(sealed.open(by(Request(given, [(len(given), answer)], named))[0].text))


def renderer(tokens: Any, template: str) -> Renderer:
    """Returns a chat template that runs in a process which stays; `close` ends it."""
    bos, eos = _boundary_pieces(tokens)
    return Renderer(template, bos=bos, eos=eos)


def turn_ends(tokens: Any, template: str) -> list[int]:
    """Returns the special token that ends an answer in a template's text; empty: it is the same as plain text."""
    said = "Some answer."
    messages = [dict(role="user", content="A question?"), dict(role="assistant", content=said)]
    _, _, rest = render_text(tokens, template, messages, answer=False).rpartition(said)
    return [id for id in tokens.encode_special(rest) if tokens.bytes_per_token[id] == 0][:1]


def encode_for_training(dialogues: Sequence[Conversation], tokens: Any, template: str | None) -> list[Tokens]:
    """Encodes whole conversations, by a template or plainly without one, and marks what the assistant says."""
    if not template:
        return [encode_plainly(c, tokens) for c in dialogues]
    return encode_by_template(dialogues, _render(template, tokens), tokens)


def _render(template: str, tokens: Any) -> Render:
    bos, eos = _boundary_pieces(tokens)
    return partial(render_all, template, bos=bos, eos=eos)


def prompts_and_answers(
    dialogues: Sequence[Conversation], tokens: Any, template: str | None
) -> tuple[list[list[int]], list[str]]:
    """Splits each conversation before the assistant's last text.

    Returns (token ids of what comes before it, by a template or plainly without one; the last texts themselves). Raises
    ValueError if what the assistant says last isn't text alone.
    """
    last_turns = [max(i for i, m in enumerate(c.messages) if m["role"] == "assistant") for c in dialogues]
    answers = []
    for c, last in zip(dialogues, last_turns, strict=True):
        if "tool_calls" in c.messages[last] or "function_call" in c.messages[last]:
            raise ValueError(
                f"{c.where}: the assistant's last message calls a tool, which no text can be compared with"
            )
        answers.append(c.messages[last]["content"])
    before = [c._replace(messages=c.messages[:last]) for c, last in zip(dialogues, last_turns, strict=True)]
    if not template:
        return [[id for ids, _ in plain_parts(c, tokens) for id in ids] for c in before], answers
    by = _render(template, tokens)
    _check_fields(before, by)
    requests = [Request(c.messages, [(len(c.messages), True)], c.variables, c.where) for c in before]
    return [tokens.encode_special(text) for [(text, _)] in by(requests)], answers


# -------------------------------------------------------------------------------------------------------- by a template


def encode_by_template(dialogues: Sequence[Conversation], by: Render, tokens: Any) -> list[Tokens]:
    """Encodes the whole text that a template gives of each conversation; only what the assistant says is learned.

    The template's own marks (`{% generation %}`) say what that is. Without them the assistant's turns begin where the
    text ends when the template is asked to let the assistant begin. Raises ValueError if a template without marks
    changes what it wrote of earlier messages, or reads none of what a field says.
    """
    _check_fields(dialogues, by)
    found = by([Request(c.messages, _cuts(c.messages), c.variables, c.where) for c in dialogues])
    return [_encode_text(c, texts, tokens) for c, texts in zip(dialogues, found, strict=True)]


def _cuts(messages: Messages) -> list[tuple[int, bool]]:
    """Returns the whole conversation, and its prefixes up to the beginning and the end of each assistant turn."""
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    return [(len(messages), False), *((i + end, not end) for i in turns for end in (0, 1))]


def _check_fields(dialogues: Sequence[Conversation], by: Render) -> None:
    """Raises ValueError for a field that leaves no trace in any text of the conversations that have it."""
    names = {k: None for c in dialogues for m in c.messages for k in _fields(m)}
    for name in names:
        some = [c for c in dialogues if any(name in _fields(m) for m in c.messages)][:PROBES]
        without = [c._replace(messages=[{k: v for k, v in m.items() if k != name} for m in c.messages]) for c in some]
        _compare(name, some, without, by)
    for name in {name: None for c in dialogues for name in c.variables}:
        some = [c for c in dialogues if name in c.variables][:PROBES]
        without = [c._replace(variables=_changed(c, name)) for c in some]
        _compare(name, some, without, by)


def _fields(message: dict[str, Any]) -> list[str]:
    """Returns the fields of a message that its reader has to be told; a tool's name only tells results apart."""
    ids = ("role", "content", *IDS, *(["name"] if message["role"] == "tool" else []))
    return [name for name in message if name not in ids]


def _changed(c: Conversation, name: str) -> dict[str, Any]:
    """Returns the variables without one; a setting has another value, for it may be set to what it is without."""
    others = {k: v for k, v in c.variables.items() if k != name}
    value = c.variables[name]
    if name not in c.settings:
        return others
    return others | {name: not value if isinstance(value, bool) or value is None else f"not {value}"}


def _compare(name: str, some: Sequence[Conversation], without: Sequence[Conversation], by: Render) -> None:
    def texts(several: Sequence[Conversation]) -> list[list[Text]]:
        cuts = [[(n, answer) for n in range(1, len(c.messages) + 1) for answer in (False, True)][-40:] for c in several]
        return list(by([Request(c.messages, cut, c.variables, c.where) for c, cut in zip(several, cuts, strict=True)]))

    whole = texts(some)
    try:
        same = whole == texts(without)
    except ValueError:  # a template that fails without the field reads it
        return
    if same:
        raise ValueError(
            f"{some[0].where}: the chat template does not read {name!r}, so what it says would be lost; use a template "
            "that reads it, or remove the field"
        )


def _encode_text(c: Conversation, texts: list[Text], tokens: Any) -> Tokens:
    whole = texts[0]
    spans = whole.learned or _spans_by_prefix(c, [text.text for text in texts])
    turns = [i for i, m in enumerate(c.messages) if m["role"] == "assistant"]
    if c.unlearned and len(spans) != len(turns):
        raise ValueError(
            f"{c.where}: the chat template marks {len(spans)} texts of {len(turns)} turns as the assistant's, so it "
            "can't be told which one a weight of 0 is for; use another template"
        )
    said = [span for i, span in enumerate(spans) if not c.unlearned or turns[i] not in c.unlearned]
    ids, offsets = tokens.encode_special_offsets(whole.text)
    learned, joined = _within(said, offsets)
    return _checked(c, Tokens(ids, learned, joined))


def _spans_by_prefix(c: Conversation, texts: list[str]) -> list[Span]:
    """Returns the characters of each of the assistant's turns in the first text, from the texts of its prefixes."""
    whole, at = texts[0], 0
    spans = []
    for begin, end in zip(texts[1::2], texts[2::2], strict=True):
        if not (whole.startswith(begin) and whole.startswith(end) and at <= len(begin) < len(end)):
            raise ValueError(
                f"{c.where}: the chat template does not only add to what it wrote of earlier messages, so what the "
                f"assistant says is missing or can't be told apart (at {whole[at : at + 40]!r}); use another template, "
                "or mark in it what is learned ({% generation %} … {% endgeneration %})"
            )
        spans.append((len(begin), len(end)))
        at = len(end)
    return spans


def _within(spans: Sequence[Span], offsets: Sequence[Span]) -> tuple[list[bool], bool]:
    """Returns which tokens have a character of the spans, and whether a span begins within a token.

    A token has the characters between its neighbours too, which some tokenizers leave out of its own: blanks.
    """
    learned, joined, k, before = [], False, 0, 0
    for a, z in offsets:
        begin, end = min(a, before), max(z, before)
        while k < len(spans) and spans[k][1] <= begin:
            k += 1
        # A token without characters, such as a space that is put before a text, belongs to what follows.
        inside = k < len(spans) and (spans[k][0] < end or spans[k][0] == begin)
        learned.append(inside)
        joined |= inside and begin < spans[k][0]
        before = end
    return learned, joined


def _checked(c: Conversation, tokens: Tokens) -> Tokens:
    if not any(tokens.learned):
        raise ValueError(f"{c.where}: the assistant's texts are empty; there is nothing to learn")
    return tokens


# --------------------------------------------------------------------------------------------------- without a template


def encode_plainly(c: Conversation, tokens: Any) -> Tokens:
    """Encodes a conversation with no template: BOS, then the texts, with EOS after each of the assistant's."""
    parts = plain_parts(c, tokens)
    return _checked(c, Tokens([id for ids, _ in parts for id in ids], [said for ids, said in parts for _ in ids]))


def plain_parts(c: Conversation, tokens: Any) -> list[tuple[list[int], bool]]:
    """Returns (ids, whether they are learned) for BOS and each message, EOS included after each assistant text.

    Raises ValueError if a message or the record says more than texts.
    """
    more: Iterable[str] = [name for m in c.messages for name in _fields(m)] or c.variables
    if name := next(iter(more), None):
        raise ValueError(f"{c.where}: without a chat template nothing reads {name!r}; set objective.template to one "
                         "that does, or remove the field")  # fmt: skip
    parts: list[tuple[list[int], bool]] = [([tokens.bos_id], False)]
    for i, m in enumerate(c.messages):
        said = m["role"] == "assistant"
        parts.append(
            ([*tokens.encode(m["content"]), *([tokens.eos_id] if said else [])], said and i not in c.unlearned)
        )
    return parts
