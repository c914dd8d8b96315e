"""An objective is one frozen record, which the last line of each file in this folder makes.

`C` is the class of an objective's settings. Nobody probes for a member: what an objective leaves out has a neutral
default, and what belongs together is one optional part.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypedDict, TypeVar

import jax
import numpy as np

from jaxlm.core.batch import Batch
from jaxlm.core.spec import Spec
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.labelled import tables
from jaxlm.models.model import Model
from jaxlm.nn.family import Outputs, Task
from jaxlm.objectives.outputs import Predicted

C = TypeVar("C")
C_in = TypeVar("C_in", contravariant=True)

Kind: TypeAlias = Literal["decoder", "encoder", "encoder_decoder"]
Example: TypeAlias = Batch[np.ndarray]
"""One row of a batch, made by the host half."""
DeviceBatch: TypeAlias = Batch[jax.Array]
Sums: TypeAlias = dict[str, dict[str, jax.Array]]
"""Sums over tokens or rows, by the name of the loss: `loss`, which is minimised, and its metrics."""
Prompts: TypeAlias = tuple[list[list[int]], list[list[int]] | None]
"""Token ids that a model reads before it goes on from each text, and what an encoder reads of it or None."""
MakePrompts: TypeAlias = Callable[[Sequence[str]], Prompts]
"""(texts) → what a model reads of each."""


class Tokenizer(tokenizers.Tokenizer, Protocol):
    """A tokenizer whose vocabulary can mark where a text begins and ends, which training needs."""

    bos_id: int
    eos_id: int


@dataclass(frozen=True)
class RowShape:
    """A row shape is what an example must fit: the length of a row, and what the model says of texts."""

    seq_len: int
    """Positions of a row; of an encoder-decoder those of its encoder."""
    kind: Kind = "decoder"
    """Kind of the model's family."""
    decoder_start: int | None = None
    """Id that the model's targets begin after, where the model is an encoder-decoder that names one."""
    template: str | None = None
    """The model's chat template, or None."""
    shared: bool = True
    """Whether texts that know nothing of each other may share a row."""


class Record(TypedDict):
    """A record is what an `ExampleReader` makes of one labelled example or conversation; each objective adds keys that
    it reads."""

    where: str
    """File and line; empty where several examples of a file share the record."""


class Loss(Protocol[C_in]):
    """Computes sums over the tokens or rows of a batch, so that micro-batches, shards and hosts just add.

    They, and the totals, are linear in `weights` or `rows`: an evaluation learns from that what each document or
    example adds. Where they aren't, figures are resampled by batch.
    """

    def __call__(self, c: C_in, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None, /) -> Sums: ...


class MakeExample(Protocol[C_in]):
    """Makes one row of a batch from a record, in numpy; the same record and `rng` give the same row."""

    def __call__(self, c: C_in, record: Any, row: RowShape, tokenizer: Tokenizer, rng: np.random.Generator, /
                 ) -> Example: ...  # fmt: skip


class MakePrompt(Protocol[C_in]):
    """Returns the tokens that a model goes on from, and what its encoder reads or None."""

    def __call__(self, c: C_in, text: str, row: RowShape, tokenizer: Tokenizer, /
                 ) -> tuple[list[int], list[int] | None]: ...  # fmt: skip


# ---------------------------------------------------------------------------------------------- where records come from


class ReadExamples(Protocol[C_in]):
    """Returns the records of a source, and lines that a user should see. ValueError: says what is wrong in a file."""

    def __call__(self, c: C_in, source: str, row: RowShape, tokenizer: Tokenizer, /
                 ) -> tuple[list[Any], list[str]]: ...  # fmt: skip


def record_ids(record: Any) -> list[Sequence[int]]:
    """Returns the token ids of a record that is one text."""
    return [record["ids"]]


@dataclass(frozen=True)
class ExampleReader(Generic[C]):
    """The objective reads labelled examples or conversations itself; its records are `Record`s."""

    read: ReadExamples[C]
    texts: Callable[[Any], list[Sequence[int]]] = record_ids
    """(record) → token ids of each of its texts: validation texts that are training texts too are reported."""
    shares_rows: bool = False
    """Whether each of a record's texts is an example by itself, a segment of the record's row."""


@dataclass(frozen=True)
class TextPairs(Generic[C]):
    """Records are pairs of texts in two fields, as many as fit a row."""

    fields: Callable[[C], tuple[str, str]]
    """Names of the two fields, or endings of files with a text a line."""
    fit: Callable[[C, Kind, int, Tokenizer, np.ndarray], tuple[np.ndarray, np.ndarray, tuple[int, int]]]
    """(settings, kind of model, seq_len, tokenizer, tokens of each pair [n, 2]) → tokens that stay of each pair's texts
    [n, 2], what they take of a row's two rooms [n, 2], and the rooms."""
    packs: Callable[[C], bool]
    """Whether a row holds as many pairs as fit, or one."""


