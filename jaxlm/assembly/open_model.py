"""A model is opened by its place: a run directory, a Hugging Face directory (or `hf:OWNER/NAME` on the hub), or a GGUF
file; and any of them with an adapter of Hugging Face PEFT: `MODEL+DIRECTORY`, or its directory alone, which names the
model. `RUN#TASK` is a run's model as a task uses it that was learned before."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.assembly import earlier, owned, run_directory, task_heads
from jaxlm.assembly import program as programs
from jaxlm.assembly.model_source import Source, StartModel, describe, with_adapter
from jaxlm.assembly.run_objective import BoundObjective, bind_run
from jaxlm.core import config, config_io, spec, tree
from jaxlm.formats import gguf, hf_sidecars, huggingface
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.formats.peft import is_adapter, load
from jaxlm.inference.generate import Generator
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.objectives import OBJECTIVES
from jaxlm.runtime.mesh import make_mesh, on_mesh
from jaxlm.weights import quantized
from jaxlm.weights.adapters import per_row
from jaxlm.weights.grow import depth

# The objective that a published model of each kind is evaluated by.
OBJECTIVE = {"decoder": "causal", "encoder": "masked", "encoder_decoder": "seq2seq"}


@dataclass(frozen=True)
class Pretrained:
    """A model that can be used: its functions, weights and tokenizer, on the devices that are here."""

    source: Source
    model: Model
    params: Any
    mesh: jax.sharding.Mesh | None

    @property
    def tokens(self) -> Any:
        """Returns the tokenizer. ValueError: the files hold none."""
        if self.source.tokens is None:
            raise ValueError(f"{self.source.path}: has no tokenizer; put its tokenizer.json beside the weights")
        return self.source.tokens

    @cached_property
    def eos(self) -> list[int]:
        """The tokens that end an answer. ValueError: the files hold no tokenizer."""
        _ = self.tokens
        return self.source.eos

    @property
    def boundary_ids(self) -> tuple[list[int], list[int]]:
        """The ids that stand before and after a text: a run's are those it was trained with."""
        s = self.source
        return ([self.tokens.bos_id], []) if s.run is not None and s.run.data.train else s.boundary_ids

    @cached_property
    def objective(self) -> BoundObjective | None:
        """The objective that a run trained the model for; None: the model was published elsewhere."""
        run = self.source.run
        return None if run is None else bind_run(run, self.tokens, self.source.templates.get("default"))

    def generator(self) -> Generator:
        """Returns what generates with this model."""
        if self.objective is None:
            return Generator(self.model, self.eos, self.tokens.vocab_size)
        both_ways = self.objective.prompts_read_both_ways
        return Generator(self.model, self.eos, self.objective.vocab_size, both_ways)

    def prompts(self, texts: Sequence[str]) -> tuple[list[list[int]], list[list[int]] | None]:
        """Returns what the model reads before it goes on from each text: prompts, and an encoder's sources or None."""
        s, tokens = self.source, self.tokens
        if (
            s.run is not None and self.objective is not None and s.run.data.train
        ):  # an imported model was trained elsewhere
            return self.objective.prompts(texts)
        before, after = s.boundary_ids
        if s.family.kind == "encoder_decoder":
            start = s.advice.start if s.advice.start is not None else s.config.decoder_start
            if start is None:
                raise ValueError(f"{s.path}: has no decoder_start_token_id; put one into generation_config.json")
            after = after or [tokens.eos_id]
            return [[start] for _ in texts], [[*_begun(before, tokens.encode(text)), *after] for text in texts]
        return [_begun(before, tokens.encode(text)) or [tokens.bos_id] for text in texts], None


def _begun(before: Sequence[int], ids: list[int]) -> list[int]:
    """Returns ids with those that stand before every text, which special tokens of the text may have spelt out."""
    return ids if ids[: len(before)] == list(before) else [*before, *ids]


