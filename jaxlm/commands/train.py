"""`jaxlm train` trains a config, or continues a run directory."""

import argparse
from typing import Any

from jaxlm.commands.arguments import add_command, load_run, start_processes


def add_parsers(commands: Any) -> None:
    """Adds what this file's commands take to the parser of the command line."""
    p = add_command(commands, "train", _train, "train a config, or continue a run directory",
                "jaxlm train configs/quickstart.py --optim.lr 3e-4 --mesh.fsdp 8", overrides=True)  # fmt: skip
    p.add_argument("config", metavar="CONFIG|RUN_DIR", nargs="?", help="a config file or name, or a run directory")
    p.add_argument("--dry-run", action="store_true", help="show what would run, and don't")
    p.add_argument("-h", "--help", action="store_true", help="the overrides of that config, with their values")


def _train(args: argparse.Namespace, rest: list[str]) -> int:
    base, run, start = load_run(args, rest)
    start_processes(args, run)
    from jaxlm.assembly import run_directory, training_run
    from jaxlm.commands import dry_run

    run_directory.writable(run.folder)
    if args.dry_run:
        return dry_run.show(base, run, start)
    return training_run.train(run, start)
