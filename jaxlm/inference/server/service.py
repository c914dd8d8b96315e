"""A Service holds what a server serves: a model's functions, handed in by whoever opened the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.inference.engine import Engine
from jaxlm.inference.sampling import Sampling
from jaxlm.inference.server.tool_calls import Format

Prompt = tuple[list[int], list[int] | None]
"""The ids that a model goes on from, and what an encoder reads."""
ToChat = Callable[[list[dict[str, Any]], Mapping[str, Any], bool], Prompt]
"""Encodes messages with the template's variables; the last argument says whether an answer begins at the end."""
ToPrompt = Callable[[str, bool, bool], Prompt]
"""Encodes a text: with the ids that stand before a text, and reading special tokens that it spells, or not."""
Embed = Callable[[Sequence[str | list[int]]], tuple[np.ndarray, int]]
"""Returns a vector of each text or list of ids, and the number of tokens that were read."""
Classify = Callable[[Sequence[Any]], list[dict[str, Any]]]
"""Returns what a fine-tuned head says of each input."""


@dataclass(frozen=True)
class Service:
    """A Service is what one server serves. What is None the model can't do."""

    name: str
    tokens: Tokenizer
    created: int
    engine: Engine | None = None
    adapters: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    """The settings of requests that say nothing."""
    own_length: bool = False
    """Whether the number of new tokens in `sampling` is the model's own advice and not merely a default."""
    encode_chat: ToChat | None = None
    encode_prompt: ToPrompt | None = None
    template: str | None = None
    calls: Format | None = None
    """How the model writes calls of tools."""
    embed: Embed | None = None
    classify: Classify | None = None
    encodes_apart: bool = False
    """Whether an encoder reads the prompt, so that an answer's own tokens begin anew."""
    close: Callable[[], None] = lambda: None
    """Ends what serves beside the engine, such as the process of the chat template."""
    kind: str = "a model"
    """The kind of model as error messages say it, such as `an encoder`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names by which requests may ask for the model, alone or with an adapter."""
        return (self.name, *self.adapters)
