"""The library: what programs call. `import jaxlm` offers these names, and loads what they need when they are used.

Functions take and return objects. A user's mistake is a ValueError that names the argument or the field; the commands
of `jaxlm` are the same functions with options and printing.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxlm.assembly import compress as compressing
from jaxlm.assembly import convert, evaluate_model, run_directory, run_source, stream, sweep_results, training_run
from jaxlm.assembly import extract as extracting
from jaxlm.assembly import grow as growing
from jaxlm.assembly import merge as merges
from jaxlm.assembly import shrink as shrinking
from jaxlm.assembly import sweep as sweeping
from jaxlm.assembly.as_flax import as_linen, as_nnx
from jaxlm.assembly.language_model import LanguageModel
from jaxlm.assembly.model_source import StartModel
from jaxlm.assembly.open_model import open_model, with_cache
from jaxlm.assembly.own_loop import Program
from jaxlm.assembly.trained_run import RunDirectory
from jaxlm.core import compress_request, config_io, plugins
from jaxlm.core.config import CacheKind, Run
from jaxlm.core.extraction import Extraction
from jaxlm.core.growth import Growth
from jaxlm.core.merging import MethodName, Rescale, Settings
from jaxlm.core.shrinking import Importance, Shrinking
from jaxlm.core.stream import MergeBack, Stage, Stream
from jaxlm.core.sweep import Between, Choice, Dimension
from jaxlm.core.sweep import Settings as SweepSettings
from jaxlm.inference.sampling import Sampling
from jaxlm.models import MODELS
from jaxlm.models.flax_bridge import from_linen, from_nnx
from jaxlm.nn.family import Family
from jaxlm.objectives import OBJECTIVES
from jaxlm.objectives.objective import Objective
from jaxlm.planning import plan as plans
from jaxlm.planning import targets
from jaxlm.planning.plan import Plan
from jaxlm.runtime import processes
from jaxlm.training.optimizers import OPTIMIZERS, SCHEDULES
from jaxlm.weights.adapters import METHODS
from jaxlm.weights.adapters.method import Method

__all__ = [
    "Between", "Choice", "LanguageModel", "MergeBack", "Plan", "Program", "RunDirectory", "Sampling", "Stage", "Stream",
    "as_linen", "as_nnx", "compress", "evaluate", "extract", "from_linen", "from_nnx", "grow", "import_model", "load",
    "load_plugin", "merge", "open", "plan", "register_adapter", "register_model", "register_objective",
    "register_optimizer", "register_schedule", "shrink", "start_processes", "sweep", "train", "train_stream",
]  # fmt: skip


def load(source: run_source.RunSource, *, start: str = "", overrides: str | Path | None = None, **changes: Any) -> Run:
    """Returns a run with changed fields.

    `source` is a config file, the bare name of one of the package (`quickstart`), a run directory, its `config.json` or
    another such file, a `Run`, or a function that returns one. Changes are fields or parts: `load("quickstart", seed=1,
    train={"steps": 100}, optim=Optim(lr=1e-3), adapter="lora")`, and by names with dots: `load("quickstart",
    **{"optim.lr": 1e-3})`. `start` names a model to start from, whose architecture and tokenizer the run then has.
    `overrides` names a YAML or JSON file of changes, which come before the others.

    A finished run directory with another `data.train` or objective becomes a new run beside it, which starts from the
    model there: `load("runs/news", **{"data.train": ("week2.txt",)})` is `runs/news-2`, unless it is given a `name`.

    ValueError: there is no such file or field, or a value isn't of its field's type.
    """
    first = {} if overrides is None else config_io.read_overrides(Path(overrides))
    base = run_source.load_base(source, start or str(first.get("start", "")))
    run = run_source.overridden(base.run, first)
    run = run_source.overridden(run, changes | ({"start": start} if start else {}))
    return run_source.begun(base, run)[0]


def train(run: Run, *, on_step: Callable[[int, dict[str, float]], None] | None = None) -> RunDirectory:
    """Trains a run in its directory, or continues it there, and returns the directory.

    `on_step` is called with the number of each finished step and its metrics. An exception that it raises ends the run,
    which can be continued from its last checkpoint. Ctrl-C and SIGTERM end it after a checkpoint: `finished` is then
    False. Where a launcher started several processes, all of them call this with the same run (`start_processes`).

    ValueError: a field of the run can't be met here, or the directory belongs to another run. NonFiniteError: a loss or
    gradient was not finite. ProcessError: other processes never came.
    """
    start_processes(run)
    run_directory.check_place(run)
    training_run.train(run, StartModel(run.start), on_step)
    return RunDirectory(run.folder)


def train_stream(stages: Stream) -> dict[str, Any] | None:
    """Trains the stages of a stream one after another in its directory, or goes on there, and returns what
    `results.json` holds: the scores of every model on every stage, what was learned, kept and transferred, and the
    seconds. None: it was stopped by Ctrl-C or SIGTERM, and the same call goes on.

    ValueError: a stage can't be trained, or the directory belongs to another stream.
    """
    start_processes(stages.run)
    if stream.train(stages):
        return None
    return stream.collect(stages, stages.run.folder)


def sweep(run: Run, space: Mapping[str, Dimension] | Sequence[str], **settings: Any) -> dict[str, Any] | None:
    """Searches settings of a run, each trial a process that trains a run of its own, or goes on with a sweep that was
    stopped or killed; returns what `results.json` in `run.folder` then holds: all trials with their values, the best
    one, importances. None: it was stopped by Ctrl-C or SIGTERM, and the same call goes on.

    `space` names fields and their values: `{"optim.lr": Between(1e-5, 1e-3, log=True), "train.batch_size":
    Choice((16, 32))}`, or as the options of `jaxlm sweep` say it: `["optim.lr=log(1e-5,1e-3)"]`. `settings` are
    those options too, such as `trials=40`, `sampler="tpe"`, `pruner="median"`, `seeds=(0, 1, 2)`, `parallel=2`. Trials
    are compared by `run.train.metric`. Models, objectives and other parts that a program registers itself are not known
    to the trials' processes: put them into a module, and name it to `load_plugin`.

    ValueError: a field, a value or a setting doesn't fit, said before anything is trained; optuna is missing; or the
    directory belongs to another sweep. A trial that fails ends no sweep.
    """
    sweeping.search(run, space, config_io.changed(SweepSettings(), settings))
    results = sweep_results.read(run.folder)
    return None if results["counts"]["running"] or len(results["trials"]) < results["total"] else results


def open(place: str | Path, step: int | None = None, *, cache: CacheKind | None = None) -> LanguageModel:
    """Opens a model with its weights on this machine's devices.

    `place` is a run directory, a Hugging Face directory, `hf:OWNER/NAME` on the hub, a GGUF file, or one of these with
    an adapter of Hugging Face PEFT: `MODEL+DIRECTORY`. `RUN#TASK` is a run's model as a task uses it that was learned
    before. `step` names a checkpoint of a run. `cache` says how keys and values of tokens that were read are stored,
    such as int8; None: as the run says, or as they are computed.

    ValueError: the place holds no model that can be read exactly.
    """
    return LanguageModel(open_model(with_cache(place, cache), step))


def evaluate(
    model: LanguageModel | RunDirectory | str | Path, data: str | Sequence[str] | None = None, *,
    rows: Literal["valid", "test"] | None = None, batches: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Returns the figures of a model on `rows` of its run, or on `data`: loss, perplexity, bits per byte and accuracy,
    and the scores of the objective's predictions. `rows` None: the test data where the run has some, which chose no
    checkpoint, else its validation data. `batches` limits each source if not 0.

    ValueError: the model has no validation data of its own and none is named.
    """
    sources = [data] if isinstance(data, str) else data
    return dict(evaluate_model.evaluate(_place(model), data=sources, rows=rows, batches=batches).figures)


