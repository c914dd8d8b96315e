"""A model is described by its files before its weights are read: architecture, tokenizer, settings and adapter."""

import dataclasses
import shutil
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxlm.assembly import run_directory, task_heads
from jaxlm.assembly.task_index import Task, read_index
from jaxlm.core import config
from jaxlm.core.compression import Compression
from jaxlm.core.config import CacheKind
from jaxlm.core.continual import Continual
from jaxlm.core.errors import nearest
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.render_chat import turn_ends
from jaxlm.formats import gguf, hf_sidecars, huggingface, model_card
from jaxlm.formats.hf_sidecars import Generation
from jaxlm.formats.peft import Files, is_adapter, open_files
from jaxlm.formats.peft import describe as describe_adapter
from jaxlm.models import MODELS
from jaxlm.nn.family import Family
from jaxlm.objectives import OBJECTIVES
from jaxlm.weights.adapters import METHODS
from jaxlm.weights.adapters.adapted import Adapted

HUB = "hf:"


# Files that are downloaded from the hub: never a pickle, never code.
DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Source:
    """A described model: all that is known before its weights are read."""

    path: Path
    format: str
    """One of run, hf and gguf."""
    family: Family
    config: Any
    tokens: Any
    """None: the files hold no tokenizer."""
    advice: Generation
    templates: dict[str, str]
    """The chat templates by name."""
    boundary_ids: tuple[list[int], list[int]]
    """The ids that stand before and after a text."""
    run: config.Run | None = None
    """The run, if the model is a run directory."""
    head: Any = None
    """The settings of the objective that a published model's own head belongs to; None: it has none."""
    files: gguf.Files | None = None
    adapter: config.Adapter = field(default_factory=config.Adapter)
    compression: Compression = field(default_factory=Compression)
    adapter_files: Files | None = None
    """None: a run's own adapter lies in its checkpoints."""
    task: Task | None = None
    """The earlier task that is meant; None: what the run itself learned."""
    whole: "Source | None" = None
    """With `task`: the source of the run, whose files hold the task's weights beside its own."""
    cache: CacheKind | None = None
    """How keys and values are stored while it makes text; None: as the run says."""

    @property
    def objective(self) -> Any:
        """The settings of the objective whose weights the files hold; None: they hold a bare or a language model."""
        return self.head if self.run is None else self.run.objective

    @property
    def is_trained_here(self) -> bool:
        """True for a run that has training data; an imported model has none."""
        return self.run is not None and bool(self.run.data.train)

    @property
    def adapted(self) -> Adapted:
        """The model's weights as its adapter changes them."""
        return Adapted(self.adapter, self.family, self.config, self.compression)

    @property
    def eos(self) -> list[int]:
        """The tokens that end an answer: those that the files name, and what ends a turn of the chats that a run
        learned."""
        eos = None if self.tokens is None else self.tokens.eos_id
        chats = self.run is not None and OBJECTIVES.of(self.run.objective).chat_template is not None
        turn = turn_ends(self.tokens, self.templates["default"]) if chats and "default" in self.templates else []
        return sorted({*self.advice.eos, *turn, *(() if eos is None else (eos,))})

    def save_text(self, folder: Path) -> list[str]:
        """Writes the files that say how text is read into a folder; returns their names."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.format == "hf":
            names = hf_sidecars.text_files(self.path)
            for name in names:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(self.path / name, folder / name)
            return names
        self.tokens.save(folder)
        if self.templates:
            (folder / "chat_template.jinja").write_text(self.templates["default"], "utf-8")
        return sorted(path.name for path in folder.iterdir())

    def save_advice(self, folder: Path) -> list[str]:
        """Writes what says how the model is used into a run directory: settings of generation and of embedding, and its
        card; returns lines on the files."""
        model_card.keep(folder, self.path, self.licence)
        advised = self.advice != Generation()
        notes = hf_sidecars.keep_generation(folder, self.advice, self.path) if advised else []
        return notes if self.format == "gguf" else notes + hf_sidecars.keep_embedding(folder, self.path)

    @property
    def licence(self) -> str:
        """The licence that the model's card or GGUF file states; empty where none does."""
        if self.files is None:
            return model_card.licence(self.path)
        return self.files.fields.get("general.license", "")

    @property
    def extra_files(self) -> Path | None:
        """The folder of the tokenizer and settings files that an export copies; None: there is none."""
        if self.format == "run":
            return self.path / "tokenizer"
        return self.path if self.format == "hf" else None


@dataclass(frozen=True)
class StartModel:
    """The model that a run starts from. Its files are read when `source` is first asked for, and only once."""

    place: str

    @cached_property
    def source(self) -> Source:
        """Returns the described model."""
        return describe(self.place)


def describe(place: str | Path) -> Source:
    """Returns what a model's files say of it. ValueError: the place holds no model."""
    run, sign, task = str(place).rpartition("#")
    if sign and not Path(place).expanduser().exists():
        return of_task(describe(run), task)
    base, plus, adapter = str(place).rpartition("+")
    if plus and is_adapter(Path(adapter).expanduser()) and not Path(place).exists():
        return with_adapter(describe(base), Path(adapter).expanduser())
    place = fetch(str(place)) if str(place).startswith(HUB) else Path(place).expanduser()
    if place.suffix == ".gguf":
        return _gguf(place)
    if not place.is_dir():
        hint = f", or {HUB}{place} for one on the hub" if str(place).count("/") == 1 else ""
        raise ValueError(
            f"{place}: no such model; give a run directory, a Hugging Face directory or a .gguf file{hint}"
        )
    if not (place / "config.json").is_file() and is_adapter(place):
        return with_adapter(describe(_base_of(place)), place)
    if not (place / "config.json").is_file():
        raise ValueError(f"{place}: has no config.json, so it is neither a run directory nor a Hugging Face directory")
    return _run(place) if "objective" in huggingface.read_config(place) else _hf(place)


