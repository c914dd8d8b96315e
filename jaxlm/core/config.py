"""A run is described by frozen, typed, nested dataclasses; a config file defines a function `config() -> Run`.

`Run` is generic in the two parts that belong to a family: `Run[llama.Config, causal.Config]`. Those dataclasses are
defined beside the code that reads them (`models/llama.py`, `objectives/causal.py`), and so are the settings of each
method of fine-tuning (`weights/adapters/lora.py`), subclasses of `Adapter`; all others are here. Nothing here imports
jax.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

from jaxlm.core.compression import Compression
from jaxlm.core.continual import Continual
from jaxlm.core.distillation import Distill
from jaxlm.core.distributed import Distributed
from jaxlm.core.ranges import BelowOne, Count, Natural, NonNegative, Positive, PositiveShare, Range
from jaxlm.core.registry import register
from jaxlm.core.transfer import Transfer

M = TypeVar("M")  # a model's Config
O = TypeVar("O")  # an objective's Config  # noqa: E741


@dataclass(frozen=True)
class Data:
    """Names the sources of text and how it becomes tokens."""

    train: tuple[str, ...] = ("stdlib",)
    """Sources: stdlib, a file, folder or glob of text, JSONL (.gz, .zst), Parquet, tfds:NAME/CONFIG[:split]."""
    weights: tuple[NonNegative, ...] = ()
    """Mixture weight of each training source: its share of a batch's rows; empty: the rows that it fills."""
    valid: tuple[str, ...] = ()
    """Validation sources; empty: `holdout` of the whole documents of every training source."""
    test: tuple[str, ...] = ()
    """Test sources, which neither train the model nor choose its checkpoint: the checkpoint that the run uses is scored
    on them once, at the end; empty: none."""
    holdout: BelowOne = 0.02
    """Share of documents held out for validation where `valid` is empty."""
    text_field: str = "text"
    """Field that holds the text in JSONL, Parquet and TFDS records."""
    tokenizer: str = "sentencepiece:8192"
    """sentencepiece:VOCAB trains one on the training text; else a .model, a tokenizer.json, a folder, or bytes."""
    cache: str = "~/.cache/jaxlm"
    """Folder for tokenizers and token caches; safe to delete."""
    document_mask: bool = True
    """Keep each token from attending to other documents of its packed window."""
    compare_compression: bool = False
    """Compress the validation text with gzip -9 and xz -9 at the end, for comparison."""
    tokenize_workers: Natural = 2
    """Processes that tokenise."""
    workers: Natural = 0
    """Processes that make training batches; 0: a thread of this one."""


@dataclass(frozen=True)
class Optim:
    """Chooses the optimizer, its schedule and the parameters they change.

    Patterns are regular expressions that are searched in paths such as `a/b/c`.
    """

    name: str = "adamw"
    """adamw, sgd, lion, adafactor, muon, or what another package registers."""
    lr: NonNegative = 1e-3
    """Peak learning rate; with muon that of its AdamW groups."""
    schedule: str = "cosine"
    """constant, linear, cosine, inverse_sqrt, wsd, or what another package registers."""
    warmup: Natural = 100
    """Steps of linear warm-up from zero."""
    decay: PositiveShare = 0.2
    """wsd: share of all steps spent in the final linear decay."""
    final: NonNegative = 0.1
    """Learning rate at the end, as a share of the peak (linear, cosine, wsd)."""
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.95
    eps: NonNegative = 1e-8
    momentum: BelowOne = 0.9
    """sgd: momentum; 0 turns it off."""
    muon_lr: NonNegative = 0.02
    """muon: learning rate of the hidden matrices, scaled by sqrt(max(1, rows / columns))."""
    muon_momentum: BelowOne = 0.95
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay; adafactor too. Norm scales and biases are never decayed."""
    no_decay: tuple[str, ...] = ()
    """Further paths that are not decayed."""
    adamw_paths: tuple[str, ...] = ()
    """muon: further hidden matrices that AdamW takes instead."""
    freeze: tuple[str, ...] = ()
    """Paths that are not trained: no gradient, no optimizer state, no decay."""
    layer_decay: Positive = 1.0
    """Learning rate of each layer as a share of that of the layer above it; embeddings count as the layer below the
    first, heads as that above the last (0.65–0.95 in fine-tuning, as in ULMFiT and ELECTRA). Layers of an encoder and a
    decoder are each counted from their own last one."""
    top_layers: Natural | None = None
    """Number of last layers that are trained, with the heads, of an encoder-decoder on both sides; None: all. `freeze`
    leaves out whole kinds of weights."""
    only_layers: tuple[Natural, ...] = ()
    """Numbers from 0 of the layers that alone are trained, with the heads, such as those that `jaxlm grow` added; of an
    encoder-decoder on both sides. Empty: all."""
    clip: NonNegative = 1.0
    """Global gradient norm above which gradients are scaled down; 0: off."""
    ema: BelowOne = 0.0
    """Decay of an exponential moving average of the weights, used for validation and samples; 0: off."""
    moments: Literal["fresh", "start"] = "fresh"
    """What the optimizer remembers at first. fresh: nothing; start: what that of the run which this one starts from
    remembered at its end, or what `jaxlm grow` made of that."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """No adapter: all weights are trained.

    Each method that trains few parameters has a subclass of its own with further fields, beside its code: `Lora`, `Ia3`
    … of `jaxlm.weights.adapters`. The base model's weights then stay as they are; heads of the objective are trained.
    """

    base: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"
    """How the layers' frozen matrices are stored. nf4: 4.1 bits a weight (QLoRA)."""