def start_processes(run: Run | None = None) -> None:
    """Joins the other processes of this program if a launcher started several, such as `srun` on several hosts; else
    and the second time it does nothing.

    `train` and `Program` call it with their run, which must be the same everywhere. Call it yourself, before anything
    else uses jax's devices, in programs that do that before they train, and in those that only open or evaluate models
    on many hosts: without it each process works by itself. An exception that nobody catches then ends all processes.

    ValueError: the processes' runs or versions differ, or jax has its devices already. ProcessError: some never came.
    """
    processes.start(None if run is None else config_io.flatten(run))


def plan(run: Run, target: str, *, analytic: bool = False, link: float | None = None) -> Plan:
    """Returns what a step of the run needs on a target such as `h100:8`, `h100:8x8` or `v5p:4x4x4`, none of which need
    be here: memory, seconds, tokens a second, and what limits them. `analytic` works it out by arithmetic and
    compiles nothing. `link`: Gbit/s that a worker that trains apart has to the others, or to the parameter server (then
    the target is a worker's); None: what the target has.

    Where compilers for other machines are asked for, call this before anything else uses jax's devices. ValueError: the
    target isn't known, or a field of the run can't be met on it.
    """
    return plans.make(run, targets.parse(target), not analytic, link)


def import_model(model: str | Path, target: str | Path) -> RunDirectory:
    """Makes a run directory of a published model and returns it. ValueError: `target` exists, or `model` is no model
    that can be read exactly."""
    convert.import_model(str(model), target)
    return RunDirectory(Path(target))