def starting(run: config.Run, start: StartModel) -> config.Run:
    """Returns the run with the architecture, the tokenizer and the adapter of the model that it starts from."""
    source = start.source
    _check_whole(source)
    if source.tokens is None:
        raise ValueError(f"start: {start.place} has no tokenizer; put its tokenizer.json beside the weights")
    adapter = source.adapter if run.adapter == config.Adapter() else run.adapter
    model = task_heads.fitting(source.config, source.family, run.objective)
    aware = run.compression.aware or source.compression.aware
    compression = dataclasses.replace(source.compression, aware=aware)
    return dataclasses.replace(run, model=model, adapter=adapter, compression=compression, start=start.place)


def with_chosen_layers(run: config.Run, start: StartModel) -> config.Run:
    """Returns the run whose model has the layers that it takes of the model that it starts from. ValueError: there are
    no such layers, or they can't be taken alone."""
    if not run.start_layers:
        return run
    if not start.place:
        raise ValueError("start_layers: are layers of the model in start, and there is none; give one, or leave it out")
    if (source := start.source).adapter != config.Adapter():
        raise ValueError(
            f"start_layers: {start.place} has an adapter, which is on all of its layers; merge it first: jaxlm export "
            f"{start.place} MERGED --format hf"
        )
    specs = source.family.specs(source.config)
    chosen = depth.config(source.config, specs, depth.selection(specs, run.start_layers))
    fields = {f.name for f in dataclasses.fields(chosen) if getattr(chosen, f.name) != getattr(source.config, f.name)}
    model: Any = dataclasses.replace(run.model, **{name: getattr(chosen, name) for name in fields})
    return dataclasses.replace(run, model=model)


def load_tokenizer(run: config.Run, start: StartModel) -> Any:
    """Returns the tokenizer of the run directory, else of the model it starts from, else what `data.tokenizer` names.

    `start` is read only where it is needed: a run that is continued has its own copy.
    """
    if run.start and not (run.folder / "tokenizer").is_dir():
        return start.source.tokens
    return run_directory.load_tokenizer(run)


def save_description(run: config.Run, tokens: Any, start: StartModel) -> None:
    """Writes what a run directory says of its run: the tokenizer, with what else says how the text of the model that it
    starts from is read, and the configuration."""
    folder = run.folder / "tokenizer"
    if run.start and not folder.is_dir():
        start.source.save_text(folder)
        start.source.save_advice(run.folder)
    else:
        tokens.save(folder)
    own = OBJECTIVES.of(run.objective).chat_template
    if own is not None and (template := own(run.objective)):
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    config_io.dump(run, run.folder / "config.json")


def template_of(run: config.Run, start: StartModel) -> str | None:
    """Returns the chat template of the run directory, else of the model it starts from; None: there is none."""
    folder = run.folder / "tokenizer"
    if folder.is_dir():
        return hf_sidecars.chat_templates(folder).get("default")
    return start.source.templates.get("default") if run.start else None


def bound_objective(run: config.Run, start: StartModel) -> BoundObjective:
    """Returns the run's objective, bound to the run's tokenizer and chat template."""
    return bind_run(run, load_tokenizer(run, start), template_of(run, start))


