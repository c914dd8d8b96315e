"""A conversation with a model keeps to its chat template, streams answers and drops history that no longer fits."""

import contextlib
from collections.abc import Generator as Pieces
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxlm.data.render_chat import encode
from jaxlm.inference import sampling, stream
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling


@dataclass
class Chat:
    """A chat is one conversation; `dropped` counts messages that no longer fit the model's window.

    `params` had best be prepared by `generate.prepare`.
    """

    generate: Generator
    tokens: Any
    params: Any
    template: str
    sampling: Sampling
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    dropped: int = 0

    def reset(self) -> None:
        """Forgets all messages."""
        self.messages, self.dropped = [], 0

    def say(self, text: str) -> Pieces[str, None, None]:
        """Yields the answer piece by piece. It joins the history as far as it came, even if it is cut short.

        Raises a ValueError where `text` and an answer don't fit the model's positions.
        """
        self.messages.append(dict(role="user", content=text))
        try:
            prompt = self._encode_prompt()
        except ValueError:
            self.messages.pop()
            raise
        answer = ""
        try:
            for _, piece in stream.stream(self.generate, self.tokens, self.params, [prompt], self.sampling, every=4):
                answer += piece
                yield piece
        finally:
            self.messages.append(dict(role="assistant", content=answer))

    def _encode_prompt(self) -> list[int]:
        """Returns the prompt's tokens, without the oldest turns where all don't fit the model's positions."""
        s, messages = self.sampling, self.messages
        limits = [n for n in (self.generate.model.config.positions, s.length) if n is not None]
        limit, room = min(limits) if limits else None, sampling.room(s)
        system = [dict(role="system", content=self.system)] if self.system else []
        while True:
            ids = encode(self.tokens, self.template, system + messages)
            if limit is None or len(ids) + room <= limit:
                self.dropped, self.messages = self.dropped + len(self.messages) - len(messages), messages
                return ids
            turns = [i for i, m in enumerate(messages) if m["role"] == "user" and i]
            if not turns:
                raise ValueError(
                    f"chat: this message takes {len(ids)} tokens, an answer up to {room}, and "
                    f"{'`length` allows' if limit == s.length else 'the model has'} {limit} positions; shorten it, "
                    "or set `tokens` lower"
                )
            messages = messages[turns[0] :]


def converse(chat: Chat, lines: Iterator[str], say: Any, prompt: str = "") -> None:
    """Answers each line until there is none or /exit; /reset forgets the history, Ctrl-C ends an answer.

    `say(text)` shows text as it comes; `prompt` is shown before each turn.
    """
    while True:
        say(prompt)
        line = next(lines, None)
        if line is None or line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            chat.reset()
            say("(forgotten)\n")
            continue
        if not line.strip():
            continue
        before = chat.dropped
        try:
            with contextlib.closing(chat.say(line.rstrip("\n"))) as pieces:
                for piece in pieces:
                    say(piece)
        except KeyboardInterrupt:
            say(" …")
        except ValueError as error:
            say(f"jaxlm: {error}")
        say("\n")
        if chat.dropped > before:
            say(f"({chat.dropped - before} messages at the beginning no longer fit and were forgotten)\n")