def grow(
    model: LanguageModel | RunDirectory | str | Path, target: str | Path, *, blocks: int = 0, stack: int = 0,
    widen: Mapping[str, int] | None = None, experts: int = 0, vocab: int | str | Path = "", top_k: int = 2,
    noise: float = 0.0, seed: int = 0,
) -> RunDirectory:  # fmt: skip
    """Makes a run directory of a larger model, which `start` continues from, and returns it. Give one of these:

    `blocks` new layers that add nothing at first, each behind one of as many equal groups of layers; `stack`: the whole
    stack so many times, which alone changes the function; `widen`: new sizes by the fields of the model's config, such
    as `{"ffn": 4096}`; `experts` that each feed-forward network becomes, of which each token goes to `top_k`; `vocab`:
    a new number of rows, or a tokenizer that adds tokens. `noise` lets the copies of `widen` share unequally what they
    send on, in deviations of a weight.

    ValueError: the model can't grow so, or `target` exists.
    """
    sizes = tuple(f"{name}={size}" for name, size in (widen or {}).items())
    growth = Growth(blocks, stack, sizes, experts, str(vocab), top_k, noise, seed)
    growing.grow(_place(model), target, growth)
    return RunDirectory(Path(target))


def compress(
    model: str | Path, target: str | Path, *, method: compress_request.MethodName = "gptq",
    calibration: Sequence[str] = (), data: Sequence[str] = (), rows: int = 128, length: int | None = None,
    batch_size: int = 8, batches: int = 0, window: int | None = None,
    compare: Literal["all", "quality", "sizes"] = "all", step: int | None = None, **settings: Any,
) -> RunDirectory:  # fmt: skip
    """Makes a run directory of the model in few bits or of low rank, or with zeros that stay, and returns it.

    `method`: nearest, gptq, awq, smooth (few bits), magnitude, wanda, sparsegpt (zeros), svd (low rank); `settings` are
    those of the method, by the names of the options of `jaxlm compress`: `format="int4"`, `group=128`, `share=0.5`,
    `pattern="2:4"`, `budget="5bits"`, `rank=64`, `skip=("blocks/down",)`. `calibration` names the text whose first
    `rows` of `length` tokens the method sees, and `data` other text on which both models are compared at the end, in
    `compress.json`: at most `batches` of each source (0: all), in windows of `window` tokens (None: the model's own).

    ValueError: a setting, the calibration or the model doesn't fit, or `target` exists.
    """
    asked = config_io.changed(compress_request.Settings(method), settings)
    on = compress_request.Calibration(tuple(calibration), rows, length, batch_size)
    comparison = compress_request.Comparison(tuple(data), batches, window, compare)
    compressing.compress(model, target, asked, on, comparison, step)
    return RunDirectory(Path(target))


def shrink(
    model: LanguageModel | RunDirectory | str | Path, target: str | Path, *, heads: int | None = None,
    kv_heads: int | None = None, ffn: int | None = None, experts: int | None = None, width: int | None = None,
    layers: int | None = None, decoder_layers: int | None = None, share: float = 0.0,
    importance: Importance = "activation", compensate: bool = False, calibration: Sequence[str] = (),
    held_out: Sequence[str] = (), batches: int = 16, held_out_batches: int = 16,
) -> RunDirectory:  # fmt: skip
    """Makes a run directory of a smaller model of the same family, which `start` continues from, and returns it.

    Give sizes, or the `share` of the layers' parameters that goes. `importance` says what is judged: what units send on
    (activation), the weights alone (magnitude), or the loss to first order; `compensate` lets what stays make up for
    what goes by least squares. `calibration` and `held_out` are sources of text, of which so many `batches` are read;
    empty: the run's own. `shrunk.json` holds sizes and losses before and after.

    ValueError: the model can't have these sizes, text is missing, or `target` exists.
    """
    sizes = (heads, kv_heads, ffn, experts, width, layers, decoder_layers)
    settings = Shrinking(*sizes, share, importance, compensate, batches, held_out_batches)
    shrinking.shrink(_place(model), target, settings, tuple(map(str, calibration)), tuple(map(str, held_out)))
    return RunDirectory(Path(target))


