"""Runs are read, written and overridden here: config files, `config.json`, and typed command-line overrides."""

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import re
import traceback
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml

from jaxlm.core import ranges, registry
from jaxlm.core.config import Adapter, Run
from jaxlm.core.errors import nearest, one_line
from jaxlm.core.registry import Table

Made = TypeVar("Made")


def to_dict(run: Run) -> dict[str, Any]:
    """Returns plain JSON values; parts whose class depends on the run carry their family's name."""
    out = dataclasses.asdict(run)
    for key in ("model", "objective", "adapter"):
        out[key] = {"family": registry.name_of(getattr(run, key))} | out[key]
    return out


def from_dict(values: dict[str, Any], models: Table[Any], objectives: Table[Any], adapters: Table[Any]) -> Run:
    """Builds a run from the values that `to_dict` returns. The tables map family names to what has a `Config`."""
    values = {"adapter": {"family": "none"}} | values
    for key, table in (("model", models), ("objective", objectives), ("adapter", adapters)):
        part = values.get(key)
        if not isinstance(part, dict) or "family" not in part:
            raise ValueError(f"{key}.family: missing; known: {', '.join(sorted(table))}")
        settings = table.find(str(part["family"]), f"{key}.family").Config
        values[key] = _build(settings, {k: v for k, v in part.items() if k != "family"}, key)
    return _build(Run, values, "")


def objective_from_dict(values: Mapping[str, Any], objectives: Table[Any]) -> Any:
    """Builds the settings of an objective from values with its `family`."""
    settings = objectives.find(str(values["family"]), "objective.family").Config
    return _build(settings, {key: value for key, value in values.items() if key != "family"}, "objective")


def _build(cls: Any, values: dict[str, Any], where: str) -> Any:
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    name = lambda key: ".".join(filter(None, (where, key)))  # noqa: E731
    for key in values:
        if key not in fields:
            raise ValueError(f"unknown config key {name(key)}{nearest(key, fields)}")
    for key, f in fields.items():
        if key not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{name(key)}: missing")
    done = {}
    for key, value in values.items():
        kind = hints[key]
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            value = _build(kind, value, name(key))
        elif typing.get_origin(kind) is tuple and isinstance(value, list):
            value = tuple(value)
        if not _fits(value, kind):
            raise ValueError(f"{name(key)}: {value!r} is not {type_words(kind)}")
        done[key] = value
    return cls(**done)


def check(part: Any, prefix: str = "") -> None:
    """Raises a ValueError that names the first field of a run, or of another configuration, whose value isn't of the
    field's type or not in its range (`core/ranges.py`), with the value and what is allowed.

    Parts of the configuration are checked too; `prefix` is its own name with a dot.
    """
    hints = typing.get_type_hints(type(part), include_extras=True)
    for f in dataclasses.fields(part):
        value, kind = getattr(part, f.name), hints[f.name]
        if dataclasses.is_dataclass(value):
            check(value, f"{prefix}{f.name}.")
            continue
        if not _fits(value, kind):
            raise ValueError(f"{prefix}{f.name}: {value!r} is not {type_words(kind)}")
        if out := ranges.outside(value, kind):
            raise ValueError(f"{prefix}{f.name}: {out}")


def _fits(value: Any, kind: Any) -> bool:
    """Returns whether a value has the type of a field; the types are those that this file and the families use."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, TypeVar):  # a family part, built already
        return True
    if origin is Literal:
        return value in inner
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, inner[0]) for v in value)
    if inner:
        return any(_fits(value, k) for k in inner)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def type_words(kind: Any) -> str:
    """Returns what follows "is not": the type of a field in words, such as "a valid int or None"."""
    choices = _choices(kind)
    return f"one of {', '.join(map(str, choices))}" if choices else f"a valid {_type_name(kind)}"


def _type_name(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _type_name(inner[0])
    if origin is tuple:
        return f"list of {_type_name(inner[0])}"
    if inner:
        return " or ".join(_type_name(k) for k in inner)
    return "None" if kind is types.NoneType else kind.__name__ if isinstance(kind, type) else str(kind)


def _choices(kind: Any) -> tuple[Any, ...]:
    """Returns the values of a `Literal`, also of one within another type."""
    inner = typing.get_args(kind)
    return inner if typing.get_origin(kind) is Literal else tuple(c for k in inner for c in _choices(k))


def flatten(run: Any, prefix: str = "") -> dict[str, Any]:
    """Returns a dict from dotted field names to values, {"optim.lr": 0.001, …}, and from `adapter` to its method."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(run):
        value = getattr(run, f.name)
        if isinstance(value, Adapter):
            out[prefix + f.name] = registry.name_of(value)
        if dataclasses.is_dataclass(value):
            out |= flatten(value, f"{prefix}{f.name}.")
        else:
            out[prefix + f.name] = value
    return out


