"""A run's objective is bound once to its settings, a tokenizer and the shape of a row."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from jaxlm.core import config, registry
from jaxlm.core.spec import Spec
from jaxlm.data import packing, sources
from jaxlm.data.render_chat import turn_ends
from jaxlm.data.token_cache import Cache
from jaxlm.data.tokenizer import Bytes
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.objectives import OBJECTIVES
from jaxlm.objectives.objective import (
    DeviceBatch,
    Example,
    ExampleReader,
    MakePrompts,
    Objective,
    OwnTexts,
    Prediction,
    Prompts,
    PromptSet,
    RowShape,
    Sums,
    TextPairs,
    Tokenizer,
)  # fmt: skip
from jaxlm.objectives.outputs import Predicted
from jaxlm.weights.adapters import METHODS


@dataclass(frozen=True)
class BoundObjective:
    """An objective that needs no more arguments than a record, a batch or a text. It can be pickled for loader workers:
    by its settings, whose class is registered."""

    objective: Objective
    settings: Any
    tokenizer: Tokenizer
    row: RowShape

    def __reduce__(self) -> tuple[Any, ...]:
        return bind, (self.settings, self.tokenizer, self.row)

    @property
    def name(self) -> str:
        """The registered name."""
        return registry.name_of(self.settings)

    @property
    def records(self) -> Literal["packed", "pairs"] | TextPairs | ExampleReader:
        """The kind of record that `example` takes."""
        return self.objective.records

    @property
    def padding(self) -> Literal["keep", "pack", "trim"]:
        """Says how padding in a batch is treated."""
        return "trim" if self.objective.padding == "pack" and not self.row.shared else self.objective.padding

    @property
    def prompts_read_both_ways(self) -> bool:
        """True if a decoder's prompt tokens all see each other."""
        return self.objective.prompts_read_both_ways

    @property
    def goes_on(self) -> bool:
        """True if what is written after a prompt goes on from it; a translation or a chat, say, answers it."""
        answers = isinstance(self.objective.records, TextPairs) or self.objective.chat_template is not None
        return self.row.kind != "encoder_decoder" and not answers

    @property
    def chat_template(self) -> str | None:
        """The chat template that prompts of people are put into; None: there is none, or it reads no chats."""
        own = self.objective.chat_template
        return None if own is None else own(self.settings) or self.row.template

    def check(self) -> None:
        """Raises a ValueError where the settings or the tokenizer will not do."""
        self.objective.check(self.settings, self.tokenizer)

    def specs(self, width: int) -> dict[str, Spec]:
        """Returns specs of the weights that it adds to a model of this width."""
        return self.objective.specs(self.settings, width)

    @property
    def vocab_size(self) -> int:
        """Token ids in use: the tokenizer's, and those that the objective adds."""
        return self.objective.vocab_size(self.settings, self.tokenizer)

    @property
    def window_length(self) -> int:
        """Counts the tokens of text in a record. ValueError: a row is too short for any."""
        return self.objective.window(self.settings, self.row.seq_len)

    @property
    def target_positions(self) -> int:
        """Positions of a row that are predicted."""
        return self.objective.target_positions(self.settings, self.row.seq_len)

    def example(self, record: Any, rng: np.random.Generator) -> Example:
        """Makes one row of a batch."""
        return self.objective.example(self.settings, record, self.row, self.tokenizer, rng)

    def totals(self, batch: DeviceBatch) -> dict[str, jax.Array]:
        """Computes the total weight of each loss over a whole batch."""
        return self.objective.totals(batch)

    def loss(self, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> Sums:
        """Computes the sums of each loss and its metrics."""
        return self.objective.loss(self.settings, model, params, batch, key)

    @property
    def predicts(self) -> bool:
        """True if it makes predictions that are scored beside its loss."""
        return self.objective.prediction is not None

    @property
    def prediction(self) -> Prediction:
        """The part that makes predictions, of an objective that `predicts`."""
        assert self.objective.prediction is not None, f"{self.name} makes no predictions"
        return self.objective.prediction

    def predict(self, model: Model, params: Any, batch: DeviceBatch) -> jax.Array:
        """Computes predictions `[B, …]`."""
        return self.prediction.predict(self.settings, model, params, batch)

    def outputs(self, model: Model, params: Any, batch: DeviceBatch) -> Predicted:
        """Computes what is predicted at each place, of an objective that offers it."""
        assert self.objective.outputs is not None, f"{self.name} offers no outputs to compare"
        return self.objective.outputs(self.settings, model, params, batch)

    def answers(self, records: Sequence[Any], predictions: Sequence[np.ndarray]) -> tuple[list[Any], list[Any]]:
        """Returns true and predicted answers."""
        return self.prediction.answers(self.settings, records, predictions)

    @property
    def needs_reference(self) -> bool:
        """True if records need what the weights that training starts from give for them."""
        part = self.objective.reference
        return part is not None and part.needed(self.settings)

    def reference(self, model: Model, params: Any, batch: DeviceBatch) -> jax.Array:
        """Computes what records store of the reference model, `[B, A]`."""
        assert self.objective.reference is not None
        return self.objective.reference.compute(self.settings, model, params, batch)

    def prompts(self, texts: Sequence[str]) -> Prompts:
        """Returns what a model reads before it goes on from each text."""
        pairs = [self.objective.prompt(self.settings, text, self.row, self.tokenizer) for text in texts]
        return [prompt for prompt, _ in pairs], [inputs for _, inputs in pairs if inputs is not None] or None

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end a text or an answer."""
        template = self.chat_template
        return [self.tokenizer.eos_id, *(turn_ends(self.tokenizer, template) if template else [])]

    @property
    def writes(self) -> OwnTexts[Any] | None:
        """Says how rows are made of what a model writes; None: it can't write such rows."""
        return self.objective.own_texts

    @property
    def reads_prompts(self) -> bool:
        """True if it can read prompts together with the texts that should follow."""
        return self.objective.read_prompts is not None

    def read_prompts(self, source: str, new_tokens: int, make_prompts: MakePrompts) -> PromptSet:
        """Returns the prompts of a source with the texts that should follow, made of texts by `make_prompts`."""
        assert self.objective.read_prompts is not None
        return self.objective.read_prompts(self.settings, source, self.row, self.tokenizer, new_tokens, make_prompts)

    def fit(self, pairs: TextPairs, part: Cache) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
        """Returns the lengths of a cache's texts [n, 2], and what `TextPairs.fit` makes of them."""
        lengths = packing.text_lengths(part, self.tokenizer.eos_id)
        return lengths, *pairs.fit(self.settings, self.row.kind, self.row.seq_len, self.tokenizer, lengths)

    def full_example(self) -> Example:
        """Makes a row of a window that is one long document, for its shapes. ValueError: batches are made of other
        records than windows, which only data can give."""
        if self.records != "packed":
            raise ValueError(
                f"objective: {self.name} makes batches from data, and there is none here; "
                "compile with jaxlm train --dry-run, or plan with --analytic"
            )
        n = self.window_length + 1
        token = 300 % self.vocab_size
        window = packing.Window(
            tokens=np.full(n, token, np.int32), segments=np.ones(n, np.int32), positions=np.arange(n, dtype=np.int32)
        )
        return self.example(window, np.random.default_rng(0))


def bind(settings: Any, tokenizer: Tokenizer, row: RowShape) -> BoundObjective:
    """Binds the objective that these settings belong to. ValueError: their class is that of no registered objective."""
    return BoundObjective(OBJECTIVES.of(settings), settings, tokenizer, row)


def bind_run(run: config.Run, tokenizer: Any, template: str | None = None) -> BoundObjective:
    """Binds a run's objective. `template`: the chat template of the run's model, or None."""
    shape = row_shape(run.train.seq_len, run.model, template, run.adapter)
    if not shape.shared and OBJECTIVES.of(run.objective).records == "packed" and run.data.document_mask:
        raise ValueError(
            f"data.document_mask: the virtual tokens of {registry.name_of(run.adapter)} stand before an encoder's row, "
            "and only the first document would see them; set it to false, or choose another adapter"
        )
    return bind(run.objective, tokenizer, shape)


def row_shape(
    seq_len: int, model: Any, template: str | None = None, adapter: config.Adapter | None = None
) -> RowShape:  # fmt: skip
    """Returns what examples for a model of these settings must fit.

    An encoder reads virtual tokens both ways, as part of the row's one text, so that no texts share a row then. A
    decoder's read nothing of what follows them, and all texts of a row see them.
    """
    kind = MODELS.of(model).kind
    virtual = None if adapter is None else METHODS.of(adapter).virtual_tokens
    shared = kind == "decoder" or virtual is None or not virtual.count(adapter)
    return RowShape(seq_len, kind, model.decoder_start, template, shared)


def infer_from_data(run: config.Run) -> config.Run:
    """Returns the run with what its objective takes from the training data, such as the names of labels."""
    inferred = OBJECTIVES.of(run.objective).infer_from_data(run.objective, run.data.train)
    return dataclasses.replace(run, objective=inferred)


def text_field(settings: Any, field: str) -> sources.Field:
    """Returns where the text of records is: in `field`, or in two fields for an objective that learns one text from
    another."""
    records = OBJECTIVES.of(settings).records
    return records.fields(settings) if isinstance(records, TextPairs) else field


class PlaceholderTokenizer(Bytes):
    """A tokenizer that has only a size and the usual special tokens: batches then have their shapes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.vocab_size = size
        self.mask_id, self.cls_id, self.sep_id, self.pad_id = 4, 5, 6, 0

    @property
    def starts_word(self) -> np.ndarray:
        return np.ones(self.vocab_size, bool)

    def id_of(self, piece: str) -> int | None:
        return Bytes().id_of(piece)


def placeholder_tokenizer(run: config.Run) -> PlaceholderTokenizer:
    """Returns a placeholder of the size that the model's vocabulary leaves when the objective has added its own ids."""
    size = run.model.vocab
    return PlaceholderTokenizer(size - (bind_run(run, PlaceholderTokenizer(size)).vocab_size - size))