def extract(
    model: LanguageModel | RunDirectory | str | Path, base: LanguageModel | RunDirectory | str | Path,
    target: str | Path, *, rank: int = 16, targets: Sequence[str] = ("all",), calibration: Sequence[str] = (),
    batches: int = 16,
) -> Path:  # fmt: skip
    """Makes a LoRA of the difference of a model from its `base` in files of Hugging Face PEFT, which open as
    `BASE+TARGET`, and returns their directory.

    `targets` are patterns of the paths of matrices. `calibration`: sources of text, of which so many `batches` are
    read, on whose inputs the adapter is to be nearest to the difference; empty: its numbers are. `extracted.json` holds
    how near it comes.

    ValueError: the models are of different shapes or alike, the rank is too large, or `target` exists.
    """
    settings = Extraction(rank, tuple(targets), batches)
    extracting.extract(_place(model), _place(base), target, settings, tuple(map(str, calibration)))
    return Path(target)


def merge(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    method: MethodName = "linear",
    base: str | Path | None = None,
    weights: Sequence[float] = (),
    t: float | None = None,
    density: float | None = None,
    gamma: float | None = None,
    scale: float | None = None,
    rescale: Rescale | None = None,
    seed: int = 0,
    dtype: str | None = None,
    any_tokenizer: bool = False,
) -> Path:
    """Merges models of one shape, which lie on disk, into a new Hugging Face directory and returns its path.

    `models` are run directories or Hugging Face directories, and `base` the one they began from, which every method but
    `linear` and `slerp` needs. `weights`: one for each model, 1 if empty. `t`: how far `slerp` goes from the first to
    the second. `density`: the share of each model's changes that is kept, and `gamma` that of the largest which
    `breadcrumbs` drops. `scale` multiplies the merged change, and `rescale` says how DARE makes up for what it drops,
    by chance, as `seed` says. None is the method's own value. `dtype`: what is written; None: as it is in the base or
    the first model, whose tokenizer and settings the result has. Models whose tokenizers differ are refused, unless
    `any_tokenizer`. A tensor and some megabytes are in memory at a time; while a run directory is read, about three
    times a weight of all its layers.

    ValueError: a setting doesn't fit the method, or a model differs in shape or meaning, or holds numbers that aren't
    finite; nothing is left then.
    """
    settings = Settings(
        method, density=density, gamma=gamma, rescale=rescale, seed=seed, weights=tuple(weights), t=t, scale=scale
    )
    return merges.merge(models, out, settings, base, dtype=dtype, any_tokenizer=any_tokenizer).path


def load_plugin(*names: str) -> None:
    """Imports modules that register models, objectives, adapters, optimizers or schedules, by name or by the path of a
    Python file. ValueError: there is no such module, or it fails."""
    plugins.load(names)


def register_model(name: str, family: Family) -> None:
    """Registers a family of models: a module or an object as `jaxlm.nn.family.Family` says. Its `Config` stands in
    `config.json` by this name. ValueError: the name or the `Config` belongs to another model."""
    MODELS.add(name, family)


def register_objective(name: str, objective: Objective) -> None:
    """Registers an objective by the name that `config.json` and messages have of it. ValueError: the name or its
    `Config` belongs to another objective."""
    OBJECTIVES.add(name, objective)


def register_adapter(name: str, method: Method[Any]) -> None:
    """Registers a method of fine-tuning few parameters: `--adapter NAME` then chooses it. ValueError: the name or its
    `Config` belongs to another method."""
    METHODS.add(name, method)


def register_optimizer(name: str, make: Callable[..., Any]) -> None:
    """Registers an optimizer: `optim.name` then chooses it.

    `make(optim, schedule, decay_mask, specs)` returns an optax `GradientTransformation` whose updates are added to the
    weights: the settings of the run, the learning rate of each update, what optax takes as `mask=` of weight decay, and
    the specs of all weights. ValueError: the name belongs to another optimizer.
    """
    OPTIMIZERS.add(name, make)


def register_schedule(name: str, make: Callable[..., Any]) -> None:
    """Registers a schedule: `optim.schedule` then chooses it.

    `make(optim, steps)` returns a function from the updates since the warm-up to the learning rate. ValueError: the
    name belongs to another schedule.
    """
    SCHEDULES.add(name, make)


def _place(model: LanguageModel | RunDirectory | str | Path) -> Any:
    if isinstance(model, LanguageModel):
        return model.pretrained
    return model.path if isinstance(model, RunDirectory) else model
