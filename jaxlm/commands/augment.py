"""`jaxlm augment` makes more labelled examples from a table or from tagged words."""

import argparse
from pathlib import Path
from typing import Any

from jaxlm.commands.arguments import MODEL, add_command, start_processes


def add_parsers(commands: Any) -> None:
    """Adds what this file's commands take to the parser of the command line."""
    p = add_command(commands, "augment", _augment, "more labelled examples: words by a masked model, or there and back",
                "jaxlm augment train.tsv --method mask --model runs/bert --text sentence --out more.tsv")  # fmt: skip
    p.add_argument("file", metavar="FILE", help="a .csv, .tsv or .jsonl table, or CoNLL columns")
    p.add_argument("--method", choices=("mask", "back_translate"), required=True)
    p.add_argument("--model", required=True, metavar="MODEL", help=f"mask: an encoder with a language-model head; "
                   f"back_translate: an encoder-decoder; {MODEL}")  # fmt: skip
    p.add_argument("--back", metavar="MODEL", help="back_translate: an encoder-decoder that translates back")
    p.add_argument("--out", type=Path, required=True, help="a new file of the same format, of the new examples alone")
    p.add_argument("--text", default="text", metavar="COLUMN", help="of a table (default text)")
    p.add_argument("--columns", default="", metavar="A,B", help="of a .csv or .tsv whose first line is no header")
    p.add_argument("--word", type=int, default=0, help="column of CoNLL words (default 0)")
    p.add_argument("--tag", type=int, default=-1, help="column of CoNLL tags (default -1, the last)")
    p.add_argument("--entities", action="store_true", help="replace words of entities too, which else stay")
    p.add_argument("--share", type=float, default=0.15, help="mask: of the words (default 0.15)")
    p.add_argument("--top-k", type=int, default=10, help="mask: draw from so many of the likeliest words (default 10)")
    p.add_argument("--copies", type=int, default=1, help="new examples of each (default 1)")
    p.add_argument("--prefix", default="", help="back_translate: text before each, such as T5's task")
    p.add_argument("--back-prefix", default="", help="the same of --back")
    p.add_argument("--temperature", type=float, default=0.0, help="back_translate (default 0: the likeliest)")
    p.add_argument("--beams", type=int, default=1, help="back_translate (default 1)")
    p.add_argument("--tokens", type=int, default=128, help="back_translate: of a text, at most (default 128)")
    p.add_argument("--seed", type=int, default=0)


def _augment(args: argparse.Namespace, rest: list[str]) -> int:
    start_processes(args)
    from jaxlm.assembly import augment
    from jaxlm.inference.sampling import Sampling

    how = Sampling(tokens=args.tokens or 512, temperature=args.temperature, beams=args.beams)
    columns = tuple(name for name in args.columns.split(",") if name)
    said = augment.augment(
        args.file, args.out, args.method, args.model, args.back, text=args.text, columns=columns, word=args.word,
        tag=args.tag, entities=args.entities, share=args.share, top_k=args.top_k, copies=args.copies,
        prefixes=(args.prefix, args.back_prefix), how=how, seed=args.seed,
    )  # fmt: skip
    print(said)
    return 0
