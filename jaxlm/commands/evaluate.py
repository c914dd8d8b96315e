"""`jaxlm eval` computes losses and scores of tasks, written texts and programs, with their intervals."""

import argparse
from pathlib import Path
from typing import Any

from jaxlm.commands.arguments import MODEL, add_command, print_json, start_processes


def add_parsers(commands: Any) -> None:
    """Adds what this file's commands take to the parser of the command line."""
    p = add_command(commands, "eval", _evaluate, "loss, perplexity, bits per byte and accuracy of a model",
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
    p.add_argument("--against", metavar="OTHER", help="another model on the same examples: differences with their "
                   "95 %% intervals and p, by a paired bootstrap")  # fmt: skip
    p.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap (default 10000)")
    p.add_argument("--seed", type=int, default=0, help="of the bootstrap, and of samples (default 0)")
    p.add_argument("--out", type=Path, help="where results.json and examples go (default, where there are examples or "
                   "another model: evals/NAME)")  # fmt: skip
    p.add_argument("--json", action="store_true", help="end with one line of JSON")


def _evaluate(args: argparse.Namespace, rest: list[str]) -> int:
    for name in ("limit", "tokens", "samples"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name}: {value} is too few; give 1 or more, or leave it out")
    if args.resamples < 100:
        raise ValueError(f"--resamples: {args.resamples} are too few for 95 % intervals; give 1000 or more")
    start_processes(args)
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
    return print_json(args, values | record)


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