def find(name: str | Path) -> Path:
    """Returns the path of a config file, which is given by path or by its bare name among those of the package."""
    bare = str(name).removesuffix(".py")
    for path in (Path(name), *(folder / f"{bare}.py" for folder in _folders())):
        if path.is_file():
            return path
    raise ValueError(f"no config file {name}{nearest(str(name), names())}")


def names() -> list[str]:
    """Returns the names of the package's configs."""
    return sorted(path.stem for folder in _folders() for path in folder.glob("*.py"))


def _folders() -> list[Path]:
    package = Path(__file__).parents[1]
    return [package / "_configs", package.parent / "configs"]


def load(path: str | Path) -> Run:
    """Runs the function `config()` of a config file, which may return any `Run`. Executes that file: it is code.

    ValueError: the file fails, said with its line; or it defines no such function.
    """
    return load_kind(path, Run)


def load_kind(path: str | Path, kind: type[Made]) -> Made:
    """Runs the function `config()` of a config file, which must return a `kind`."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location(f"jaxlm_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = getattr(module, "config", None)
        run = made() if isinstance(made, types.FunctionType) else None
    except Exception as error:
        line = _failing_line(path, error)
        if line is None:  # it can't be read
            raise
        why = error.msg if isinstance(error, SyntaxError) else one_line(error)
        raise ValueError(f"{path}:{line}: {type(error).__name__}: {why}") from error
    if not isinstance(made, types.FunctionType):
        raise ValueError(f"{path}: has no function config() that returns a {kind.__name__}")
    if not isinstance(run, kind):
        command = {"Run": "jaxlm train", "Stream": "jaxlm continual"}.get(type(run).__name__)
        raise ValueError(f"{path}: config() returned {type(run).__name__}, not a {kind.__name__}"
                         f"{f'; use it with: {command}' if command else ''}")  # fmt: skip
    return run


def _failing_line(path: Path, error: Exception) -> int | None:
    """Returns the last line of a file that was executed before the error, or that of its syntax error; None: none."""
    lines = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        lines.append((error.filename or "", error.lineno))
    return next((line or 1 for file, line in reversed(lines) if Path(file).resolve() == path.resolve()), None)


def choose_adapter(run: Run, args: list[str], adapters: Table[Any]) -> tuple[Run, list[str]]:
    """Returns the run with the adapter that `--adapter NAME` among the overrides names, and the overrides without it.

    `adapters` maps names to what has a `Config`.
    """
    rest = list(args)
    while "--adapter" in (flags := [a.partition("=")[0] for a in rest]):
        i = flags.index("--adapter")
        _, equals, name = rest[i].partition("=")
        name = name if equals else "".join(rest[i + 1 : i + 2])
        del rest[i : i + (1 if equals else 2)]
        run = with_adapter(run, name, adapters)
    return run, rest


def with_adapter(run: Run, name: str, adapters: Table[Any]) -> Run:
    """Returns the run with another method of fine-tuning. Fields that it shares with the run's own keep their values.
    ValueError: no method has that name."""
    kind = adapters.find(name, "adapter").Config
    shared = {f.name for f in dataclasses.fields(kind)} & {f.name for f in dataclasses.fields(run.adapter)}
    return dataclasses.replace(run, adapter=kind(**{field: getattr(run.adapter, field) for field in shared}))


def read_overrides(path: Path) -> dict[str, Any]:
    """Returns the fields to change that a YAML or JSON file names, nested or with dots: what `changed` takes.

    YAML is read by the rules of version 1.2: `no` is a text, and `1e-3` is a number. ValueError: there is no such file,
    it isn't such a mapping, or it names a field twice.
    """
    if not path.is_file():
        raise ValueError(f"overrides: no file {path}")
    try:
        values = yaml.load(path.read_text("utf-8"), _overrides_loader())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"overrides: {path}: {one_line(error, 300)}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"overrides: {path}: it must hold fields and their values, such as `optim.lr: 1e-3`")
    return values


def _overrides_loader() -> Any:
    """Returns a loader of YAML that knows the scalars of YAML 1.2's core schema and refuses a key that stands twice."""

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict] = {}

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise yaml.YAMLError(f"{twice} stands twice")
            return super().construct_mapping(node, deep)

    for tag, pattern, first in (
        ("null", r"^(?:~|null|)$", ["~", "n", ""]),
        ("bool", r"^(?:true|false)$", list("tf")),
        ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
        ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
        ("float", r"^[-+]?\.inf$|^\.nan$", list("-+.")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), first)
    return Loader


