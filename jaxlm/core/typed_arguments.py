"""Command-line arguments become a dataclass by tyro. What doesn't fit is a ValueError of one line that names an option.

A field is an option, `--seq-len` or `--seq_len`, unless its annotation has tyro's marker `Positional`.
"""

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import operator
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import tyro

from jaxlm.core import ranges
from jaxlm.core.config_io import type_words
from jaxlm.core.errors import nearest


class Split(NamedTuple):
    """A Split tells apart the arguments of a command line."""

    own: list[str]
    """Those of the dataclass: its options with their values, and its positional arguments."""
    rest: list[str]
    """Options that it doesn't have, each with all that follows up to the next option."""


def flag(name: str) -> str:
    """Returns the option of a field."""
    return f"--{name.replace('_', '-')}"


def positional(kind: type) -> list[str]:
    """Returns the names of the fields that are positional arguments, in their order."""
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(kind)
    return [f.name for f in fields if tyro.conf.Positional in _marks(hints[f.name])]


def _marks(kind: Any) -> tuple[Any, ...]:
    """Returns what an annotation says besides the type."""
    return kind.__metadata__ if typing.get_origin(kind) is typing.Annotated else ()


def _bare(kind: Any) -> Any:
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    return kind


def _named(argument: str) -> str:
    """Returns the field that an option names, whether there is one or not."""
    return argument.partition("=")[0].removeprefix("--").replace("-", "_")


def _is_option(argument: str) -> bool:
    return argument.startswith("--") and len(argument) > 2


def split(kind: type, args: Sequence[str]) -> Split:
    """Returns the arguments that belong to a dataclass, and the others.

    ValueError: a positional argument is one too many.
    """
    hints = {name: _bare(hint) for name, hint in typing.get_type_hints(kind, include_extras=True).items()}
    places = positional(kind)
    many = [name for name in places if typing.get_origin(hints[name]) is tuple]
    options = {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.name not in places}
    own, rest, found = list[str](), list[str](), list[str]()
    into, room = found, 0  # where a bare argument goes, and how many more do; -1: all up to the next option
    for argument in args:
        if not _is_option(argument):
            if room == 0:
                into = found
            into.append(argument)
            room -= room > 0
            continue
        name = _named(argument)
        into, room = (own, 1) if name in options else (rest, -1)
        if name in options and (options[name] is bool or "=" in argument):
            room = 0
        elif name in options and typing.get_origin(options[name]) is tuple and not _repeats(kind, name):
            room = -1
        into.append(argument)
    if len(found) > len(places) and not many:
        raise ValueError(f"{found[len(places)]!r} is one argument too many")
    return Split(found + own, rest)


def _repeats(kind: type, name: str) -> bool:
    """Returns whether an option takes one value and may be given several times."""
    return tyro.conf.UseAppendAction in _marks(typing.get_type_hints(kind, include_extras=True)[name])


def parse(kind: Any, args: Sequence[str], default: Any = None) -> Any:
    """Returns the dataclass that arguments describe; `default` has the values of options that aren't given.

    ValueError: an option is unknown, has no value, one of another type or one out of its range, or a required argument
    is missing.
    """
    own, rest = split(kind, args)
    for argument in rest[:1]:
        known = [f.name for f in dataclasses.fields(kind) if f.name not in positional(kind)]
        raise ValueError(f"unknown option {argument.partition('=')[0]}{_nearest_option(_named(argument), known)}")
    hints = typing.get_type_hints(kind, include_extras=True)
    for option, after in itertools.pairwise([*own, "--"]):
        takes_next = _is_option(option) and "=" not in option and _bare(hints[_named(option)]) is not bool
        if takes_next and after.startswith("--"):
            raise ValueError(f"{option}: give a value")
    if default is None:
        _require(kind, own)
    try:
        made = read(kind, own, default)
    except SystemExit:
        raise ValueError(_unfit(kind, own, default)) from None
    for f in dataclasses.fields(kind):
        if out := ranges.outside(getattr(made, f.name), hints[f.name]):
            raise ValueError(f"{flag(f.name)}: {out}")
    return made


def _nearest_option(name: str, known: list[str]) -> str:
    return nearest(flag(name), [flag(k) for k in known])


