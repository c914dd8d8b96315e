"""The command line dispatches to the commands. Importing this loads neither jax nor any other heavy package: `--help`
answers at once."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata

from jaxlm.commands import augment, convert, data, doctor, evaluate, generate, plan, report, train
from jaxlm.commands.arguments import with_flags
from jaxlm.core import errors, plugins
from jaxlm.runtime import processes

COMMANDS = (train, plan, evaluate, generate, augment, convert, data, report, doctor)  # in the order of `--help`


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name and returns the exit status.

    0: done; 1: it failed or was interrupted; 2: the request can't be met, said in one line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    modules = _take_plugins(arguments)
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and not args.overrides:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    processes.reserve_threads()
    try:
        plugins.load(modules)
        return args.run(args, rest)
    except KeyboardInterrupt:
        return _failed("interrupted", 1)
    except (ValueError, OSError) as error:
        line = with_flags(one_line(error), args)
        return _failed(f"jaxlm: {line}", 2, error if debug or _of_devices(error) else None)
    except RuntimeError as error:
        expected = type(error).__name__ in ("NonFiniteError", "ProcessError")
        return _failed(f"jaxlm: {one_line(error)}", 1, None if expected and not debug else error)
    except Exception as error:
        return _failed(f"jaxlm: {type(error).__name__}: {one_line(error)}", 1, error)


def _take_plugins(arguments: list[str]) -> list[str]:
    """Removes `--plugin MODULE`, which every command takes, from the arguments; returns the modules."""
    modules = []
    while "--plugin" in (flags := [a.partition("=")[0] for a in arguments]):
        i = flags.index("--plugin")
        _, equals, name = arguments[i].partition("=")
        modules.append(name if equals else "".join(arguments[i + 1 : i + 2]))
        del arguments[i : i + (1 if equals else 2)]
    return modules


def _failed(line: str, status: int, error: BaseException | None = None) -> int:
    """Says why a command failed, by a traceback where `error` is given; in a run of several processes it tells all of
    them and leaves."""
    status = 1 if error else status
    if processes.is_distributed():
        if error:
            traceback.print_exception(error)
        processes.fail(line.removeprefix("jaxlm: "), status)
    if error:
        raise error
    print(line, file=sys.stderr)
    return status


def _of_devices(error: BaseException) -> bool:
    """Returns whether an error came from devices and is no user's fault: XLA raises ValueError for some of them, such
    as a collective whose other end is gone."""
    return str(error).partition(":")[0] in ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED")


def one_line(error: BaseException) -> str:
    """Returns an error as one line; a fault of files names the file and the remedy."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; free space or choose another folder"
    return errors.one_line(error)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands; each file of `COMMANDS` adds its own."""
    parser = argparse.ArgumentParser(
        prog="jaxlm",
        description="Language models on JAX: pretrain, evaluate, generate, import and export.",
        epilog="example: jaxlm train configs/quickstart.py --train.steps 100",
    )
    parser.add_argument("--version", action="version", version=f"jaxlm {metadata.version('jaxlm')}")
    parser.add_argument("--debug", action="store_true", help="show a traceback for every error")
    parser.add_argument("--plugin", metavar="MODULE", action="append", help="a module, or a Python file, that "
                        "registers models, objectives, adapters, optimizers or schedules; may be given several times. "
                        "The variable JAXLM_PLUGINS names some too")  # fmt: skip
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_parsers(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
