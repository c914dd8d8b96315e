"""The command line. Importing this loads neither jax nor any other heavy package: `--help` answers at once."""

import argparse
import dataclasses
import itertools
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxlm.runtime import processes

# What a command takes a model from.
MODEL = (
    "a run directory, a Hugging Face directory, hf:OWNER/NAME, or a .gguf file; MODEL+ADAPTER puts an adapter of "
    "Hugging Face PEFT on it, whose directory alone may name its model"
)
Handler = Callable[[argparse.Namespace, list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: it failed or was interrupted; 2: the request can't be met, said in one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and not args.overrides:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    processes.enough_threads()
    try:
        return args.run(args, rest)
    except KeyboardInterrupt:
        return _failed("interrupted", 1)
    except (ValueError, OSError) as error:
        return _failed(f"jaxlm: {one_line(error)}", 2, error if debug or _of_devices(error) else None)
    except RuntimeError as error:
        expected = type(error).__name__ in ("NonFiniteError", "ProcessError")
        return _failed(f"jaxlm: {one_line(error)}", 1, None if expected and not debug else error)
    except Exception as error:
        return _failed(f"jaxlm: {type(error).__name__}: {one_line(error)}", 1, error)


def _failed(line: str, status: int, error: BaseException | None = None) -> int:
    """Say why, by a traceback where `error` is given; in a run of several processes to all of them, and leave."""
    status = 1 if error else status
    if processes.joined():
        if error:
            traceback.print_exception(error)
        processes.failed(line.removeprefix("jaxlm: "), status)
    if error:
        raise error
    print(line, file=sys.stderr)
    return status


def _of_devices(error: BaseException) -> bool:
    """Not a user's fault, though XLA raises ValueError for some: a collective whose other end is gone, for one."""
    return str(error).partition(":")[0] in ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED")


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; free space or choose another folder"
    return " ".join(str(error).split())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxlm",
        description="Language models on JAX: pretrain, evaluate, generate, import and export.",
        epilog="example: jaxlm train configs/quickstart.py --train.steps 100",
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback for every error")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(of: Any, name: str, run: Handler, help: str, example: str, overrides: bool = False) -> Any:
        p = of.add_parser(name, help=help, description=help, epilog=f"example: {example}", add_help=not overrides)
        p.set_defaults(run=run, overrides=overrides)
        return p

    p = command(commands, "train", _train, "train a config, or continue a run directory",
                "jaxlm train configs/quickstart.py --optim.lr 3e-4 --mesh.fsdp 8", overrides=True)  # fmt: skip
    p.add_argument("config", metavar="CONFIG|RUN_DIR", nargs="?", help="a config file or name, or a run directory")
    p.add_argument("--dry-run", action="store_true", help="show what would run, and don't")
    p.add_argument("-h", "--help", action="store_true", help="the overrides of that config, with their values")

    p = command(commands, "plan", _plan, "what a config needs on machines that aren't here: memory, time, bottleneck",
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

    p = command(commands, "tune", _tune, "measure a few steps of a config's fastest meshes and remat on this machine",
                "jaxlm tune quickstart --candidates 4 --out tuned.py", overrides=True)  # fmt: skip
    p.add_argument("config", metavar="CONFIG|RUN_DIR", nargs="?", help="a config file or name, or a run directory")
    p.add_argument("--candidates", type=int, default=4, metavar="N", help="besides the config as it is (default 4)")
    p.add_argument("--steps", type=int, default=5, metavar="N", help="measured of each, after two (default 5)")
    p.add_argument("--out", type=Path, metavar="FILE.py", help="write the fastest as a config for jaxlm train")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")
    p.add_argument("-h", "--help", action="help", help="this; jaxlm train CONFIG --help shows the overrides")

    p = command(commands, "eval", _evaluate, "loss, perplexity, bits per byte and accuracy of a model",
                "jaxlm eval runs/quickstart --data README.md")  # fmt: skip
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("--data", nargs="+", metavar="SOURCE", help="other text to evaluate on")
    p.add_argument("--step", type=int, help="of a checkpoint (default: the newest)")
    p.add_argument("--batches", type=int, default=0, help="at most so many of each source")
    p.add_argument("--tasks", metavar="A,B", help="tasks of the lm-evaluation-harness instead of text")
    p.add_argument(
        "--task-folder", type=Path, metavar="DIR", help="your own tasks in YAML, instead of the built-in ones"
    )
    p.add_argument("--shots", type=int, help="examples before each question (default: the task's)")
    p.add_argument("--limit", type=int, help="at most so many examples of each task, or texts of each source")
    p.add_argument("--chat", action="store_true", help="ask by the model's chat template")
    p.add_argument("--metric", metavar="NAME", help="let the model write and compare it with the data's texts: bleu "
                   "(and chrF), rouge, exact, number (the last of a text)")  # fmt: skip
    p.add_argument("--beams", type=int, default=1, help="--metric: of beam search (default 1, none)")
    p.add_argument("--code", metavar="FILE", help="problems in HumanEval's format instead of text: pass@k")
    p.add_argument("--run-generated-code", action="store_true", help="--code: yes, run what the model writes, shut in")
    p.add_argument("--weak-sandbox", action="store_true", help="--code: also where this machine can't shut it in "
                   "whole; says what is missing")  # fmt: skip
    p.add_argument("--samples", type=int, default=1, help="--code: answers to each problem (default 1)")
    p.add_argument("--k", default="1", metavar="1,10", help="--code: of pass@k (default 1)")
    p.add_argument("--temperature", type=float, default=0.0, help="--code: of the samples (default 0, the likeliest)")
    p.add_argument("--top-p", type=float, default=1.0, help="--code: of the samples (default 1)")
    p.add_argument("--tokens", type=int, help="of a text, at most (default: --code 512, --metric 128)")
    p.add_argument("--seconds", type=float, default=5.0, help="--code: of a program, at most (default 5)")
    p.add_argument("--memory", type=int, default=1024, metavar="MIB", help="--code: of a program (default 1024)")
    p.add_argument("--against", metavar="OTHER", help="another model on the same examples: differences with their 95 % "
                   "intervals and p, by a paired bootstrap")  # fmt: skip
    p.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap (default 10000)")
    p.add_argument("--seed", type=int, default=0, help="of the bootstrap, and of samples (default 0)")
    p.add_argument("--out", type=Path, help="where results.json and examples go (default, where there are examples or "
                   "another model: evals/NAME)")  # fmt: skip
    p.add_argument("--json", action="store_true", help="end with one line of JSON")

    p = command(commands, "generate", _generate, "continue a prompt",
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

    p = command(commands, "chat", _chat, "talk with a model: /reset forgets, /exit ends, Ctrl-C ends an answer",
                "jaxlm chat runs/tuned --system 'Answer in one line.'", overrides=True)  # fmt: skip
    p.add_argument("model", metavar="MODEL", nargs="?", help=MODEL)
    p.add_argument("--system", metavar="TEXT", help="what the model is told first")
    p.add_argument("--template", type=Path, metavar="FILE", help="chat template in Jinja (default: the model's own)")
    p.add_argument("--step", type=int, help="of a checkpoint (default: the newest)")
    p.add_argument("-h", "--help", action="store_true", help="how text may be chosen, with the model's own values")

    p = command(commands, "embed", _embed, "texts to vectors with an encoder",
                "jaxlm embed all-MiniLM-L6-v2 --text 'A man is eating food.' --out vectors.npy")  # fmt: skip
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("--text", action="append", default=[], help="may be given several times")
    p.add_argument("--file", type=Path, help="one text a line")
    p.add_argument("--pooling", choices=("mean", "cls"), help="default: what the model's files say, or mean")
    p.add_argument("--out", type=Path, metavar="FILE.npy", help="float32, one row a text")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")

    p = command(commands, "augment", _augment, "more labelled examples: words by a masked model, or there and back",
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

    p = command(commands, "import", _import, "make a run directory of a published model",
                "jaxlm import hf:HuggingFaceTB/SmolLM2-135M models/smollm2")  # fmt: skip
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("target", metavar="RUN_DIR")
    p = command(commands, "export", _export, "write a model for others to read, and check that it is the same",
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

    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer").add_subparsers(required=True)
    p = command(tokenizer, "train", _tokenizer_train, "train a lossless SentencePiece tokenizer with byte fallback",
                "jaxlm tokenizer train stdlib --vocab 8192 --out code.model")  # fmt: skip
    p.add_argument("source", nargs="+", metavar="SOURCE")
    p.add_argument("--vocab", type=int, default=8192)
    p.add_argument("--out", type=Path, required=True, metavar="FILE.model")
    p.add_argument("--field", default="text", help="of JSONL, Parquet and TFDS records")

    data = commands.add_parser("data", help="tokenise data, look at data").add_subparsers(required=True)
    p = command(data, "prepare", _data_prepare, "tokenise the data of a config into its cache",
                "jaxlm data prepare configs/quickstart.py", overrides=True)  # fmt: skip
    p.add_argument("config", metavar="CONFIG", nargs="?")
    p.add_argument("-h", "--help", action="store_true")
    p = command(data, "inspect", _data_inspect, "show decoded training examples, with what is learned from marked",
                "jaxlm data inspect configs/quickstart.py", overrides=True)  # fmt: skip
    p.add_argument("config", metavar="CONFIG", nargs="?")
    p.add_argument("--examples", type=int, default=2)
    p.add_argument("-h", "--help", action="store_true")

    p = command(commands, "report", _report, "rebuild report.html and report.png from a run's logs",
                "jaxlm report runs/quickstart")  # fmt: skip
    p.add_argument("model", metavar="RUN_DIR", type=Path)
    command(
        commands, "doctor", _doctor, "devices, versions, what is missing and the command that mends it", "jaxlm doctor"
    )
    return parser


def _resolve(name: str) -> Path:
    """A config file by path, or by its bare name among those that come with the package."""
    package = Path(__file__).parents[1]
    folders = [package / "_configs", package.parent / "configs"]
    candidates = [Path(name), *(folder / f"{name.removesuffix('.py')}.py" for folder in folders)]
    for path in candidates:
        if path.is_file():
            return path
    from jaxlm.core.errors import nearest

    known = sorted(p.stem for folder in folders for p in folder.glob("*.py"))
    raise ValueError(f"no config file {name}{nearest(name, known)}")


def _load(args: argparse.Namespace, rest: list[str]) -> tuple[Any, Any]:
    """(the run as its file has it, the run with overrides)."""
    from jaxlm.core import config_io

    if args.config is None:
        raise ValueError(f"give a config, for example: jaxlm train quickstart{' --help' if args.help else ''}")
    if Path(args.config).is_dir():
        from jaxlm.assembly.run_directory import read_config

        folder = Path(args.config)
        base = read_config(folder)
        base = dataclasses.replace(base, name=folder.resolve().name, out=str(folder.parent))
    else:
        base = config_io.load(_resolve(args.config))
        if start := _value(rest, "--start") or base.start:
            from jaxlm.assembly import open_model

            base = open_model.starting(base, start)
    run = config_io.override(base, rest + (["--help"] if args.help else []))
    from jaxlm.assembly import run_objective

    return base, run_objective.settled(run)


def _value(args: list[str], flag: str) -> str | None:
    """Of the last `--flag value` or `--flag=value`."""
    found = [after for a, after in itertools.pairwise([*args, ""]) if a == flag]
    found += [a.partition("=")[2] for a in args if a.startswith(f"{flag}=")]
    return found[-1] if found else None


def _start(args: argparse.Namespace, run: Any = None) -> None:
    """Join the other processes, if there are any: all must have been started with the same run, or arguments."""
    from jaxlm.core import config_io

    processes.start(vars(args) | {"run": None} if run is None else config_io.flatten(run))


def _train(args: argparse.Namespace, rest: list[str]) -> int:
    base, run = _load(args, rest)
    _start(args, run)
    from jaxlm.assembly import run_directory, training_run
    from jaxlm.commands import dry_run

    run_directory.writable(run.folder)
    if args.dry_run:
        return dry_run.show(base, run)
    return training_run.train(run)


def _plan(args: argparse.Namespace, rest: list[str]) -> int:
    args.help = False
    if (args.compile or args.out) and not args.search:
        raise ValueError(f"--{'compile' if args.compile else 'out'}: is for --search; add it, or leave this out")
    _, run = _load(args, rest)
    from jaxlm.commands import plan_report
    from jaxlm.planning import targets

    t = targets.parse(args.target)
    if args.search:
        values, ok = plan_report.search(run, t, args.compile, args.out)
    else:
        values, ok = plan_report.plan_one(run, t, not args.analytic)
    _json(args, values)
    return 0 if ok else 1


def _tune(args: argparse.Namespace, rest: list[str]) -> int:
    args.help = False
    for name in ("candidates", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: {getattr(args, name)} is too few; give 1 or more")
    _, run = _load(args, rest)
    from jaxlm.commands import plan_report

    return _json(args, plan_report.measured(run, args.candidates, args.steps, args.out))


def _evaluate(args: argparse.Namespace, rest: list[str]) -> int:
    for name in ("limit", "tokens", "samples"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name}: {value} is too few; give 1 or more, or leave it out")
    if args.resamples < 100:
        raise ValueError(f"--resamples: {args.resamples} are too few for 95 % intervals; give 1000 or more")
    _start(args)
    from jaxlm.assembly import evaluate_model

    others, out = None, args.out or Path("evals") / Path(args.model).name
    if args.code:
        values, samples, others = _code(args, out)
    elif args.metric:
        values, samples, others = _texts(args, out)
    elif args.tasks:
        tasks = args.tasks.split(",")
        more = dict(shots=args.shots, limit=args.limit, folder=args.task_folder, chats=args.chat)
        values, shown, samples = evaluate_model.evaluate_tasks(args.model, tasks, out, step=args.step, **more)
        print(f"{shown}\n{out}: results.json, results.md and every example")
        if args.against:
            _, shown, others = evaluate_model.evaluate_tasks(args.against, tasks, out / "against", **more)
            print(shown)
    else:
        found = evaluate_model.evaluate(args.model, data=args.data, step=args.step, batches=args.batches)
        values, samples = dict(found.figures), found.samples
        if found.report:
            print(found.report)
        if args.out and found.examples:
            evaluate_model.write_lines(args.out / "examples.jsonl", found.examples)
        if args.against:
            data = args.data or found.data
            others = evaluate_model.evaluate(args.against, data=data, batches=args.batches).samples
        else:
            out = args.out
    plain = not args.tasks and not args.code and not args.metric
    about = {"model": args.model, "figures": values} if plain else values
    about = about | ({"against": args.against} if args.against else {})
    record, shown = evaluate_model.against(samples, others, out, args.resamples, args.seed, about)
    if not args.tasks:
        known = {name: ends for each in record["intervals"].values() for name, ends in each.items()}
        for name, value in about["figures"].items():
            low, high = known.get(name, (None, None))
            print(f"{name:16} {value:<10.6g} {f'[{low:.6g}, {high:.6g}]' if low is not None else ''}".rstrip())
        sizes = ", ".join(f"{name} over {n}" for name, n in record["sizes"].items())
        print(f"in brackets 95 % intervals: bootstrap, {args.resamples:,} resamples, {sizes}")
    if shown:
        print(f"\n{args.model} against {args.against}\n{shown}\n{out / 'results.json'}")
    return _json(args, values | record)


def _code(args: argparse.Namespace, out: Path) -> tuple[dict, dict, dict | None]:
    """(results, what they may be resampled from, the other model's)."""
    if not args.run_generated_code:
        raise ValueError("--code: runs what the model writes on this machine; say so with --run-generated-code")
    from jaxlm.assembly import evaluate_model
    from jaxlm.evaluation.pass_at_k import STOPS

    try:
        ks = [int(k) for k in args.k.split(",")]
    except ValueError:
        raise ValueError(f"--k: {args.k!r} are no whole numbers with commas between; give, for example, 1,10") from None
    how = evaluate_model.Sampling(tokens=args.tokens or 512, temperature=args.temperature, top_p=args.top_p,
                             samples=args.samples, stop=STOPS, seed=args.seed)  # fmt: skip
    more = dict(weak=args.weak_sandbox, seconds=args.seconds, memory=args.memory << 20)
    values, sample = evaluate_model.evaluate_code(args.model, args.code, out, how, ks, step=args.step, **more)
    print(f"{out}: results.json and code.jsonl, every answer and what became of it")
    others = None
    if args.against:
        other = evaluate_model.evaluate_code(args.against, args.code, out / "against", how, ks, **more)[1]
        others = {"problems": other}
    return values, {"problems": sample}, others


def _texts(args: argparse.Namespace, out: Path) -> tuple[dict, dict, dict | None]:
    """(results, what they may be resampled from, the other model's)."""
    from jaxlm.assembly import evaluate_model

    how = evaluate_model.Sampling(tokens=args.tokens or 128, beams=args.beams)
    more = dict(data=args.data, limit=args.limit)
    values, about, sample = evaluate_model.evaluate_texts(args.model, args.metric, out, how, step=args.step, **more)
    print(f"{about}\n{out}: results.json and texts.jsonl, every text beside the true one")
    others = None
    if args.against:
        others = {"texts": evaluate_model.evaluate_texts(args.against, args.metric, out / "against", how, **more)[2]}
    return values, {"texts": sample}, others


def _sampling(args: argparse.Namespace, rest: list[str]) -> Any:
    """The model's own settings, with overrides; None: help was asked for, and given."""
    import contextlib
    import dataclasses
    import io

    import tyro

    from jaxlm.assembly import evaluate_model, generate_text
    from jaxlm.core.errors import nearest

    own = evaluate_model.Sampling() if args.model is None else generate_text.settings(args.model)
    if args.model is None and not args.help:
        raise ValueError("give a model, for example: jaxlm generate runs/quickstart --prompt 'def main('")
    if args.help:
        return tyro.cli(evaluate_model.Sampling, default=own, args=["--help"], prog="jaxlm generate|chat MODEL")
    known = [f.name for f in dataclasses.fields(own)]
    for flag in (a.split("=", 1)[0] for a in rest if a.startswith("--")):
        name = flag.removeprefix("--").replace("-", "_")
        if name not in known:
            raise ValueError(f"unknown option {flag}{nearest(name, known)}")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its boxed message becomes one line
            return tyro.cli(evaluate_model.Sampling, default=own, args=rest)
    except SystemExit:
        raise ValueError(f"{' '.join(rest)}: a value is of the wrong type; see jaxlm generate --help") from None


def _generate(args: argparse.Namespace, rest: list[str]) -> int:
    _start(args)
    from jaxlm.assembly import generate_text

    how = _sampling(args, rest)
    if not args.prompt:
        raise ValueError("give a --prompt")
    more = dict(draft=args.draft, proposals=args.proposals, adapters=args.adapter)
    found = generate_text.generate(args.model, args.prompt, how, args.step, **more)
    for prompt, answers in zip(args.prompt, found, strict=True):
        for answer in answers:
            print(prompt + answer.text)
    texts = [[a.text for a in answers] for answers in found]
    values: dict[str, Any] = {"prompts": args.prompt, "texts": texts if how.samples > 1 else [t for [t] in texts]}
    values["reasons"] = [[a.completion.reason for a in answers] for answers in found]
    if how.logprobs is not None:
        values["logprobs"] = [[a.completion.logprobs for a in answers] for answers in found]
        values["likeliest"] = [[a.completion.top for a in answers] for answers in found]
    return _json(args, values)


def _chat(args: argparse.Namespace, rest: list[str]) -> int:
    _start(args)
    from jaxlm.assembly import generate_text

    def say(text: str) -> None:
        print(text, end="", flush=True)

    how, prompt = _sampling(args, rest), "> " if sys.stdin.isatty() else ""
    more = dict(system=args.system, template=args.template, step=args.step, prompt=prompt)
    generate_text.chat(args.model, iter(sys.stdin.readline, ""), say, how, **more)
    return 0


def _embed(args: argparse.Namespace, rest: list[str]) -> int:
    texts = args.text + (args.file.read_text("utf-8").splitlines() if args.file else [])
    if not texts:
        raise ValueError("embed: no text; give --text or --file")
    _start(args)
    import numpy as np

    from jaxlm.assembly import generate_text

    vectors = generate_text.embed(args.model, texts, args.pooling)
    if args.out:
        np.save(args.out, vectors)
        print(f"{args.out}: {vectors.shape[0]} vectors of {vectors.shape[1]}")
        return _json(args, {"out": str(args.out), "shape": vectors.shape})
    for text, vector in zip(texts, vectors, strict=True):
        print(f"{text}\t{' '.join(f'{x:.6f}' for x in vector)}")
    return _json(args, {"texts": texts, "vectors": vectors.tolist()})


def _augment(args: argparse.Namespace, rest: list[str]) -> int:
    _start(args)
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


def _import(args: argparse.Namespace, rest: list[str]) -> int:
    _start(args)
    from jaxlm.assembly import convert

    print(*convert.import_model(args.model, args.target), sep="\n")
    return 0


def _export(args: argparse.Namespace, rest: list[str]) -> int:
    _start(args)
    from jaxlm.assembly import convert

    notes, record = convert.export(args.model, args.target, format=args.format, dtype=args.dtype, step=args.step)
    print(*notes, sep="\n")
    print(
        f"logits before and after: off by {record['relative_difference']:.2g} of their deviation, at most by "
        f"{record['max_abs_difference']:.2g}; same likeliest token at {record['same_top_token']:.1%} of places"
    )
    return _json(args, record)


def _json(args: argparse.Namespace, values: dict) -> int:
    if args.json:
        import json

        print(json.dumps(values))
    return 0


def _tokenizer_train(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxlm.data import token_cache, train_tokenizer

    texts = (text for source in args.source for text in token_cache.texts(source, field=args.field, part="train"))
    made = train_tokenizer.train_sentencepiece(texts, args.out, vocab_size=args.vocab)
    print(f"{args.out}: {made.vocab_size} pieces")
    return 0


def _data_prepare(args: argparse.Namespace, rest: list[str]) -> int:
    _, run = _load(args, rest)
    from jaxlm.assembly import corpus, open_model

    data = corpus.corpus(run, open_model.load_tokenizer(run), open_model.template_of(run))
    for name, caches in (("train", data.train), ("valid", data.valid)):
        for c in caches:
            more = f", {len(c.tokens):,} tokens, {c.raw_bytes.sum():,} bytes" if hasattr(c, "tokens") else ""
            print(f"{name}: {len(c):,} {'documents' if more else 'records'}{more}")
    return 0


def _data_inspect(args: argparse.Namespace, rest: list[str]) -> int:
    _, run = _load(args, rest)
    from jaxlm.assembly import corpus, open_model
    from jaxlm.commands import dry_run

    tokens = open_model.load_tokenizer(run)
    loader = corpus.training_loader(run, tokens, corpus.corpus(run, tokens, open_model.template_of(run)), None)
    for i in range(args.examples):
        dry_run.show_example(loader.example(i), tokens, f"example {i}")
    return 0


def _report(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxlm.training import report

    print(report.build(args.model))
    return 0


def _doctor(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxlm.commands import doctor

    rows, ok = doctor.doctor()
    doctor.print_rows(rows)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