register(Adapter, "none")  # so that a run without an adapter needs no module of adapters


@dataclass(frozen=True)
class Train:
    """Says what one run does: its steps, batches, validations and checkpoints."""

    steps: Count = 1000
    batch_size: Count = 32
    """Sequences per update, over all devices and micro-batches."""
    seq_len: Count = 256
    micro_batches: Count = 1
    """Gradient accumulation: parts an update's batch is split into."""
    eval_every: Natural = 200
    """Steps between validations; 0: only at the end."""
    eval_batches: Natural = 0
    """Validation batches; 0: the whole validation set."""
    sample_every: Natural = 0
    """Steps between samples; 0: before and after training only."""
    prompts: tuple[str, ...] = ("def ", "import ", "The ")
    sample_tokens: Count = 64
    patience: Natural = 0
    """Early stopping: validations without improvement of `metric`; 0: off."""
    metric: str = "loss"
    """Validation metric that tells which checkpoint is best: the lowest of a loss, a perplexity or an error, the
    highest of a score; for a metric of your own write min:NAME or max:NAME."""
    use: Literal["last", "best"] = "last"
    """Checkpoint that eval, generate, embed and export use if none is named."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is NaN or Inf: stop naming the examples, or skip the update and count it."""
    log_every: Count = 10
    watchdog: Annotated[float, Range(0, below=False)] = 0.0
    """Seconds without a finished step until the stacks of all threads are written to the run directory; 0: ten times
    the slowest step, at least five minutes; inf: never."""
    stuck: Literal["tell", "exit"] = "tell"
    """Action when the watchdog has written: tell does nothing more; exit ends with status 1, for a launcher that
    starts the run again."""
    save_every: Natural = 200
    """Steps between checkpoints; 0: only at the end."""
    keep: Count = 3
    """Checkpoints that are retained, besides the best one."""


@dataclass(frozen=True)
class Mesh:
    """Sets the sizes of mesh axes, outer to inner, and changes the tables that map logical axes to them."""

    replica: int = 1
    stage: int = 1
    """Pipeline stages: each holds and computes its part of the layers."""
    rounds: Count = 1
    """Times that activations go round the stages, each stage computing a part of its layers at a time. More rounds mean
    less waiting, but weights travel once a pass, and there must be at least as many micro-batches as stages."""
    pipeline_micro: Count | None = None
    """Parts into which the rows of a pass are split for the stages; default: up to twice as many as stages."""
    data: int | None = None
    """Default: all devices that the other axes leave."""
    fsdp: int = 1
    context: int = 1
    """Devices that share the positions of a row."""
    context_by: Literal["gather", "ring", "heads"] = "gather"
    """How attention works across them. gather: every device gathers all keys and values; ring: these travel in a ring,
    so that no device holds all; heads: positions are exchanged for heads before attention and back after it."""
    expert: int = 1
    tensor: int = 1
    axis_type: Literal["auto", "explicit"] = "auto"
    """explicit: sharding in types, where a missing annotation is an error (used in tests)."""
    zero: Literal[1, 2, 3] = 3
    """ZeRO's stage: the fsdp axis shards the optimizer's state (1), gradients too (2), the weights too (3)."""
    expert_dispatch: Literal["all_to_all", "replicate"] = "all_to_all"
    """all_to_all: the expert axis splits the batch too, and tokens travel to their experts and back. replicate: its
    devices have the same tokens, and their results are summed."""
    store: tuple[str, ...] = ()
    """Changes to the mesh axes that weights are stored over: `embed=fsdp+data`, `vocab=` (none)."""
    compute: tuple[str, ...] = ()
    """Changes to the mesh axes over which a block uses weights and activations. `stream=context+tensor` splits norms
    and residuals over the tensor axis too (sequence-parallel norms)."""
    replicated: tuple[str, ...] = ()
    """Path patterns of large weights that may be stored unsharded on a mesh that could shard them."""


