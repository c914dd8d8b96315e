"""A command is a frozen dataclass: its fields are its arguments, and its `run` does it. What several share is here.

The docstring of a command ends with an example of its use, on a line that begins with `example: `.
"""

import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

from tyro.conf import FlagCreatePairsOff, Positional, arg

from jaxlm.core import config, config_io, typed_arguments
from jaxlm.core.paths import local
from jaxlm.runtime import processes

T = TypeVar("T")
_MODEL = (
    "a run directory (RUN#TASK: as an earlier task uses it), a Hugging Face directory, hf:OWNER/NAME, or a .gguf file; "
    "MODEL+ADAPTER puts an adapter of Hugging Face PEFT on it, whose directory alone may name its model"
)
_CONFIG = "a config file, the name of one of the package, a run's config.json, or a run directory"
Model = Annotated[Positional[str], arg(metavar="MODEL", help=_MODEL)]
Config = Annotated[Positional[str], arg(metavar="CONFIG|RUN_DIR", help=_CONFIG)]
Flag = FlagCreatePairsOff[bool]
Json = Annotated[FlagCreatePairsOff[bool], arg(help="Print the results as one line of JSON; all else goes to stderr.")]


class Done(NamedTuple):
    """A command that is done has results, which are what it printed as values that JSON has, and an exit status."""

    values: dict[str, Any]
    status: int = 0


class More(NamedTuple):
    """Options that a command takes besides its own fields."""

    name: str
    kind: Any
    """Their dataclass."""
    values: Any
    """The dataclass with the values that they have if they aren't given."""


@dataclass(frozen=True)
class Command(ABC):
    """A Command has its arguments as fields; without more said it takes no other options."""

    takes_more: ClassVar[bool] = False
    """Whether options that aren't fields are given to `run`; else they are errors."""
    hint: ClassVar[str] = ""
    """What help says of more options where it can't show them, for no positional argument is given."""

    json: Json = field(default=False, kw_only=True)

    @abstractmethod
    def run(self, rest: list[str]) -> Done:
        """Does what the command says and prints it for people. `rest` are the options that aren't fields."""

    def main(self, rest: list[str]) -> int:
        """Does what the command says and returns the exit status. With `json` the results are all of the output."""
        if not self.json:
            return self.run(rest).status
        with contextlib.redirect_stdout(sys.stderr):
            done = self.run(rest)
        print(json.dumps(as_json(done.values), ensure_ascii=False, allow_nan=False))
        return done.status

    @classmethod
    def more(cls, place: str, rest: Sequence[str] = ()) -> More | None:
        """Returns the options besides the fields, for help; `place` is the first positional argument, or empty, and
        `rest` are those of these options that were given."""
        return None


@dataclass(frozen=True)
class OnRun(Command):
    """An OnRun command works on a run: every field of its config is an option too."""

    takes_more = True
    hint = "Every field of a config is an option too; see those of one: jaxlm train quickstart --help"

    config: Config
    overrides: Path | None = None
    """A YAML or JSON file of fields to change; options change them after it."""

    @classmethod
    def more(cls, place: str, rest: Sequence[str] = ()) -> More | None:
        if not place or {f.name for f in dataclasses.fields(cls)} & {f.name for f in dataclasses.fields(config.Run)}:
            return None  # an option of the command may stand for another thing than the field of its name
        from jaxlm.weights.adapters import METHODS

        run, _ = config_io.choose_adapter(_base(place, _last_value(rest, "--start") or "").run, list(rest), METHODS)
        return More("run_fields", config.Run[type(run.model), type(run.objective)], run)  # type: ignore[misc]

    def load(self, rest: list[str]) -> "LoadedRun":
        """Returns the run with the changes of its file of overrides and of the options."""
        changes = {} if self.overrides is None else config_io.read_overrides(self.overrides)
        place = _last_value(rest, "--start")
        base = _base(self.config, str(changes.get("start", "")) if place is None else place)
        from jaxlm.assembly import run_source
        from jaxlm.weights.adapters import METHODS

        changed = run_source.overridden(base.run, changes)
        run = config_io.override(*config_io.choose_adapter(changed, rest, METHODS))
        whole, start = run_source.begun(base, run)
        last = "training data" if run.start == whole.start else "finished run and data"
        stages = {"config file": base.written, "start model": base.run, "overrides file": changed, "command line": run,
                  last: whole}  # fmt: skip
        return LoadedRun(whole, start, _origins(stages, rest))


