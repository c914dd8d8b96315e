"""Several commands share how they add a parser, load the run that arguments name, and print the last line of JSON."""

import argparse
import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.core import config, config_io
from jaxlm.runtime import processes

MODEL = (
    "a run directory, a Hugging Face directory, hf:OWNER/NAME, or a .gguf file; MODEL+ADAPTER puts an adapter of "
    "Hugging Face PEFT on it, whose directory alone may name its model"
)
Handler = Callable[[argparse.Namespace, list[str]], int]


def add_command(commands: Any, name: str, run: Handler, help: str, example: str, overrides: bool = False) -> Any:
    """Returns a new command's parser. `run` handles it and returns the exit status; with `overrides` it also gets the
    arguments that the parser doesn't know."""
    parser = commands.add_parser(
        name, help=help, description=help, epilog=f"example: {example}", add_help=not overrides
    )
    parser.set_defaults(run=run, overrides=overrides, parser=parser)
    return parser


class LoadedRun(NamedTuple):
    base: Any
    """The run as its file has it."""
    run: Any
    """The run with the overrides of the command line."""
    start: Any
    """The `StartModel` of the run; its place is empty where the run starts from no model."""


def load_run(args: argparse.Namespace, rest: list[str]) -> LoadedRun:
    """Loads the run that the arguments name. Where help is asked for it is shown, and the program ends."""
    if args.help:
        print(args.parser.format_help())
        if args.config is None:
            print("Every field of a config is an option too; see those of one: jaxlm train quickstart --help")
            raise SystemExit(0)
    if args.config is None:
        raise ValueError("give a config, for example: jaxlm train quickstart")
    if not Path(args.config).is_dir():
        config_io.find(args.config)  # an unknown name is told before anything heavy is imported
    from jaxlm.assembly import run_source
    from jaxlm.assembly.model_source import StartModel
    from jaxlm.weights.adapters import METHODS

    base, start = run_source.load_base(args.config, last_value(rest, "--start") or "")
    run, rest = config_io.choose_adapter(base, rest, METHODS)
    run = config_io.override(run, rest + (["--help"] if args.help else []))
    if start.place != run.start:
        start = StartModel(run.start)
    return LoadedRun(base, run_source.completed(run), start)


def last_value(args: list[str], flag: str) -> str | None:
    """Returns the value of the last `--flag value` or `--flag=value`; None: the flag is not there."""
    found = [after for a, after in itertools.pairwise([*args, ""]) if a == flag]
    found += [a.partition("=")[2] for a in args if a.startswith(f"{flag}=")]
    return found[-1] if found else None


def with_flags(message: str, args: argparse.Namespace) -> str:
    """Returns an error of the library with the command's options where it names arguments: at its beginning before a
    colon, and between backquotes."""
    options = set(re.findall(r"--([a-z][a-z-]*)", args.parser.format_help()))
    flag = lambda name: f"--{name.replace('_', '-')}"  # noqa: E731
    first = re.match(r"([a-z_]+)(?=[: ])", message)
    if first and flag(first[1])[2:] in options and ":" in message:
        message = flag(first[1]) + message[first.end() :]
    if args.overrides and "`" in message:
        from jaxlm.inference.sampling import Sampling

        options |= {f.name.replace("_", "-") for kind in (config.Run, Sampling) for f in dataclasses.fields(kind)}
    return re.sub(r"`([a-z_]+)`", lambda m: flag(m[1]) if flag(m[1])[2:] in options else m[0], message)


def start_processes(args: argparse.Namespace, run: Any = None) -> None:
    """Joins the other processes, if there are any: all must have been started with the same run, or arguments."""
    processes.start(vars(args) | {"run": None, "parser": None} if run is None else config_io.flatten(run))


def print_json(args: argparse.Namespace, values: dict) -> int:
    """Prints the values as one last line of JSON where `--json` asks for it; returns the exit status 0."""
    if args.json:
        print(json.dumps(values))
    return 0
