"""Answers take the form that clients of OpenAI's interface read."""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.inference.engine import Piece
from jaxlm.inference.server.tool_calls import Call

LEAST = -9999.0  # JSON has no infinity


def head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """Returns what every answer, and every chunk of one, begins with."""
    return dict(id=f"{prefix}-{uuid.uuid4().hex}", object=kind, created=int(time.time()), model=model)


def chat_logprobs(tokens: Tokenizer, piece: Piece) -> list[dict[str, Any]]:
    """Returns an entry for each token of a piece, with the likeliest tokens there, the likeliest first."""
    out = []
    for id, value, top in zip(piece.tokens, piece.logprobs, piece.top or [{}] * len(piece.tokens), strict=True):
        ordered = sorted(top.items(), key=lambda x: -x[1])
        out.append(_entry(tokens, id, value) | {"top_logprobs": [_entry(tokens, i, v) for i, v in ordered]})
    return out


def _entry(tokens: Tokenizer, id: int, value: float) -> dict[str, Any]:
    data = token_bytes(tokens, id)
    return dict(token=data.decode("utf-8", "replace"), logprob=max(float(value), LEAST), bytes=list(data))


def token_bytes(tokens: Tokenizer, id: int) -> bytes:
    """Returns the bytes of a token; a model's vocabulary may be larger than the tokenizer's."""
    return tokens.token_bytes[id] if id < tokens.vocab_size else tokens.piece(id).encode()


class CompletionLogprobs:
    """CompletionLogprobs make the four lists of `/v1/completions`. Offsets count characters of the text so far."""

    def __init__(self, tokens: Tokenizer, at: int = 0) -> None:
        self.tokens, self.at = tokens, at
        self.special = np.asarray(tokens.bytes_per_token) == 0

    def lists(
        self, ids: Sequence[int], values: Sequence[float | None], tops: Sequence[Mapping[int, float] | None]
    ) -> dict[str, Any]:
        """Returns the lists of further tokens. Of tokens that are spelt alike the likeliest stands in `top_logprobs`,
        where the chosen one always is."""
        out: dict[str, Any] = dict(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for id, value, top in zip(ids, values, tops, strict=True):
            data = token_bytes(self.tokens, id)
            out["tokens"].append(data.decode("utf-8", "replace"))
            out["token_logprobs"].append(None if value is None else max(float(value), LEAST))
            if value is None or top is None:
                out["top_logprobs"].append(None)
            else:
                spelled: dict[str, float] = {}
                for i, v in sorted(({id: value} | dict(top)).items(), key=lambda x: -x[1]):
                    spelled.setdefault(token_bytes(self.tokens, i).decode("utf-8", "replace"), max(float(v), LEAST))
                out["top_logprobs"].append(spelled)
            out["text_offset"].append(self.at)
            if id < len(self.special) and not self.special[id]:
                self.at += sum((byte & 0xC0) != 0x80 for byte in data)
        return out


def joined(parts: Sequence[Mapping[str, list[Any]]]) -> dict[str, Any] | None:
    """Returns lists of the same names, one after another; None where there are none."""
    return {name: [x for part in parts for x in part[name]] for name in parts[0]} if parts else None


def call_fields(call: Call) -> dict[str, Any]:
    """Returns a call of a tool as a message has it."""
    return dict(id=call.id, type="function", function=dict(name=call.name, arguments=call.arguments))