def _require(kind: type, own: Sequence[str]) -> None:
    places, given = positional(kind), {_named(a) for a in own if _is_option(a)}
    bare = len(list(itertools.takewhile(lambda a: not _is_option(a), own)))
    for f in dataclasses.fields(kind):
        if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING:
            continue
        if (places.index(f.name) >= bare) if f.name in places else (f.name not in given):
            example = [a for a in (inspect.getdoc(kind) or "").splitlines() if a.startswith("example: ")]
            raise ValueError(f"give {_called(kind, f.name)}; {f'for {example[0]}' if example else 'see --help'}")


def _called(kind: type, name: str) -> str:
    """Returns what help calls a field: its option, or the word that stands for a positional argument."""
    if name not in positional(kind):
        return flag(name)
    marks = _marks(typing.get_type_hints(kind, include_extras=True)[name])
    return next((m.metavar for m in marks if getattr(m, "metavar", None)), name.upper())


def read(kind: Any, args: Sequence[str], default: Any = None, prog: str | None = None) -> Any:
    """Returns what tyro reads, without its own messages. SystemExit: something doesn't fit."""
    with contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(kind, args=list(args), prog=prog, **({} if default is None else {"default": default}))


def _unfit(kind: type, own: Sequence[str], default: Any) -> str:
    """Returns an error that names the one argument whose value is of another type than its field."""
    hints = {name: _bare(hint) for name, hint in typing.get_type_hints(kind, include_extras=True).items()}
    starts = [i for i, a in enumerate(own) if _is_option(a)] + [len(own)]
    values: dict[str, Any] = {f.name: _any(hints[f.name]) for f in dataclasses.fields(kind)
                              if f.default is f.default_factory is dataclasses.MISSING}  # fmt: skip
    default = kind(**values) if default is None else default
    for a, b in itertools.pairwise(starts):
        try:
            read(kind, own[a:b], default)
        except SystemExit:
            name, (_, equals, value) = _named(own[a]), own[a].partition("=")
            given = " ".join(([value] if equals else []) + list(own[a + 1 : b]))
            return f"{flag(name)}: {given!r} is not {type_words(hints[name])}"
    for name, value in zip(positional(kind), own[: starts[0]], strict=False):
        if typing.get_origin(hints[name]) is Literal and value not in typing.get_args(hints[name]):
            return f"{_called(kind, name)}: {value!r} is not {type_words(hints[name])}"
    return f"cannot read {' '.join(own)!r}; see --help"


def _any(kind: Any) -> Any:
    """Returns a value of a type that no user gave, to try other arguments beside it."""
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)[0]
    return () if typing.get_origin(kind) is tuple else kind()


def show_help(kind: Any, prog: str, description: str) -> None:
    """Prints what tyro says of a dataclass's options."""
    with contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], prog=prog, description=description)


def with_part(kind: type, name: str, part: Any, default: Any) -> type:
    """Returns a dataclass that has another one's options too, with these values, for help and completion."""
    field = (name, typing.Annotated[part, tyro.conf.arg(name="")], dataclasses.field(default=default))
    return dataclasses.make_dataclass(kind.__name__, [field], bases=(kind,), frozen=True)


def completion(commands: Mapping[str, type], prog: str, shell: str) -> str:
    """Returns a script that completes commands and their options in bash, zsh or fish. A command's name may have two
    words."""
    groups: dict[str, dict[str, Any]] = {}
    for name, kind in commands.items():
        first, _, second = name.partition(" ")
        groups.setdefault(first, {})[second] = kind
    rows = {}
    for name, inner in groups.items():
        whole = inner[""] if "" in inner else dataclasses.make_dataclass(
            name, [("command", typing.Annotated[_union(inner), tyro.conf.OmitSubcommandPrefixes])])  # fmt: skip
        rows[name] = whole
    out = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):
        tyro.cli(_union(rows), args=["--tyro-print-completion", shell], prog=prog)
    lines = out.getvalue().split("\n")  # a help text of several lines would be taken for several completions
    return "\n".join(a.replace("\\n", " ") if a.startswith("COMPLETION_SPEC") else a for a in lines)


def _union(kinds: Mapping[str, type]) -> Any:
    named = [typing.Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)] for name, kind in kinds.items()]
    return functools.reduce(operator.or_, named)