def first_params(p: programs.Program, start: StartModel) -> Any:
    """Returns the weights of a run that starts from a model, as far as that model has them: it may lack a head or an
    adapter. ValueError: the model does not fit the run."""
    source = start.source
    stored = specs_of(source)
    if p.run.compression.weights != source.compression.weights:
        raise ValueError(f"compression: {source.path} stores its weights in another way; leave that to `start`")
    chosen: depth.Plan = {}
    if p.run.start_layers:
        if p.run.continual.methods or p.run.continual.adapters != "shared":
            raise ValueError("start_layers: a model of other layers keeps no earlier tasks; leave continual.* out")
        chosen = depth.selection(source.family.specs(source.config), p.run.start_layers)
    earlier_heads = p.earlier.tasks and not p.run.continual.old and source.run is not None
    new = set(p.objective.specs(p.run.model.width))
    if not earlier_heads:
        head = task_heads.continued(p.run.objective, source.objective, p.run.start)
        new = set() if head.kept else new
        if head.note and jax.process_index() == 0:
            print(head.note)
    grows = _grows(p, source)
    if p.run.continual.adapters == "task":
        _check_alike(p, source)
    theirs_by_path = tree.flatten(
        {name: s for name, s in stored.items() if not (grows and name == "adapter")}, spec.is_spec
    )
    left = {path: s.shape if (at := depth.chosen_layers(path, chosen)) is None else (len(at), *s.shape[1:])
            for path, s in theirs_by_path.items()}  # fmt: skip
    differing = [path for path, s in tree.flatten(p.specs, spec.is_spec).items()
                 if left.get(path, s.shape) != s.shape and path not in new]  # fmt: skip
    if source.family is not p.model.family or differing:
        where = f": {differing[0]} has another shape" if differing else ""
        raise ValueError(f"start: {source.path} does not fit this run's model{where}; leave the model to `start`")
    transform = _quantizer(p) if source.adapter.base != p.run.adapter.base else None
    weights = read(source, stored, p.layout.shardings(stored, p.mesh), transform=transform)
    if chosen:
        weights = _with_layers(p, weights, chosen)
    if grows:
        weights |= {"adapter": _grown(p, source, weights["adapter"])}
    if earlier_heads:
        assert source.run is not None
        weights = earlier.with_heads(p.earlier, source.run, earlier.read_index(source.path), weights)
        new = set()  # where the run's own head is an earlier task's it stands among them
    return {name: value for name, value in weights.items() if name in p.specs and name not in new}


def _with_layers(p: programs.Program, weights: Any, chosen: depth.Plan) -> Any:
    """Returns the weights with the chosen layers alone, on the run's devices."""
    homes = tree.flatten(p.layout.shardings(p.specs, p.mesh))

    def one(path: str, w: jax.Array) -> jax.Array:
        if (at := depth.chosen_layers(path, chosen)) is None or path not in homes:
            return w
        return jax.device_put(w[np.array(at)], homes[path])

    return tree.map_named(one, weights)


def _grows(p: programs.Program, source: Source) -> bool:
    """Says whether the run adds an adapter of its own to that of the model it starts from. ValueError: it can neither
    do that nor go on with it."""
    theirs, ours, growth = source.adapter, p.run.adapter, p.adapter.method.growth
    if growth is not None and growth.settings(ours, theirs) != ours:
        raise ValueError(
            f"adapter: {p.run.start} has an adapter of other settings than this run says of it; leave that to `start`"
        )
    grows = growth is not None and isinstance(theirs, growth.bases)
    same = theirs == config.Adapter() or (
        type(theirs) is type(ours)
        and all(getattr(theirs, name) == getattr(ours, name) for name in source.adapted.method.defining)
    )
    if theirs.base not in ("float32", ours.base) or not (grows or same):
        raise ValueError(
            f"start: {p.run.start} has an adapter of other settings than this run's; leave adapter.* out, or merge it "
            f"first: jaxlm export {p.run.start} MERGED --format hf"
        )
    return grows


def _check_alike(p: programs.Program, source: Source) -> None:
    """Raises ValueError where the adapter of the model that the run starts from is of another shape than the run's, or
    on a base of another precision, though both stand over one base."""
    theirs, ours = (tree.flatten(a.specs().get("adapter", {}), spec.is_spec) for a in (source.adapted, p.adapter))
    if not theirs:
        return
    same = {path: s.shape for path, s in theirs.items()} == {path: s.shape for path, s in ours.items()}
    if not same or source.adapter.base != p.run.adapter.base:
        raise ValueError(
            f"start: {p.run.start} has adapters of other settings than this run's, and all tasks' adapters are of one "
            "kind, over one base; leave adapter.* out"
        )


def _grown(p: programs.Program, source: Source, adapter: Any) -> Any:
    """Returns the part of the run's adapter that comes from that of the model it starts from, on the run's devices."""
    grow = partial(p.adapter.grown, source.adapted)
    made = jax.eval_shape(grow, adapter)
    homes = p.layout.shardings(p.specs, p.mesh)["adapter"]
    where = tree.map_named(lambda path, _: tree.at(homes, path), made)
    with on_mesh(p.mesh):
        return jax.jit(grow, out_shardings=where)(adapter)


