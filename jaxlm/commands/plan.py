"""`jaxlm plan` says what a config needs on other machines; `jaxlm tune` measures what is fastest on this one."""

import argparse
from pathlib import Path
from typing import Any

from jaxlm.commands.arguments import add_command, load_run, print_json


def add_parsers(commands: Any) -> None:
    """Adds what this file's commands take to the parser of the command line."""
    p = add_command(commands, "plan", _plan,
                "what a config needs on machines that aren't here: memory, time, bottleneck",
                "jaxlm plan llama_8b --target v5p:4x4x4 --train.batch_size 64", overrides=True)  # fmt: skip
    p.add_argument("config", metavar="CONFIG|RUN_DIR", nargs="?", help="a config file or name, or a run directory")
    p.add_argument("--target", default="here", metavar="MACHINE", help="v5p:4x4x4, v5p-128, v6e:16x16, 2*v5e:16x16 "
                   "(slices), h100:8, h100:8x8 (nodes × GPUs), cpu:8 (default: here)")  # fmt: skip
    p.add_argument("--analytic", action="store_true", help="by arithmetic alone, in a second; compile nothing")
    p.add_argument("--search", action="store_true", help="try meshes, micro-batches and remat, by arithmetic")
    p.add_argument("--compile", type=int, default=0, metavar="N", help="--search: compile the best N (default 0)")
    p.add_argument("--out", type=Path, metavar="FILE.py", help="--search: write the best as a config for jaxlm train")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")
    p.add_argument("-h", "--help", action="help", help="this; jaxlm train CONFIG --help shows the overrides")

    p = add_command(commands, "tune", _tune,
                "measure a few steps of a config's fastest meshes and remat on this machine",
                "jaxlm tune quickstart --candidates 4 --out tuned.py", overrides=True)  # fmt: skip
    p.add_argument("config", metavar="CONFIG|RUN_DIR", nargs="?", help="a config file or name, or a run directory")
    p.add_argument("--candidates", type=int, default=4, metavar="N", help="besides the config as it is (default 4)")
    p.add_argument("--steps", type=int, default=5, metavar="N", help="measured of each, after two (default 5)")
    p.add_argument("--out", type=Path, metavar="FILE.py", help="write the fastest as a config for jaxlm train")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")
    p.add_argument("-h", "--help", action="help", help="this; jaxlm train CONFIG --help shows the overrides")


def _plan(args: argparse.Namespace, rest: list[str]) -> int:
    args.help = False
    if (args.compile or args.out) and not args.search:
        raise ValueError(f"--{'compile' if args.compile else 'out'}: is for --search; add it, or leave this out")
    run = load_run(args, rest).run
    from jaxlm.commands import plan_report
    from jaxlm.planning import targets

    t = targets.parse(args.target)
    if args.search:
        values, ok = plan_report.search(run, t, args.compile, args.out)
    else:
        values, ok = plan_report.plan_one(run, t, not args.analytic)
    print_json(args, values)
    return 0 if ok else 1


def _tune(args: argparse.Namespace, rest: list[str]) -> int:
    args.help = False
    for name in ("candidates", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: {getattr(args, name)} is too few; give 1 or more")
    run = load_run(args, rest).run
    from jaxlm.commands import plan_report

    return print_json(args, plan_report.measured(run, args.candidates, args.steps, args.out))
