"""Turns conversations into text and token ids, by a model's chat template or, without one, plainly."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxlm.data import conversations
from jaxlm.data.chat_template import render, render_all
from jaxlm.data.conversations import Conversation


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


def encode_for_training(
    dialogues: Sequence[Conversation], tokens: Any, template: str | None
) -> list[conversations.Tokens]:
    """Encodes whole conversations, by a template or plainly without one, and marks what the assistant says."""
    if not template:
        return [conversations.encode_plainly(c, tokens) for c in dialogues]
    bos, eos = _boundary_pieces(tokens)
    return conversations.encode(dialogues, partial(render_all, template, bos=bos, eos=eos), tokens)


def prompts_and_answers(
    dialogues: Sequence[Conversation], tokens: Any, template: str | None
) -> tuple[list[list[int]], list[str]]:
    """Splits each conversation before the assistant's last text.

    Returns (token ids of what comes before it, by a template or plainly without one; the last texts themselves).
    """
    last_turns = [max(i for i, m in enumerate(c.messages) if m["role"] == "assistant") for c in dialogues]
    before = [c.messages[:last] for c, last in zip(dialogues, last_turns, strict=True)]
    answers = [c.messages[last]["content"] for c, last in zip(dialogues, last_turns, strict=True)]
    if not template:
        return [[id for ids, _ in conversations.plain_parts(m, tokens) for id in ids] for m in before], answers
    bos, eos = _boundary_pieces(tokens)
    texts = render_all(template, [(messages, True) for messages in before], bos=bos, eos=eos)
    return [tokens.encode_special(text) for text in texts], answers