def new_head(p: programs.Program, start: StartModel) -> list[str]:
    """Returns the names of the weights of the objective's own head that the model which a run starts from lacks."""
    stored = specs_of(start.source)
    return [name for name in p.objective.specs(p.run.model.width) if name not in stored]


def _quantizer(p: programs.Program) -> Callable[[str, jax.Array], Any] | None:
    """Returns what quantizes a weight that has just been read: one by one, so that they are never all in float32."""
    base, matrices = p.run.adapter.base, p.adapter.matrices
    if p.adapter.method.needs_whole_base:
        return None

    def transform(path: str, w: jax.Array) -> Any:
        if (s := matrices.get(path)) is None:
            return w
        shardings = p.layout.shardings(tree.at(p.specs, path), p.mesh)
        few = jax.jit(partial(quantized.KINDS[base], ins=s.ins, outs=s.outs), out_shardings=shardings)(w)
        w.delete()
        return few

    return transform


def _check_whole(source: Source) -> None:
    """Raises ValueError where one task of a run is meant, as a model's files are read as they are here."""
    if source.task is not None:
        place = f"{source.path}#{source.task.name}"
        raise ValueError(
            f"{place}: is one task of a run; give the run itself, or write the task first: jaxlm export {place} TARGET"
        )


def specs_of(source: Source) -> Any:
    """Returns the specs of the weights that a model's files hold. ValueError: one task of them is meant."""
    _check_whole(source)
    specs = source.adapted.specs()
    if source.objective is not None:
        specs |= OBJECTIVES.of(source.objective).specs(source.objective, source.config.width)
    if source.run is not None:
        specs |= earlier.of_directory(source.path, source.run).specs(source.config.width)
    return specs


Place = str | Path | Source | Pretrained
"""A model by its place, described already, or opened already."""


def source_of(place: Place) -> Source:
    """Returns what a model's files say, without its weights. ValueError: the place holds no model."""
    if isinstance(place, Pretrained):
        return place.source
    return place if isinstance(place, Source) else describe(place)


def open_model(place: Place, step: int | None = None) -> Pretrained:
    """Opens a model with its weights on this machine's devices, each with all of them and its share of a batch. One
    that is open already is returned as it is.

    A run gives its averaged weights where it keeps an average, from the checkpoint `step`, or else from the one that
    its configuration says to use.
    """
    if isinstance(place, Pretrained):
        if step is not None:
            raise ValueError("step: the model is open already; name the checkpoint where it is opened")
        return place
    source = source_of(place)
    if source.whole is not None:
        return _of_task(open_model(source.whole, step), source)
    mesh = make_mesh(config.Mesh())
    execution = source.run.execution if source.run else published_execution()
    if source.cache is not None:
        execution = dataclasses.replace(execution, cache=source.cache)
    layout = Layout.of(config.Mesh(), execution)
    specs = specs_of(source)
    if source.run is None and step is not None:
        raise ValueError(f"step: {source.path} is no run directory; leave it out")
    with on_mesh(mesh):
        weights = read(source, specs, layout.shardings(specs, mesh), step)
    adapted = source.adapted
    plain = {name: s for name, s in specs.items() if name not in (*adapted.base, "adapter")} | adapted.base
    model = Model(source.family, source.config, plain, layout, adapted if adapted.changes else None)
    return Pretrained(source, model, weights, mesh)


def with_cache(place: Place, kind: config.CacheKind | None) -> Place:
    """Returns the model with keys and values stored in another way while it makes text; None: as it is. Raises
    ValueError where it is open already, or makes no text."""
    if kind is None:
        return place
    if isinstance(place, Pretrained):
        raise ValueError("cache: the model is open already; say where it is opened how keys and values are stored")
    source = source_of(place)
    if not source.family.generates:
        raise ValueError(f"cache: {source.path} is an encoder, which keeps no keys and values; leave it out")
    whole = None if source.whole is None else dataclasses.replace(source.whole, cache=kind)
    return dataclasses.replace(source, cache=kind, whole=whole)