# ------------------------------------------------------------------------------------------------------ optional parts


@dataclass(frozen=True)
class Use(Generic[C]):
    """A use says how inputs without labels are read, and what a user is told of each."""

    rows: Callable[[C, str], Iterable[tables.Row]]
    """(settings, file) → its inputs. ValueError: says what is wrong in the file."""
    column: Callable[[C], str]
    """(settings) → the cell of an input that a plain text stands for; empty: an input has several."""
    records: Callable[[C, Sequence[tables.Row], RowShape, Tokenizer], list[Any]]
    """(settings, inputs, row, tokenizer) → records without a label; several may belong to one input."""
    told: Callable[[C, Sequence[Any], Sequence[np.ndarray]], list[dict[str, Any]]]
    """(settings, records, predictions) → plain values of each input, such as `label` and `probabilities`."""
    fit: Callable[[C, Sequence[tables.Row]], C] = lambda c, lines: c
    """(settings of a published model's head, inputs) → the settings that read these inputs: a published model's files
    don't say what a table's columns are called."""


@dataclass(frozen=True)
class Prediction(Generic[C]):
    """Predictions that are scored beside the loss, of an objective whose `records` are an `ExampleReader`."""

    predict: Callable[[C, Model, Any, DeviceBatch], jax.Array]
    """(settings, model, params, batch) → [B, …], as `of` says."""
    answers: Callable[[C, Sequence[Any], Sequence[np.ndarray]], tuple[list[Any], list[Any]]]
    """(settings, records, predictions) → true and predicted answers, where several records may share one answer."""
    scores: str
    """The row of `evaluation/task_scores.py` that scores them."""
    use: Use[C] | None = None
    """How inputs without labels are predicted; None: only labelled examples are."""
    of: Literal["row", "text", "position"] = "row"
    """What is predicted: `[B, …]` for a row; `[B, K, …]` for each of the K texts that may share it, or `[B, T, …]` for
    each position, of which a record's prediction is its part."""


@dataclass(frozen=True)
class TaskHead(Generic[C]):
    """A task head is one that published models have too."""

    task: Task
    weight: str
    """Path of its matrix among `specs`; its bias is `{weight}_bias`."""
    logits: Callable[[C, Model, Any, DeviceBatch], jax.Array]
    """(settings, model, params, rows of one text that is read at `at`) → its outputs, `[B, L]` or `[B, T, L]`."""
    read: Callable[[Outputs], C]
    """(what config.json says) → settings. ValueError: there is no such head here."""
    write: Callable[[C], Outputs]
    with_bias: Callable[[C, bool], C] = lambda c, bias: c
    """(settings, whether published heads of the model's family have a bias) → settings that leave it open no more."""
    with_labels: Callable[[C, tuple[str, ...]], C] | None = None
    """(settings, labels) → settings with these labels; None: outputs have no names of their own."""


@dataclass(frozen=True)
class Reference(Generic[C]):
    """A reference is what the weights that training starts from give for each row; records store it as `reference`."""

    needed: Callable[[C], bool]
    compute: Callable[[C, Model, Any, DeviceBatch], jax.Array]
    """(settings, model, params, batch) → [B, A]."""


class Asked(NamedTuple):
    """An Asked is what a model reads before it writes a text of its own."""

    prompt: list[int]
    inputs: list[int] | None = None
    """What its encoder reads."""
    end: tuple[int, ...] = ()
    """The tokens that stand after an answer that the model ends."""


class Written(NamedTuple):
    """A Written is a text that a model wrote: what it was asked, and the tokens of its answer, the end included."""

    asked: Asked
    answer: list[int]


@dataclass(frozen=True)
class OwnTexts(Generic[C]):
    """Rows can be made of texts that the model writes itself, so that a task is kept without its data."""

    asked: Callable[[C, Any, RowShape, Tokenizer], list[Asked]] | None
    """(settings, a record of a later task's data, row, tokenizer) → what the model is asked in it; None: it writes from
    the beginning of a text."""
    record: Callable[[C, Sequence[Written], RowShape, Tokenizer], Any]
    """(settings, texts that share a row, row, tokenizer) → the record that `example` makes the row of."""
    packs: Callable[[C, Kind], bool]
    """Whether a row holds as many texts as fit, or one."""


class PromptSet(NamedTuple):
    """A prompt set holds prompts with the texts that should follow them."""

    prompts: list[list[int]]
    encoder_inputs: list[list[int]] | None
    targets: list[str]
    notes: list[str]
    """Lines that a user should see."""


class ReadPrompts(Protocol[C_in]):
    """Returns the prompts of a source and the true texts, so that what a model writes can be compared with them.

    `new_tokens`: how many the model may write, for which room is left. `make_prompts`: makes token ids of texts as the
    model reads them.
    """

    def __call__(self, c: C_in, source: str, row: RowShape, tokenizer: Tokenizer, new_tokens: int,
                 make_prompts: MakePrompts, /) -> PromptSet: ...  # fmt: skip


