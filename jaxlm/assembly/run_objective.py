"""A run's objective with its configuration, tokenizer and row shape."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.core import config, registry
from jaxlm.data import packing
from jaxlm.data import token_cache as caches
from jaxlm.models import MODELS
from jaxlm.objectives import OBJECTIVES


@dataclass(frozen=True)
class HostHalf:
    """The objective's host half with its tokenizer, as loader workers need it: picklable."""

    objective: str
    settings: Any
    tokens: Any
    row: dict[str, Any]
    """What a row must fit: see `objectives`."""

    def __call__(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return OBJECTIVES[self.objective].example(self.settings, record | self.row, self.tokens, rng)


def vocabulary(run: config.Run, tokens: Any) -> int:
    """Ids in use: the tokenizer's, and what the objective adds."""
    objective = OBJECTIVES.of(run.objective)
    return objective.vocab(run.objective, tokens) if hasattr(objective, "vocab") else tokens.vocab_size


def window_length(run: config.Run) -> int:
    """Tokens of text in a record."""
    objective = OBJECTIVES.of(run.objective)
    return objective.window(run.objective, run.train.seq_len) if hasattr(objective, "window") else run.train.seq_len


def text_field(run: config.Run) -> caches.sources.Field:
    """Where the text stands in records: in one field, or in two for an objective that learns one text from another."""
    objective = OBJECTIVES.of(run.objective)
    return objective.fields(run.objective) if objective.records == "texts" else run.data.text_field


def fit_texts(run: config.Run, tokens: Any, part: caches.Cache) -> tuple[Any, Any, Any, Any]:
    """Of texts, (lengths, what is kept of them, what they take, room)."""
    objective, kind = OBJECTIVES.of(run.objective), MODELS.of(run.model).kind
    lengths = packing.text_lengths(part, tokens.eos_id)
    return lengths, *objective.fit(run.objective, kind, run.train.seq_len, lengths)


def row_shape(run: config.Run) -> dict[str, Any]:
    return {
        "seq_len": run.train.seq_len,
        "length": window_length(run),
        "kind": MODELS.of(run.model).kind,
        "decoder_start": run.model.decoder_start,
    }


def host_half(run: config.Run, tokens: Any) -> HostHalf:
    return HostHalf(registry.name_of(run.objective), run.objective, tokens, row_shape(run))


def prompts(run: config.Run, tokens: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[list[int]] | None]:
    """What a model of this run reads before it goes on from each text: prompts, and an encoder's sources or None."""
    objective = OBJECTIVES.of(run.objective)
    if not hasattr(objective, "prompt"):
        return [[tokens.bos_id, *tokens.encode(text)] for text in texts], None
    found = [objective.prompt(run.objective, tokens, text, row_shape(run)) for text in texts]
    return [prompt for prompt, _ in found], [source for _, source in found if source is not None] or None


def settled(run: config.Run) -> config.Run:
    """With what an objective takes from its training data, such as the names of labels."""
    objective = OBJECTIVES.of(run.objective)
    if not hasattr(objective, "settle"):
        return run
    return dataclasses.replace(run, objective=objective.settle(run.objective, run.data.train))


def reads_both_ways(run: config.Run) -> bool:
    """Whether prompts are."""
    return getattr(OBJECTIVES.of(run.objective), "both_ways", False)
