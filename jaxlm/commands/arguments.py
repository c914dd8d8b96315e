"""Several commands share how they add a parser, load the run that arguments name, and print the last line of JSON."""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.core import config_io
from jaxlm.core.errors import nearest
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
    parser.set_defaults(run=run, overrides=overrides)
    return parser


def resolve_config(name: str) -> Path:
    """Returns the path of a config file, which is given by path or by its bare name among those of the package."""
    package = Path(__file__).parents[1]
    folders = [package / "_configs", package.parent / "configs"]
    candidates = [Path(name), *(folder / f"{name.removesuffix('.py')}.py" for folder in folders)]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted(p.stem for folder in folders for p in folder.glob("*.py"))
    raise ValueError(f"no config file {name}{nearest(name, known)}")


class LoadedRun(NamedTuple):
    base: Any
    """The run as its file has it."""
    run: Any
    """The run with the overrides of the command line."""
    start: Any
    """The `StartModel` of the run; its place is empty where the run starts from no model."""


def load_run(args: argparse.Namespace, rest: list[str]) -> LoadedRun:
    """Loads the run that the arguments name."""
    if args.config is None:
        raise ValueError(f"give a config, for example: jaxlm train quickstart{' --help' if args.help else ''}")
    from jaxlm.assembly import run_objective
    from jaxlm.assembly.model_source import StartModel

    if Path(args.config).is_dir():
        from jaxlm.assembly.run_directory import read_config

        folder = Path(args.config)
        base = read_config(folder)
        base = dataclasses.replace(base, name=folder.resolve().name, out=str(folder.parent))
        start = StartModel(base.start)
    else:
        base = config_io.load(resolve_config(args.config))
        start = StartModel(last_value(rest, "--start") or base.start)
        if start.place:
            from jaxlm.assembly import open_model

            base = open_model.starting(base, start)
    from jaxlm.weights.adapters import METHODS

    run, rest = config_io.choose_adapter(base, rest, METHODS)
    run = config_io.override(run, rest + (["--help"] if args.help else []))
    if start.place != run.start:
        start = StartModel(run.start)
    return LoadedRun(base, run_objective.infer_from_data(run), start)


def last_value(args: list[str], flag: str) -> str | None:
    """Returns the value of the last `--flag value` or `--flag=value`; None: the flag is not there."""
    found = [after for a, after in itertools.pairwise([*args, ""]) if a == flag]
    found += [a.partition("=")[2] for a in args if a.startswith(f"{flag}=")]
    return found[-1] if found else None


def start_processes(args: argparse.Namespace, run: Any = None) -> None:
    """Joins the other processes, if there are any: all must have been started with the same run, or arguments."""
    processes.start(vars(args) | {"run": None} if run is None else config_io.flatten(run))


def print_json(args: argparse.Namespace, values: dict) -> int:
    """Prints the values as one last line of JSON where `--json` asks for it; returns the exit status 0."""
    if args.json:
        print(json.dumps(values))
    return 0
