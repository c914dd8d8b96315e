"""`jaxlm tokenizer train`, `jaxlm data prepare` and `jaxlm data inspect` make tokens and show them."""

import argparse
from pathlib import Path
from typing import Any

from jaxlm.commands.arguments import add_command, load_run


def add_parsers(commands: Any) -> None:
    """Adds what this file's commands take to the parser of the command line."""
    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer").add_subparsers(required=True)
    p = add_command(tokenizer, "train", _tokenizer_train, "train a lossless SentencePiece tokenizer with byte fallback",
                "jaxlm tokenizer train stdlib --vocab 8192 --out code.model")  # fmt: skip
    p.add_argument("source", nargs="+", metavar="SOURCE")
    p.add_argument("--vocab", type=int, default=8192)
    p.add_argument("--out", type=Path, required=True, metavar="FILE.model")
    p.add_argument("--field", default="text", help="of JSONL, Parquet and TFDS records")

    data = commands.add_parser("data", help="tokenise data, look at data").add_subparsers(required=True)
    p = add_command(data, "prepare", _data_prepare, "tokenise the data of a config into its cache",
                "jaxlm data prepare configs/quickstart.py", overrides=True)  # fmt: skip
    p.add_argument("config", metavar="CONFIG", nargs="?")
    p.add_argument("-h", "--help", action="store_true")
    p = add_command(data, "inspect", _data_inspect, "show decoded training examples, with what is learned from marked",
                "jaxlm data inspect configs/quickstart.py", overrides=True)  # fmt: skip
    p.add_argument("config", metavar="CONFIG", nargs="?")
    p.add_argument("--examples", type=int, default=2)
    p.add_argument("-h", "--help", action="store_true")


def _tokenizer_train(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxlm.data import token_cache, train_tokenizer

    texts = (text for source in args.source for text in token_cache.texts(source, field=args.field, part="train"))
    made = train_tokenizer.train_sentencepiece(texts, args.out, vocab_size=args.vocab)
    print(f"{args.out}: {made.vocab_size} pieces")
    return 0


def _data_prepare(args: argparse.Namespace, rest: list[str]) -> int:
    _, run, start = load_run(args, rest)
    from jaxlm.assembly import corpus, open_model
    from jaxlm.data.token_cache import Cache

    data = corpus.corpus(run.data, open_model.bound_objective(run, start))
    for name, caches in (("train", data.train), ("valid", data.valid)):
        for c in caches:
            if isinstance(c, Cache):
                print(f"{name}: {len(c):,} documents, {len(c.tokens):,} tokens, {c.raw_bytes.sum():,} bytes")
            else:
                print(f"{name}: {len(c):,} records")
    return 0


def _data_inspect(args: argparse.Namespace, rest: list[str]) -> int:
    _, run, start = load_run(args, rest)
    from jaxlm.assembly import corpus, open_model
    from jaxlm.commands import dry_run

    objective = open_model.bound_objective(run, start)
    loader = corpus.training_loader(run, objective, corpus.corpus(run.data, objective), None)
    for i in range(args.examples):
        dry_run.show_example(loader.example(i), objective.tokenizer, f"example {i}")
    return 0
