"""Declares what a family of architectures must have: Protocols of the modules in `models/`, and a base of configs.

They stand below `models` because whatever takes a family is typed by them, adapters and file formats too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import jax

from jaxlm.core.weight_names import Name
from jaxlm.nn.cache import Cache
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import Readout
from jaxlm.nn.moe import Moe

Kind = Literal["decoder", "encoder", "encoder_decoder"]
Batch = Mapping[str, Any]
"""Arrays `[B, T]` by name; see `Family.forward`."""
Key = jax.Array | None
"""A key turns dropout on; None is evaluation."""


Task = Literal["SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"]
"""What published models with a head of a task's own are for, as the names of their classes end after "For"."""


class Outputs(NamedTuple):
    """Outputs are what a published config.json says of a task's head."""

    labels: tuple[str, ...]
    """The name of each output, in their order; empty: they are not known yet."""
    problem_type: str = ""
    """regression, single_label_classification or multi_label_classification; empty: it says nothing."""


class TaskLayer(NamedTuple):
    """A task layer is a dense layer that heads of tasks read the model's states through."""

    weight: str
    """Path of its matrix; its bias is `{weight}_bias`."""
    activation: str
    norm: str = ""
    """Path of the scale of a LayerNorm behind it; empty: none."""
    eps: float = 0.0
    each: bool = False
    """Heads that read every token read it through this too, not only those that read a text as a whole."""


class ModelConfig:
    """A ModelConfig is the base of every family's `Config`: what a family doesn't have reads as the neutral value.

    These are no dataclass fields, so a config has just the fields that its family declares.
    """

    vocab: int
    layers: int
    width: int
    heads: int
    positions: int | None = None
    """Longest sequence; None: no limit."""
    tied: bool = True
    """The head is the embedding."""
    head: bool = True
    """The model predicts tokens: it has a head, of its own or tied."""
    types: int = 0
    """Segment (token type) embeddings; 0: none."""
    pooler: bool = False
    """A dense layer on the first token: the weights `pooler` and `pooler_bias`."""
    mean_pooling: bool = False
    """Heads of tasks read the mean of a text's states, not the state of one token."""
    window: int | None = None
    """Sliding-window attention over this many positions, in the layers that `windowed` names."""
    windowed: tuple[bool, ...] = (True,)
    """Which layers the window holds for, as a pattern that repeats."""
    moe: Moe | None = None
    """The layers' mixture of experts."""
    decoder_start: int | None = None
    """Id of the token that an encoder-decoder's targets begin after; None: it has none of its own."""
    model_type: str = ""
    """What published files of this model call its architecture."""
    layer_counts: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """Fields that count the layers of a stack, by the stack's path; of others `layers` alone does."""
    layer_patterns: tuple[str, ...] = ("windowed",)
    """Fields that say how layers differ, as patterns that repeat, if the config has them."""

    width_fields: tuple[str, ...] = ("width", "heads", "kv_heads", "ffn")
    """Fields that grow with the width, of those that the config has and that aren't None."""

    def at_width(self, width: int) -> Any:
        """Returns the config of another width, whose heads, ffn and experts are more in proportion; a head is as wide.
        ValueError: a size would be no whole number."""
        own = {f.name for f in fields(self)}  # type: ignore[arg-type]

        def grown(name: str, size: int) -> int:
            if size * width % self.width:
                raise ValueError(
                    f"model.{name}: {size} at model.width {self.width} would be no whole number at {width}; choose "
                    "another width"
                )
            return size * width // self.width

        sizes = {name: size for name in self.width_fields if name in own and (size := getattr(self, name)) is not None}
        changes: dict[str, Any] = {name: grown(name, size) for name, size in sizes.items()}
        if self.moe is not None:
            ffn, shared = grown("moe.ffn", self.moe.ffn), grown("moe.shared", self.moe.shared)
            changes["moe"] = replace(self.moe, ffn=ffn, shared=shared)
        return replace(self, **changes)  # type: ignore[type-var]

    def at_depth(self, layers: int) -> Any:
        """Returns the config of another number of layers."""
        return replace(self, layers=layers)  # type: ignore[type-var]

    def with_experts(self, moe: Moe) -> tuple[str, dict[str, Any]]:
        """Returns the name and the fields of the family that has experts where this one has a feed-forward network.
        ValueError: there is none, or it can't express this model."""
        raise ValueError("experts: no family has this one's layers with experts; choose a model of Llama's kind")

    @property
    def task_layer(self) -> TaskLayer | None:
        """The layer before heads of tasks; None: these read the states as they are."""
        return None

    @property
    def target_start(self) -> int:
        """The token that an encoder-decoder's targets begin after. ValueError: the model has none of its own."""
        if self.decoder_start is None:
            raise ValueError("model.decoder_start: this model has none; set the id that its targets begin after")
        return self.decoder_start


