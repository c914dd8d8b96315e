"""Conversations as token ids, by a model's chat template or plainly."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxlm.data import conversations
from jaxlm.data.chat_template import render, render_all
from jaxlm.data.conversations import Conversation


def rendered(tokens: Any, template: str, messages: list[dict[str, Any]], answer: bool = True) -> str:
    """The text of a conversation; `answer`: up to where the model's answer begins."""
    bos, eos = ("" if id is None else tokens.piece(id) for id in (tokens.bos_id, tokens.eos_id))
    return render(template, messages, bos=bos, eos=eos, answer=answer)


def encode(tokens: Any, template: str, messages: list[dict[str, Any]], answer: bool = True) -> list[int]:
    """Token ids of a conversation. The template alone decides whether a begin-of-text token comes first."""
    return tokens.encode_special(rendered(tokens, template, messages, answer))


def learnable(found: Sequence[Conversation], tokens: Any, template: str | None) -> list[conversations.Tokens]:
    """Whole conversations for training, by a template or plainly without one; told apart what the assistant says."""
    if not template:
        return [conversations.encode_plainly(c, tokens) for c in found]
    bos, eos = ("" if id is None else tokens.piece(id) for id in (tokens.bos_id, tokens.eos_id))
    return conversations.encode(found, partial(render_all, template, bos=bos, eos=eos), tokens)


def asked(found: Sequence[Conversation], tokens: Any, template: str | None) -> tuple[list[list[int]], list[str]]:
    """(what stands before the last of the assistant's texts, by a template or plainly without one; those texts)."""
    lasts = [max(i for i, m in enumerate(c.messages) if m["role"] == "assistant") for c in found]
    before = [c.messages[:last] for c, last in zip(found, lasts, strict=True)]
    true = [c.messages[last]["content"] for c, last in zip(found, lasts, strict=True)]
    if not template:
        return [[id for ids, _ in conversations.plain_parts(m, tokens) for id in ids] for m in before], true
    bos, eos = ("" if id is None else tokens.piece(id) for id in (tokens.bos_id, tokens.eos_id))
    texts = render_all(template, [(messages, True) for messages in before], bos=bos, eos=eos)
    return [tokens.encode_special(text) for text in texts], true