class LoadedRun(NamedTuple):
    """A LoadedRun is what a command on a run works with."""

    run: Any
    """The run with the overrides of the command line, and with what its objective takes from the data."""
    start: Any
    """The `StartModel` of the run; its place is empty where the run starts from no model."""
    origins: dict[str, str]
    """Where each field's value comes from, by its dotted name: the last of several places that gave it."""


def _origins(stages: Mapping[str, Any], options: Sequence[str]) -> dict[str, str]:
    """Returns which of the stages, each a run in the order of their making, gave each field its value; `options` give
    theirs whether they change it or not."""
    given = {a.partition("=")[0].removeprefix("--").replace("-", "_") for a in options if a.startswith("--")}
    given |= {".".join([*name.split(".")[:-1], name.split(".")[-1].removeprefix("no_")]) for name in given}
    origins: dict[str, str] = {}
    before: dict[str, Any] = {}
    for stage, run in stages.items():
        now = config_io.flatten(run)
        changed = [key for key in now if key not in before or before[key] != now[key]]
        origins |= dict.fromkeys(changed, stage)
        origins |= dict.fromkeys(given & now.keys(), stage) if stage == "command line" else {}
        before = now
    return {key: origins[key] for key in before}


def _base(source: str, start: str) -> Any:
    if not Path(source).is_dir():
        config_io.find(source)  # an unknown name is told before anything heavy is imported
    from jaxlm.assembly import run_source

    return run_source.load_base(source, start)


def _last_value(args: Sequence[str], flag: str) -> str | None:
    """Returns the value of the last `--flag value` or `--flag=value`; None: the flag is not there."""
    found = [after for a, after in itertools.pairwise([*args, ""]) if a == flag]
    found += [a.partition("=")[2] for a in args if a.startswith(f"{flag}=")]
    return found[-1] if found else None


def parse(kind: type[Command], args: Sequence[str]) -> tuple[Command, list[str]]:
    """Returns a command, and the options that aren't its fields where it takes some. ValueError: an argument doesn't
    fit."""
    own, rest = typed_arguments.split(kind, args) if kind.takes_more else (list(args), [])
    command = typed_arguments.parse(kind, own)
    for f in dataclasses.fields(command):
        if isinstance(value := getattr(command, f.name), Path):
            local(typed_arguments.flag(f.name), value)
    return command, rest


def part(command: Command, kind: type[T]) -> T:
    """Returns the settings that a command has as its own fields, as the dataclass that they come from."""
    return kind(**{f.name: getattr(command, f.name) for f in dataclasses.fields(kind)})  # type: ignore[arg-type]


def show_help(kind: type[Command], name: str, args: Sequence[str]) -> None:
    """Prints what a command does and takes; beside a positional argument that names a config or a model, its own
    options with its own values."""
    own, rest = typed_arguments.split(kind, [a for a in args if a not in ("-h", "--help")])
    place = next((a for a in own[:1] if not a.startswith("-")), "")
    about, more = inspect.getdoc(kind) or "", kind.more(place, rest)
    if more is None and kind.hint:
        about += f"\n\n{kind.hint}"
    typed_arguments.show_help(typed_arguments.with_part(kind, *more) if more else kind, f"jaxlm {name}", about)


def with_flags(message: str, kind: type[Command]) -> str:
    """Returns an error of the library with the command's options where it names arguments: at its beginning before a
    colon, and between backquotes."""
    options = {f.name for f in dataclasses.fields(kind)} - set(typed_arguments.positional(kind))
    first = re.match(r"(?!data source)([a-z_]+)(?=[: ])", message)
    if first and first[1] in options and ":" in message:
        message = typed_arguments.flag(first[1]) + message[first.end() :]
    if kind.takes_more and "`" in message:
        from jaxlm.inference.sampling import Sampling

        options |= {f.name for part in (config.Run, Sampling) for f in dataclasses.fields(part)}
    return re.sub(r"`([a-z_]+)`", lambda m: typed_arguments.flag(m[1]) if m[1] in options else m[0], message)


def start_processes(command: Command, run: Any = None) -> None:
    """Joins the other processes, if there are any: all must have been started with the same run, or arguments."""
    processes.start(dataclasses.asdict(command) if run is None else config_io.flatten(run))


def as_json(value: Any) -> Any:
    """Returns a value in JSON's own types: paths as texts, arrays as lists, and null for numbers that JSON lacks."""
    import numpy as np  # `--help` answers without it

    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