CacheKind = Literal["dtype", "int8", "fp8"]


@dataclass(frozen=True)
class Execution:
    """Says how a run's mathematics is executed; this changes results by no more than rounding."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of matrix products and activations, and of sums over devices of matrices' gradients. Weights, norms, softmax
    and losses stay in float32."""
    matmul: Literal["dtype", "fp8", "mxfp8", "int8"] = "dtype"
    """How layers multiply activations by their matrices in training. fp8: activations and weights as e4m3, gradients as
    e5m2, one scale a tensor (a GPU from Ada or Hopper on, or a TPU 7x). mxfp8: all three as e4m3, of which 32 in a row
    share a power of two (a GPU from Blackwell on). int8: a scale for each token and each output, gradients of weights
    in `dtype` (a TPU v5e, v5p or v6e, or an NVIDIA GPU from Turing on). Results, heads, routers, experts and attention
    stay in `dtype`. A CPU computes the same numbers without being faster."""
    matmul_skip_first: Natural = 0
    """First layers of each stack that multiply in `dtype` whatever matmul is."""
    matmul_skip_last: Natural = 0
    """Last layers of each stack that multiply in `dtype` whatever matmul is."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """auto: the fused kernel if it supports the run (cudnn on GPUs, splash on TPUs), else xla."""
    verify: bool = True
    """Compare the fused kernel with plain attention on the devices once, when a run begins or goes on, on the documents
    of its next batch; a run whose kernel gives something else is refused."""
    remat: Literal["none", "dots", "attention", "qkv", "full"] = "none"
    """Activations that the backward pass recomputes. none: none, but in a loop over layers those that aren't products,
    attention or dropout's factors (norms, gates, rotations), for reading them back would take as long; dots: all but
    matrix products; attention: all but attention's result and the products around it (the mlp's wide ones are
    recomputed); qkv: all but queries, keys and values; full: all of each block. Weights that FSDP shards are gathered
    again in any case."""
    offload: tuple[Literal["optimizer", "input", "q", "k", "v", "attended", "o"], ...] = ()
    """Arrays that stay in the host's memory until they are needed: the optimizer's state, and each block's input,
    queries, keys, values, attention result, and the product after it (with remat attention, qkv or full)."""
    scan: bool | None = None
    """Loop over layers, which compiles one layer, or unroll them; default: unroll on a CPU, whose loops are slower,
    else loop. Checkpoints are the same."""
    loss_chunk: Natural = 0
    """Tokens whose logits exist at one time; 0: as many as take 4 MiB on a CPU, a 64th of the memory or 256 MiB on an
    accelerator."""
    cache: CacheKind = "dtype"
    """How the keys and values of tokens that were read are stored while text is made. dtype: as they are computed;
    int8, fp8: in a byte each with a scale for each head and token, which rounds them."""
    flags: tuple[str, ...] = ()
    """Compiler options for the train step: NAME=VALUE, or a preset such as tpu_sparse_core."""


@dataclass(frozen=True)
class Run(Generic[M, O]):
    """Holds everything that determines a run; it is written to `config.json` in the run directory."""

    name: str
    model: M
    objective: O
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    adapter: Adapter = field(default_factory=Adapter)
    compression: Compression = field(default_factory=Compression)
    train: Train = field(default_factory=Train)
    continual: Continual = field(default_factory=Continual)
    distill: Distill = field(default_factory=Distill)
    distributed: Distributed = field(default_factory=Distributed)
    transfer: Transfer = field(default_factory=Transfer)
    mesh: Mesh = field(default_factory=Mesh)
    execution: Execution = field(default_factory=Execution)
    start: str = ""
    """Model whose weights, architecture and tokenizer the run starts from: a run directory, a Hugging Face directory,
    hf:OWNER/NAME or a .gguf file; empty: fresh weights."""
    start_layers: tuple[Natural, ...] = ()
    """Numbers from 0 of the layers of that model that this one has, in their order: `0 2 4`, a small student of a
    larger teacher; of an encoder-decoder on both sides. Empty: all."""
    seed: Natural = 0
    out: str = "runs"
    """Folder that run directories are made in."""

    @property
    def folder(self) -> Path:
        """Returns the run directory."""
        return Path(self.out).expanduser() / self.name