def _unchanged(c: Any, tensors: Collection[str]) -> Any:
    return c


@dataclass(frozen=True)
class TaskFiles:
    """A TaskFiles says what published files of a model with a task's head hold."""

    config: Any
    """The model beneath the head: with the layers that the head reads, without heads of other tasks."""
    names: Mapping[str, Name]
    """Where each weight stands, by our paths; `task` and `task_bias` are the head's matrix and its bias, if it has
    one."""
    values: Callable[[], dict[str, Any]]
    """() → what config.json says of the architecture. ValueError: files of its `model_type` can't express the model."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors that early files hold and no output depends on."""


def no_task_files(c: Any, task: Task) -> TaskFiles | None:
    """Returns None: no published file has a head of this task."""
    return None


@dataclass(frozen=True)
class Files:
    """A Files says how published files of a family differ from what its table of names and their config.json say."""

    prefixes: tuple[str, ...] = ()
    """What names of the bare model's files leave out; several: any of them."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors that say nothing."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Names of copies, and of the tensor that each must equal."""
    infer_from_files: Callable[[Any, Collection[str]], Any] = _unchanged
    """(config, names of the files' tensors) → config with the heads that the files have."""
    task: Callable[[Any, Task], TaskFiles | None] = no_task_files
    """(config, task) → how files of a model with the task's head look; None: there are none."""


class Published(Protocol):
    """A Published family can read and write published files."""

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]:
        """Returns what config.json calls the architectures; empty where there are no such files."""

    @property
    def FILES(self) -> Files:
        """Returns how the files differ from the table of names."""

    def names(self, c: Any, /) -> Mapping[str, Name]:
        """Returns where each of our weights stands in the files, by our paths."""

    def from_hf(self, values: dict[str, Any], /) -> Any:
        """Returns the `Config` that a config.json describes. ValueError: it can't be done exactly."""

    def to_hf(self, c: Any, /) -> dict[str, Any]:
        """Returns what config.json says of the architecture. ValueError: its `model_type` can't express this model."""


class Family(Published, Protocol):
    """A Family is an architecture: a module of functions of its `Config`, `c`, and its weights' `specs`."""

    @property
    def Config(self) -> type[ModelConfig]:
        """Returns the frozen dataclass of shapes and switches; every field has a default."""

    @property
    def kind(self) -> Kind:
        """Returns whether it is a decoder, an encoder or both."""

    @property
    def generates(self) -> bool:
        """Returns whether each position predicts the next token."""

    def attention_width(self, c: Any, /) -> int:
        """Returns layers × heads × head width, which attention's FLOPs grow with."""

    def specs(self, c: Any, /) -> dict[str, Any]:
        """Returns the weights as a tree of `Spec`; layers are stacked. ValueError: sizes don't fit each other."""

    def forward(
        self,
        c: Any,
        specs: Any,
        params: Any,
        batch: Batch,
        *,
        shard: Layout,
        key: Key = None,
        cache: Cache | None = None,
    ) -> Output:
        """Computes the last layer's states of a batch.

        `batch`: arrays `[B, T]` by name: `tokens`, `positions`, `segments` …; an encoder-decoder's other side in
        `source`, `source_segments` and `source_positions`. With a `cache` the tokens are read after those it holds.
        """

    def readout(self, c: Any, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
        """Returns what the vocabulary's logits are made of. ValueError: the model has no head."""

    def init_cache(self, c: Any, rows: int, length: int, dtype: Any, slack: int = 0) -> Cache:
        """Returns an empty cache for rows of `length`. `slack`: tokens that one call may add beyond the first.

        ValueError: the family doesn't generate.
        """


class RunsItself(ABC):
    """A family that extends RunsItself calls modules of somebody else's, which attend, loop over their layers and
    recompute activations as they are written: a run chooses none of that for them."""

    @abstractmethod
    def check_layout(self, c: Any, shard: Layout) -> None:
        """Refuses what the modules can't be made to do. ValueError: the layout asks for it."""

    @abstractmethod
    def describe(self, c: Any, dtype: str) -> Mapping[str, str]:
        """Returns what a run's notes say of how the modules run where `dtype` is asked for, by topic."""


def no_cache(c: Any, rows: int, length: int, dtype: Any, slack: int = 0) -> Cache:
    """Refuses a cache: the `init_cache` of families that don't generate."""
    raise ValueError("model: an encoder has no cache, because it generates nothing; choose a model that does")