def of_task(whole: Source, name: str) -> Source:
    """Returns the source of one of the tasks that a run's model learned. ValueError: it learned none of that name."""
    if whole.run is None:
        raise ValueError(f"{whole.path}#{name}: only a run directory has tasks; leave #{name} out")
    tasks = {task.name: task for task in read_index(whole.path)}
    own = run_directory.read_config(whole.path).name
    if name == own and name not in tasks:
        return whole
    if name not in tasks:
        known = (*tasks, own)
        raise ValueError(
            f"{whole.path}: has learned no task {name!r}{nearest(name, known)}; give one of {', '.join(known)}"
        )
    task, run, adapter = tasks[name], whole.run, whole.adapter
    objective, _ = OBJECTIVES.of(task.objective).as_published(task.objective, {})
    data = dataclasses.replace(run.data, train=task.data, valid=task.valid, test=task.test, weights=(),
                               holdout=task.holdout, text_field=task.text_field)  # fmt: skip
    columns = (growth := METHODS.of(adapter).growth) and growth.columns
    if task.adapter == "none":
        adapter = config.Adapter(base=adapter.base)
    elif task.adapter == "column" and columns:
        adapter = columns.settings(adapter, task.column)
    train = dataclasses.replace(run.train, seq_len=task.seq_len)
    run = dataclasses.replace(
        run, objective=objective, data=data, train=train, adapter=adapter, continual=Continual()
    )  # fmt: skip
    templates = {name: text for name, text in whole.templates.items() if name != "default"}
    templates |= {} if task.template is None else {"default": task.template}
    return dataclasses.replace(whole, run=run, adapter=adapter, templates=templates, task=task, whole=whole)


def fetch(name: str) -> Path:
    """Downloads the model `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION` into the hub's cache; returns its folder."""
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(DOWNLOADED)))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{name}: can't be brought from the hub ({why}); give a directory instead") from error


def _run(folder: Path) -> Source:
    run = run_directory.read_config(folder)
    objective, _ = OBJECTIVES.of(run.objective).as_published(run.objective, {})  # and so `open_model.read` reads it
    run = dataclasses.replace(run, name=folder.resolve().name, out=str(folder.parent), objective=objective)
    tokens = run_directory.load_tokenizer(run)
    templates = hf_sidecars.chat_templates(folder) or hf_sidecars.chat_templates(folder / "tokenizer")
    reads_chats = OBJECTIVES.of(run.objective).chat_template
    if reads_chats is not None and (own := reads_chats(run.objective)):
        templates["default"] = own
    family = MODELS.of(run.model)
    advice = hf_sidecars.read_generation(folder)
    return Source(
        folder, "run", family, run.model, tokens, advice, templates, tokens.boundary_ids, run=run,
        adapter=run.adapter, compression=run.compression,
    )  # fmt: skip


def _base_of(folder: Path) -> str:
    """Returns the model that an adapter's directory names: a place here, or one on the hub."""
    base = open_files(folder).base
    if not base or (not Path(base).expanduser().exists() and base.count("/") != 1):
        raise ValueError(f"{folder}: names {base or 'no base model'}, which is not here; give it as MODEL+{folder}")
    return base if Path(base).expanduser().exists() else f"{HUB}{base}"


def with_adapter(base: Source, folder: Path) -> Source:
    """Returns the model with the adapter of a PEFT directory. ValueError: it has an adapter already."""
    if base.adapter != config.Adapter():
        raise ValueError(f"{base.path}: has an adapter already; merge it first: jaxlm export {base.path} MERGED")
    files = open_files(folder)
    adapter = describe_adapter(files, base.family, base.config)
    run = base.run and dataclasses.replace(base.run, adapter=adapter)
    return dataclasses.replace(base, run=run, adapter=adapter, adapter_files=files)


def _hf(folder: Path) -> Source:
    family, c = huggingface.describe(folder, MODELS)
    c, head = task_heads.describe(folder, family, c)
    for line in huggingface.left_out(folder, c):
        print(line, file=sys.stderr)
    names = ("tokenizer.json", "tokenizer.model", "spiece.model")
    tokens = tokenizers.load(folder) if any((folder / name).is_file() for name in names) else None
    boundary_ids: tuple[list[int], list[int]] = tokens.boundary_ids if tokens is not None else ([], [])
    advice, templates = hf_sidecars.read_generation(folder), hf_sidecars.chat_templates(folder)
    return Source(folder, "hf", family, c, tokens, advice, templates, boundary_ids, head=head)


def _gguf(path: Path) -> Source:
    files = gguf.open_file(path)
    family, c = gguf.describe(files, MODELS)
    text = gguf.text(files)
    tokens = text.tokenizer
    before = [tokens.bos_id] if text.add_bos and tokens.bos_id is not None else []
    templates = {"default": text.chat_template} if text.chat_template else {}
    eos = (tokens.eos_id,) if tokens.eos_id is not None else ()
    advice = Generation(eos=(*eos, *text.ends)) if text.ends else Generation()
    return Source(path, "gguf", family, c, tokens, advice, templates, (before, []), files=files)