def _of_task(whole: Pretrained, source: Source) -> Pretrained:
    """Returns the model as one of its earlier tasks uses it."""
    task, own = source.task, whole.source.objective
    assert task is not None and whole.source.run is not None
    weights = whole.params
    if owned.task_of(source.path, whole.source.run, task.name) is not None:
        weights = owned.for_task(source.path, weights, task)
    weights = earlier.of_directory(source.path, whole.source.run).weights_for(weights, task)
    head = OBJECTIVES.of(task.objective).specs(task.objective, source.config.width)
    surplus = (OBJECTIVES.of(own).specs(own, source.config.width).keys() - head.keys()) | {earlier.HEADS}
    weights = {name: value for name, value in weights.items() if name not in surplus}
    if task.own_head:  # a head that it shares is in that order already
        _, weights = OBJECTIVES.of(task.objective).as_published(task.objective, weights)
    adapted = source.adapted
    model = dataclasses.replace(whole.model, specs=adapted.base | head, adapter=adapted if adapted.changes else None)
    return Pretrained(source, model, weights, whole.mesh)


def with_row_adapters(p: Pretrained, adapters: Sequence[str]) -> Pretrained:
    """Returns the model with an adapter for each row of a batch: directories of PEFT's, or `-` for none."""
    if p.source.adapter != config.Adapter():
        raise ValueError(f"adapter: {p.source.path} has an adapter of its own; merge it first with jaxlm export")
    folders = list(dict.fromkeys(name for name in adapters if name != "-"))
    if not folders:
        return p
    each = []
    for folder in folders:
        if not is_adapter(Path(folder).expanduser()):
            raise ValueError(f"adapter: {folder} has no adapter_config.json; name a directory of PEFT's, or -")
        source = with_adapter(dataclasses.replace(p.source, adapter=config.Adapter()), Path(folder).expanduser())
        shardings = p.model.shard.shardings(source.adapted.specs()["adapter"], p.mesh)
        assert source.adapter_files is not None
        each.append((source.adapted, load(source.adapter_files, source.adapted, shardings, p.params)))
    rows = [None if name == "-" else folders.index(name) for name in adapters]
    adapter, own = per_row.mix(each, rows, p.source.adapted)
    model = dataclasses.replace(p.model, adapter=adapter)
    return dataclasses.replace(p, model=model, params=p.params | {"adapter": own})


def read(
    source: Source, specs: Any, shardings: Any, step: int | None = None,
    transform: Callable[[str, jax.Array], Any] | None = None,
) -> Any:  # fmt: skip
    """Reads the weights, each device's share straight onto it. `transform` changes a weight of a published file."""
    if source.adapter_files is not None:
        bare = dataclasses.replace(source, adapter=config.Adapter(), adapter_files=None)
        specs, own = ({name: x for name, x in parts.items() if name != "adapter"} for parts in (specs, shardings))
        base = read(bare, specs, own, step, transform)
        return base | {"adapter": load(source.adapter_files, source.adapted, shardings["adapter"], base)}
    if source.run is None:
        if source.files is not None:
            return gguf.load(source.files, source.family, source.config, specs, shardings, transform=transform)
        names, ignore = None, tuple[str, ...]()
        if source.head is not None:
            names, ignore = task_heads.names_in(source.family, source.config, source.head)
        return huggingface.load(
            source.path, source.family, source.config, specs, shardings, names=names, ignore=ignore, transform=transform
        )
    run, adapted = source.run, source.adapted
    wanted = spec.abstract(specs, shardings)
    with Checkpoints(source.path / "checkpoints") as checkpoints:
        step = step_of(source, checkpoints, step)
        base = None
        if (source.path / run_directory.BASE).is_dir():
            base, wanted = tree.partition(wanted, adapted.in_frozen_base)
            with Checkpoints(source.path / run_directory.BASE) as once:
                base = once.restore_params(base)
        averaged = None
        if run.optim.ema:
            before = earlier.of_directory(source.path, run)
            trainable = programs.optimizer(run, specs, adapted, before).trainable
            averaged, wanted = tree.partition(wanted, trainable)
            averaged = checkpoints.restore_params(averaged, step, item="ema")
        weights = wanted
        if jax.tree.leaves(wanted):  # learned maps to a teacher's states are no part of the model
            partial_item = averaged is not None or bool(run.distill.teacher)
            weights = checkpoints.restore_params(wanted, step, partial=partial_item)
    for part in (averaged, base):
        weights = weights if part is None else tree.merge(weights, part)
    stored = run_directory.read_config(source.path).objective
    _, weights = OBJECTIVES.of(stored).as_published(stored, weights)
    return weights if transform is None else tree.map_named(transform, weights)


