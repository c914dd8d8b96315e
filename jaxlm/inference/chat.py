"""A conversation with a model: its own template, answers as they come, history that fits its window."""

import contextlib
from collections.abc import Generator as Pieces
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxlm.data.render_chat import encode
from jaxlm.inference import stream
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling


@dataclass
class Chat:
    """One conversation. `params` had best be prepared."""

    generate: Generator
    tokens: Any
    params: Any
    template: str
    sampling: Sampling
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    dropped: int = 0
    """Messages that no longer fit."""

    def reset(self) -> None:
        self.messages, self.dropped = [], 0

    def say(self, text: str) -> Pieces[str, None, None]:
        """The answer, piece by piece. What was said of it is remembered, even if it is cut short."""
        self.messages.append(dict(role="user", content=text))
        try:
            prompt = self._fitting()
        except ValueError:
            self.messages.pop()
            raise
        said = ""
        try:
            for _, piece in stream.stream(self.generate, self.tokens, self.params, [prompt], self.sampling, every=4):
                said += piece
                yield piece
        finally:
            self.messages.append(dict(role="assistant", content=said))

    def _fitting(self) -> list[int]:
        """The prompt, without the oldest turns where all don't fit the model's window."""
        most, kept = self.generate.model.config.positions, self.messages
        first = [dict(role="system", content=self.system)] if self.system else []
        while True:
            ids = encode(self.tokens, self.template, first + kept)
            if most is None or len(ids) + self.sampling.tokens <= most:
                self.dropped, self.messages = self.dropped + len(self.messages) - len(kept), kept
                return ids
            later = [i for i, m in enumerate(kept) if m["role"] == "user" and i]
            if not later:
                raise ValueError(
                    f"chat: this message takes {len(ids)} tokens, an answer up to {self.sampling.tokens}, and the "
                    f"model has {most} positions; shorten it, or set --tokens lower"
                )
            kept = kept[later[0] :]


def converse(chat: Chat, lines: Iterator[str], say: Any, prompt: str = "") -> None:
    """Answer each line until there is none or /exit. /reset forgets; Ctrl-C ends an answer.

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
