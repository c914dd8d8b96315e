"""The command line dispatches to the commands. Importing this loads neither jax nor any other heavy package: `--help`
answers at once, and a command loads no other."""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import TYPE_CHECKING, NamedTuple

from jaxlm.core import errors, plugins
from jaxlm.runtime import allocator, compile_cache, processes

if TYPE_CHECKING:
    from jaxlm.commands.arguments import Command


class Row(NamedTuple):
    place: str
    """The file of this folder and the dataclass there."""
    does: str
    computes: bool = True
    """Whether it runs a model, so that it pays to choose how memory is allocated and to keep compiled programs."""


COMMANDS = {  # in the order of `--help`
    "train": Row("train.Train", "train a config, or continue a run directory"),
    "continual": Row("continual.Continual", "train a stream of tasks one after another, and say what was kept"),
    "sweep": Row("sweep.Sweep", "search settings of a config: each trial a run, the best one a file", computes=False),
    "coordinate": Row(
        "coordinate.Coordinate", "run the parameter server of workers that are jobs of their own", computes=False
    ),
    "work": Row("work.Work", "join such a run as a worker"),
    "plan": Row("plan.Plan", "what a config needs on machines that aren't here: memory, time, bottleneck"),
    "tune": Row("plan.Tune", "measure the fastest meshes and remat policies of a config on this machine"),
    "coordinate-check": Row(
        "coordinate_check.CoordinateCheck", "whether settings can be taken from a narrow model to wide ones"
    ),
    "eval": Row("evaluate.Eval", "losses and scores of a model, with intervals"),
    "predict": Row("predict.Predict", "label texts with a fine-tuned model"),
    "generate": Row("generate.Generate", "continue prompts"),
    "chat": Row("generate.Chat", "talk with a model"),
    "serve": Row("serve.Serve", "answer over HTTP, as clients of OpenAI's interface expect"),
    "embed": Row("generate.Embed", "texts to vectors with an encoder"),
    "augment": Row("augment.Augment", "make more labelled examples"),
    "import": Row("convert.Import", "make a run directory of a published model"),
    "export": Row("convert.Export", "write a model for others to read, and check that it is the same"),
    "merge": Row("merge.Merge", "make one model of several of one shape"),
    "compress": Row("compress.Compress", "make a model small: few bits, or zeros that stay"),
    "grow": Row("grow.Grow", "make a larger model of a trained one that computes the same"),
    "shrink": Row("shrink.Shrink", "make a smaller model of a trained one: fewer heads, layers, channels or experts"),
    "extract": Row("extract.Extract", "make an adapter of what a full fine-tuning changed"),
    "tokenizer train": Row("data.TokenizerTrain", "train a SentencePiece tokenizer", computes=False),
    "data prepare": Row("data.DataPrepare", "tokenise the data of a config into its cache", computes=False),
    "data inspect": Row("data.DataInspect", "show decoded training examples", computes=False),
    "board": Row("board.Board", "a page that shows runs while they train", computes=False),
    "report": Row("report.Report", "rebuild report.html and report.png from a run's logs", computes=False),
    "doctor": Row("doctor.Doctor", "devices, versions, what is missing and the command that mends it", computes=False),
    "completion": Row(
        "completion.Completion", "a script that completes commands and options in bash, zsh or fish", computes=False
    ),
}
ABOUT = """usage: jaxlm [--version] [--plugin MODULE] [--debug] COMMAND ...

Language models on JAX: pretrain, fine-tune, evaluate, generate, import and export.

commands:
{commands}

options that every command takes:
    -h, --help       what a command takes, with an example
    --plugin MODULE  a module, or a Python file, that registers models, objectives, adapters, optimizers or schedules;
                     may be given several times. The variable JAXLM_PLUGINS names some too
    --json           print the results as one line of JSON; all else goes to stderr
    --debug          show a traceback for every error

example: jaxlm train quickstart --train.steps 100
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name and returns the exit status.

    0: done; 1: it failed or was interrupted; 2: the request can't be met, said in one line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    kind = None
    try:
        modules = _take_plugins(arguments)
        if arguments[:1] == ["--version"]:
            print(f"jaxlm {metadata.version('jaxlm')}")
            return 0
        name, rest = _named(arguments)
        if name not in COMMANDS:
            print(overview(name))
            return 0 if rest else 2  # `jaxlm` alone asks for nothing
        if argv is None and COMMANDS[name].computes and not {"-h", "--help"} & {*rest}:
            allocator.restart_tuned()
            compile_cache.use()
        processes.reserve_threads()
        processes.stop_with_input()
        kind = command(name)
        plugins.load(modules)
        return _run(kind, name, rest)
    except KeyboardInterrupt:
        return _failed("interrupted", 1)
    except BrokenPipeError:  # who read what is printed wants no more of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        line = one_line(error)
        if kind is not None:
            from jaxlm.commands.arguments import with_flags

            line = with_flags(line, kind)
        return _failed(f"jaxlm: {line}", 2, error if debug or _of_devices(error) else None)
    except RuntimeError as error:
        expected = type(error).__name__ in ("NonFiniteError", "ProcessError")
        return _failed(f"jaxlm: {one_line(error)}", 1, None if expected and not debug else error)
    except Exception as error:
        return _failed(f"jaxlm: {type(error).__name__}: {one_line(error)}", 1, error)


def command(name: str) -> "type[Command]":
    """Returns the dataclass of a command of the table."""
    file, _, kind = COMMANDS[name].place.partition(".")
    return getattr(import_module(f"jaxlm.commands.{file}"), kind)


def _run(kind: "type[Command]", name: str, arguments: list[str]) -> int:
    from jaxlm.commands import arguments as shared

    if "-h" in arguments or "--help" in arguments:
        shared.show_help(kind, name, arguments)
        return 0
    args, rest = shared.parse(kind, arguments)
    return args.main(rest)


def _named(arguments: list[str]) -> tuple[str, list[str]]:
    """Returns the name of a command, or the first word of several where help on them is asked for, and what follows it.
    ValueError: there is no such command."""
    words = arguments[:2]
    for name in (" ".join(words), *words[:1]):
        if name in COMMANDS:
            return name, arguments[len(name.split()) :]
    if not words or words[0] in ("-h", "--help"):
        return "", words
    inner = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if inner and words[1:] in ([], ["-h"], ["--help"]):
        return words[0], words[1:]
    unknown = " ".join(words) if inner else words[0]
    raise ValueError(f"unknown command {unknown}{errors.nearest(unknown, inner or COMMANDS)}")


def overview(first: str = "") -> str:
    """Returns the list of all commands, or of those whose name begins with a word."""
    rows = {name: row.does for name, row in COMMANDS.items() if not first or name.startswith(f"{first} ")}
    width = max(map(len, rows))
    return ABOUT.format(commands="\n".join(f"    {name:{width}}  {does}" for name, does in rows.items())).rstrip()


def _take_plugins(arguments: list[str]) -> list[str]:
    """Removes `--plugin MODULE`, which every command takes, from the arguments; returns the modules."""
    modules = []
    while "--plugin" in (flags := [a.partition("=")[0] for a in arguments]):
        i = flags.index("--plugin")
        _, equals, name = arguments[i].partition("=")
        modules.append(name if equals else "".join(arguments[i + 1 : i + 2]))
        if not modules[-1]:
            raise ValueError("--plugin: give a module, or a Python file")
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
        return f"{where}{errors.of_system(error)}"
    return errors.one_line(error)


if __name__ == "__main__":
    sys.exit(main())
