"""`jaxlm generate`, `jaxlm chat` and `jaxlm embed` make text and vectors with a model."""

import argparse
import sys
from pathlib import Path
from typing import Any

from jaxlm.commands.arguments import MODEL, add_command, print_json, start_processes


def add_parsers(commands: Any) -> None:
    """Adds what this file's commands take to the parser of the command line."""
    p = add_command(commands, "generate", _generate, "continue a prompt",
                "jaxlm generate runs/quickstart --prompt 'def main(' --temperature 0.8", overrides=True)  # fmt: skip
    p.add_argument("model", metavar="MODEL", nargs="?", help=MODEL)
    p.add_argument("--prompt", action="append", help="may be given several times")
    p.add_argument("--draft", metavar="MODEL|lookup", help="a smaller model of the same tokenizer proposes tokens, "
                   "or what was said before does: the same text, sooner")  # fmt: skip
    p.add_argument("--adapter", action="append", default=[], metavar="DIR|-", help="of each prompt in turn, "
                   "PEFT's files or none: one batch goes through several adapters")  # fmt: skip
    p.add_argument("--proposals", type=int, default=4, help="tokens that the draft proposes at a time (default 4)")
    p.add_argument("--step", type=int, help="of a checkpoint (default: the newest)")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")
    p.add_argument("-h", "--help", action="store_true", help="how text may be chosen, with the model's own values")

    p = add_command(commands, "chat", _chat, "talk with a model: /reset forgets, /exit ends, Ctrl-C ends an answer",
                "jaxlm chat runs/tuned --system 'Answer in one line.'", overrides=True)  # fmt: skip
    p.add_argument("model", metavar="MODEL", nargs="?", help=MODEL)
    p.add_argument("--system", metavar="TEXT", help="what the model is told first")
    p.add_argument("--template", type=Path, metavar="FILE", help="chat template in Jinja (default: the model's own)")
    p.add_argument("--step", type=int, help="of a checkpoint (default: the newest)")
    p.add_argument("-h", "--help", action="store_true", help="how text may be chosen, with the model's own values")

    p = add_command(commands, "embed", _embed, "texts to vectors with an encoder",
                "jaxlm embed all-MiniLM-L6-v2 --text 'A man is eating food.' --out vectors.npy")  # fmt: skip
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("--text", action="append", default=[], help="may be given several times")
    p.add_argument("--file", type=Path, help="one text a line")
    p.add_argument("--pooling", choices=("mean", "cls"), help="default: what the model's files say, or mean")
    p.add_argument("--out", type=Path, metavar="FILE.npy", help="float32, one row a text")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")


def _sampling(args: argparse.Namespace, rest: list[str]) -> tuple[Any, Any]:
    """Returns the described model, and its own settings with overrides; where help was asked for it is printed."""
    import contextlib
    import dataclasses
    import io

    import tyro

    from jaxlm.assembly import generate_text, model_source
    from jaxlm.core.errors import nearest
    from jaxlm.inference.sampling import Sampling

    if args.model is None and not args.help:
        raise ValueError("give a model, for example: jaxlm generate runs/quickstart --prompt 'def main('")
    source = None if args.model is None else model_source.describe(args.model)
    own = Sampling() if source is None else generate_text.settings(source)
    if args.help:
        print(args.parser.format_help())
        tyro.cli(Sampling, default=own, args=["--help"], prog="jaxlm generate|chat MODEL")
    known = [f.name for f in dataclasses.fields(own)]
    for flag in (a.split("=", 1)[0] for a in rest if a.startswith("--")):
        name = flag.removeprefix("--").replace("-", "_")
        if name not in known:
            raise ValueError(f"unknown option {flag}{nearest(name, known)}")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its boxed message becomes one line
            return source, tyro.cli(Sampling, default=own, args=rest)
    except SystemExit:
        raise ValueError(f"{' '.join(rest)}: a value is of the wrong type; see jaxlm generate --help") from None


def _generate(args: argparse.Namespace, rest: list[str]) -> int:
    start_processes(args)
    from jaxlm.assembly import generate_text

    source, how = _sampling(args, rest)
    if not args.prompt:
        raise ValueError("give a --prompt")
    more = dict(draft=args.draft, proposals=args.proposals, adapters=args.adapter)
    found = generate_text.generate(source, args.prompt, how, args.step, **more)
    for prompt, answers in zip(args.prompt, found, strict=True):
        for answer in answers:
            print(prompt + answer.text)
    texts = [[a.text for a in answers] for answers in found]
    values: dict[str, Any] = {"prompts": args.prompt, "texts": texts if how.samples > 1 else [t for [t] in texts]}
    values["reasons"] = [[a.completion.reason for a in answers] for answers in found]
    if how.logprobs is not None:
        values["logprobs"] = [[a.completion.logprobs for a in answers] for answers in found]
        values["likeliest"] = [[a.completion.top for a in answers] for answers in found]
    return print_json(args, values)


def _chat(args: argparse.Namespace, rest: list[str]) -> int:
    start_processes(args)
    from jaxlm.assembly import generate_text

    def say(text: str) -> None:
        print(text, end="", flush=True)

    (source, how), prompt = _sampling(args, rest), "> " if sys.stdin.isatty() else ""
    more = dict(system=args.system, template=args.template, step=args.step, prompt=prompt)
    generate_text.chat(source, iter(sys.stdin.readline, ""), say, how, **more)
    return 0


def _embed(args: argparse.Namespace, rest: list[str]) -> int:
    texts = args.text + (args.file.read_text("utf-8").splitlines() if args.file else [])
    if not texts:
        raise ValueError("embed: no text; give --text or --file")
    start_processes(args)
    import numpy as np

    from jaxlm.assembly import generate_text

    vectors = generate_text.embed(args.model, texts, args.pooling)
    if args.out:
        np.save(args.out, vectors)
        print(f"{args.out}: {vectors.shape[0]} vectors of {vectors.shape[1]}")
        return print_json(args, {"out": str(args.out), "shape": vectors.shape})
    for text, vector in zip(texts, vectors, strict=True):
        print(f"{text}\t{' '.join(f'{x:.6f}' for x in vector)}")
    return print_json(args, {"texts": texts, "vectors": vectors.tolist()})