def step_of(source: Source, checkpoints: Checkpoints, step: int | None) -> int | None:
    """Returns the checkpoint of a run that is read: `step` if given; None is the newest."""
    if checkpoints.latest() is None:
        raise ValueError(f"{source.path}: no checkpoint yet; train it with: jaxlm train {source.path}")
    return checkpoints.best() if step is None and source.run and source.run.train.use == "best" else step


def read_each(source: Source, specs: Any, step: int | None = None) -> Iterator[tuple[str, jax.Array]]:
    """Yields (path, weight) of a run that has no adapter, those that `read` gives, one after the other: one is held."""
    run, wanted = source.run, spec.abstract(specs)
    assert run is not None and not source.adapted.changes
    stored = run_directory.read_config(source.path).objective
    with Checkpoints(source.path / "checkpoints") as checkpoints:
        step = step_of(source, checkpoints, step)
        averaged: Any = {}
        if run.optim.ema:
            before = earlier.of_directory(source.path, run)
            trainable = programs.optimizer(run, specs, source.adapted, before).trainable
            averaged, wanted = tree.partition(wanted, trainable)
        for item, part in (("ema", averaged), ("params", wanted)):
            for path, weight in checkpoints.each_param(part, step, item=item) if jax.tree.leaves(part) else ():
                one = tree.put({}, path, weight)
                del weight  # before the next one is read
                yield path, tree.at(OBJECTIVES.of(stored).as_published(stored, one)[1], path)
                one.clear()


def published_execution() -> config.Execution:
    """Returns how a published model is executed: in bfloat16 where the devices are fast at it."""
    return config.Execution(dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")


def program(
    p: Pretrained, data: Sequence[str] | None, objective: str | None = None, settings: Any = None,
    window: int | None = None,
) -> programs.Program:  # fmt: skip
    """Returns the program that evaluates on the validation data of the run, or on `data`. A published model is
    evaluated by `objective`, if given. `settings` of an objective take the place of those that the model has, and
    `window` that of its row's tokens."""
    run, n = p.source.run or published_run(p.source), jax.device_count()
    if settings is not None:
        run = dataclasses.replace(run, objective=settings)
    elif p.source.run is None and objective is not None:
        run = dataclasses.replace(run, objective=OBJECTIVES[objective].Config())
    own_head = OBJECTIVES.of(run.objective).specs(run.objective, p.model.config.width)
    if not p.model.config.head and not own_head:
        raise ValueError(f"{p.source.path}: its files have no language-model head; use it with: jaxlm embed")
    rows = run.train.batch_size // run.train.micro_batches  # made to divide over the devices here
    length = window or run.train.seq_len
    train = dataclasses.replace(run.train, batch_size=-(-rows // n) * n, micro_batches=1, seq_len=length)
    inputs = dataclasses.replace(run.data, valid=tuple(data)) if data else run.data
    if p.source.run is None and not data:
        raise ValueError(f"eval: {p.source.path} has no validation data of its own; name some with `data`")
    run = dataclasses.replace(run, train=train, data=inputs, mesh=config.Mesh())
    return programs.program(run, p.tokens, p.source.templates.get("default"))


def published_run(source: Source) -> config.Run:
    """Returns a run that fits a published model."""
    c, kind = source.config, source.family.kind
    length = min(c.positions or 1024, 1024)
    return config.Run(
        name=source.path.stem,
        model=c,
        objective=OBJECTIVES[OBJECTIVE[kind]].Config() if source.head is None else source.head,
        data=config.Data(train=(), tokenizer=str(source.path)),
        train=config.Train(batch_size=8, seq_len=length),
        execution=published_execution(),
        adapter=source.adapter,
    )