# ---------------------------------------------------------------------------------------------------- neutral defaults


def no_specs(c: Any, width: int) -> dict[str, Spec]:
    """Returns no weights."""
    return {}


def accept(c: Any, tokenizer: tokenizers.Tokenizer) -> None:
    """Accepts every tokenizer."""


def unchanged(c: C, sources: Sequence[str]) -> C:
    """Returns the settings as they are."""
    return c


def same_order(c: C, weights: Mapping[str, Any]) -> tuple[C, Mapping[str, Any]]:
    """Returns the settings and the weights as they are."""
    return c, weights


def whole_row(c: Any, seq_len: int) -> int:
    """Returns the length of a row."""
    return seq_len


def no_tokens(c: Any, seq_len: int) -> int:
    """Returns 0: a head of its own is read, and not that of the vocabulary."""
    return 0


def tokenizer_size(c: Any, tokenizer: tokenizers.Tokenizer) -> int:
    """Returns the size of the tokenizer's vocabulary."""
    return tokenizer.vocab_size


def text_after_bos(c: Any, text: str, row: RowShape, tokenizer: Tokenizer) -> tuple[list[int], None]:
    """Returns BOS and the text."""
    return [tokenizer.bos_id, *tokenizer.encode(text)], None


@dataclass(frozen=True)
class Objective(Generic[C]):
    """An objective is what a model is trained to do. `assembly` binds it once to its settings, a tokenizer and the
    shape of a row."""

    Config: type[C]
    """The class of its settings, a frozen dataclass."""
    records: Literal["packed", "pairs"] | TextPairs[C] | ExampleReader[C]
    """What `example` takes: windows of documents (`data.packing.packed`), two spans of text (`data.packing.pairs`),
    pairs of texts (`data.packing.texts`), or records that it reads itself."""
    models: tuple[Kind, ...]
    """Kinds of families that it trains."""
    example: MakeExample[C]
    """The host half."""
    totals: Callable[[DeviceBatch], dict[str, jax.Array]]
    """(batch) → the total weight of each of its losses over a whole batch, a scalar by name."""
    loss: Loss[C]
    """The device half. The step divides its sums once by the totals of the whole batch."""

    specs: Callable[[C, int], dict[str, Spec]] = no_specs
    """(settings, width of the model) → specs of the weights that it adds, such as a classification head."""
    check: Callable[[C, Tokenizer], None] = accept
    """Raises a ValueError that names the field where the settings are wrong or the tokenizer lacks what it needs."""
    infer_from_data: Callable[[C, Sequence[str]], C] = unchanged
    """(settings, training sources) → settings with what they take from the data, such as the names of labels."""
    window: Callable[[C, int], int] = whole_row
    """(settings, seq_len) → tokens of text in a record."""
    target_positions: Callable[[C, int], int] = whole_row
    """(settings, seq_len) → positions of a row where tokens of the vocabulary are predicted."""
    vocab_size: Callable[[C, Tokenizer], int] = tokenizer_size
    """(settings, tokenizer) → token ids in use: the tokenizer's, and those that it adds."""
    prompt: MakePrompt[C] = text_after_bos
    prompts_read_both_ways: bool = False
    """Whether a decoder's prompt tokens all see each other."""
    padding: Literal["keep", "pack", "trim"] = "keep"
    """What becomes of padding in a batch of one text a row: it is kept; texts share rows as segments, whatever row
    `example` put them in (`data.packing.share_rows`); or the columns that are padding in every row are left out."""

    chat_template: Callable[[C], str] | None = None
    """(settings) → the chat template of their own, empty if they have none; None: it doesn't read chats."""
    as_published: Callable[[C, Mapping[str, Any]], tuple[C, Mapping[str, Any]]] = same_order
    """(settings, weights of a model) → both as published files have them, where an older version of the objective read
    the outputs of its head in another order."""
    prediction: Prediction[C] | None = None
    head: TaskHead[C] | None = None
    reference: Reference[C] | None = None
    outputs: Callable[[C, Model, Any, DeviceBatch], Predicted] | None = None
    """(settings, model, params, batch) → what is predicted at each place, for losses that compare two models or need no
    targets; None: such losses can't be had."""
    read_prompts: ReadPrompts[C] | None = None
    own_texts: OwnTexts[C] | None = None
    """How rows are made of what a model writes; None: it can't write such rows."""

    def __post_init__(self) -> None:
        if self.padding == "pack" and self.prediction is not None and self.prediction.of == "row":
            raise ValueError("prediction.of: texts share rows (padding=pack), so that predictions are of texts or of "
                             "positions")  # fmt: skip