def changed(part: Any, changes: Mapping[str, Any], where: str = "") -> Any:
    """Returns a run, or a part of one, with changed fields. A key may have dots, and the value of a part may be a
    mapping of its fields. `where` is the part's own name with a dot.

    ValueError: there is no such field, or the value isn't of its type.
    """
    hints = typing.get_type_hints(type(part))
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        known = [f.name for f in dataclasses.fields(part)]
        if name not in known:
            raise ValueError(f"unknown config key {where}{name}{nearest(name, known)}")
        current = getattr(part, name)
        if rest or (dataclasses.is_dataclass(current) and isinstance(value, Mapping)):
            if not dataclasses.is_dataclass(current):
                raise ValueError(f"unknown config key {where}{key}: {where}{name} has no fields")
            value = changed(current, {rest: value} if rest else value, f"{where}{name}.")
        value = tuple(value) if isinstance(value, list) else value
        kind = hints[name]
        fits = dataclasses.is_dataclass(value) if isinstance(kind, TypeVar) else _fits(value, kind)
        if not fits:
            wanted = "a valid Config of a model or an objective" if isinstance(kind, TypeVar) else type_words(kind)
            raise ValueError(f"{where}{name}: {value!r} is not {wanted} (now {current!r})")
        part = dataclasses.replace(part, **{name: value})
    return part


def field_type(run: Run, path: str, where: str = "") -> Any:
    """Returns the type of the field of a run that a dotted path names. `where` begins the message of the ValueError if
    there is no such field, or if it is a whole part of the run."""
    part: Any = run
    *parts, last = path.split(".")
    for name in parts:
        part = getattr(part, name) if name in _field_names(part) else None
    if last not in _field_names(part):
        known = [key for key in flatten(run) if key != "adapter"]
        raise ValueError(f"{where}unknown config key {path}{_remedy(run, path, known)}")
    if dataclasses.is_dataclass(getattr(part, last)):
        inner = [f"{path}.{f.name}" for f in dataclasses.fields(getattr(part, last))]
        raise ValueError(f"{where}{path} is a part with fields of its own: {', '.join(inner[:4])} …")
    return typing.get_type_hints(type(part), include_extras=True)[last]


def _field_names(part: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else []


def override(run: Run, args: list[str]) -> Run:
    """Applies typed overrides such as ["--optim.lr", "3e-4"]. Unknown keys and wrong types are one-line errors."""
    import tyro  # 0.2 seconds that `import jaxlm` need not wait for

    if not args:
        return run
    known = {key: value for key, value in flatten(run).items() if key != "adapter"}
    flags = {f"--{k}" for k in known} | {
        "--" + ".".join([*k.split(".")[:-1], "no-" + k.split(".")[-1]]) for k, v in known.items() if isinstance(v, bool)
    }
    given = [a.split("=", 1)[0].replace("_", "-") for a in args if a.startswith("--")]
    for flag in given:
        if flag not in {f.replace("_", "-") for f in flags}:
            name = flag.removeprefix("--").replace("-", "_")
            raise ValueError(f"unknown config key {name}{_remedy(run, name, known)}")
    kind: Any = Run[type(run.model), type(run.objective)]  # type: ignore[misc]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its boxed message becomes one line below
            return tyro.cli(kind, default=run, args=args)
    except SystemExit:
        raise ValueError(_wrong_type(run, args, known)) from None


def _remedy(run: Run, name: str, known: Iterable[str]) -> str:
    """Returns what follows the name of an unknown key: the nearest of its part of the run, or of the whole run."""
    if name == "adapter.method" or (name.startswith("adapter.") and type(run.adapter) is Adapter):
        return "; choose a method first, and then its own fields: --adapter lora --adapter.rank 16"
    part = [key for key in known if key.startswith(f"{name.partition('.')[0]}.")]
    return nearest(name, part or known)


def _wrong_type(run: Run, args: list[str], known: dict[str, Any]) -> str:
    """Returns an error that names the one override that the types refuse."""
    import tyro

    kind: Any = Run[type(run.model), type(run.objective)]  # type: ignore[misc]
    hints = _hints(run)
    starts = [i for i, a in enumerate(args) if a.startswith("--")] + [len(args)]
    for a, b in itertools.pairwise(starts):
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                tyro.cli(kind, default=run, args=args[a:b])
        except SystemExit:
            flag, _, value = args[a].partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            value = " ".join(([value] if value else []) + args[a + 1 : b])
            return f"{name}: {value!r} is not {hints.get(name, 'a valid value')} (now {known.get(name)!r})"
    return f"cannot read the overrides {' '.join(args)!r}; see --help"


def _hints(part: Any, prefix: str = "") -> dict[str, str]:
    out: dict[str, str] = {}
    for name, kind in typing.get_type_hints(type(part)).items():
        value = getattr(part, name, None)
        if dataclasses.is_dataclass(value):
            out |= _hints(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = type_words(kind)
    return out


def dump(run: Run, path: Path) -> None:
    path.write_text(json.dumps(to_dict(run), indent=2) + "\n")
