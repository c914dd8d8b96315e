"""`jaxlm import` and `jaxlm export` read and write other people's files."""

import argparse
from typing import Any

from jaxlm.commands.arguments import MODEL, add_command, print_json, start_processes


def add_parsers(commands: Any) -> None:
    """Adds what this file's commands take to the parser of the command line."""
    p = add_command(commands, "import", _import, "make a run directory of a published model",
                "jaxlm import hf:HuggingFaceTB/SmolLM2-135M models/smollm2")  # fmt: skip
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("target", metavar="RUN_DIR")
    p = add_command(commands, "export", _export, "write a model for others to read, and check that it is the same",
                "jaxlm export runs/quickstart quickstart-hf --format hf --dtype bfloat16")  # fmt: skip
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("target", metavar="TARGET", help="a new directory; gguf: a new file")
    p.add_argument("--format", default="hf", help="hf: safetensors as transformers reads them; gguf: for llama.cpp; "
                   "stablehlo: programs that run without this package; peft: its adapter alone, which the others merge "
                   "(default hf)")  # fmt: skip
    p.add_argument("--dtype", help="hf: float32, bfloat16, float16 (default: as it is); gguf: f16 (default), q8_0; "
                   "stablehlo: float32 (default), bfloat16")  # fmt: skip
    p.add_argument("--step", type=int, help="of a checkpoint (default: the newest)")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")


def _import(args: argparse.Namespace, rest: list[str]) -> int:
    start_processes(args)
    from jaxlm.assembly import convert

    print(*convert.import_model(args.model, args.target), sep="\n")
    return 0


def _export(args: argparse.Namespace, rest: list[str]) -> int:
    start_processes(args)
    from jaxlm.assembly import convert

    notes, record = convert.export(args.model, args.target, format=args.format, dtype=args.dtype, step=args.step)
    print(*notes, sep="\n")
    print(
        f"logits before and after: off by {record['relative_difference']:.2g} of their deviation, at most by "
        f"{record['max_abs_difference']:.2g}; same likeliest token at {record['same_top_token']:.1%} of places"
    )
    return print_json(args, record)
