"""`jaxlm eval` computes losses and scores of tasks, written texts and programs, with their intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxlm.commands.arguments import Command, Done, Flag, Model, start_processes
from jaxlm.core.config import CacheKind
from jaxlm.core.ranges import Count, Natural, NonNegative, Positive, PositiveShare, Range


@dataclass(frozen=True)
class Eval(Command):
    """Computes loss, perplexity, bits per byte and accuracy of a model, and scores of tasks, written texts or programs.

    example: jaxlm eval runs/quickstart --data README.md
    """

    model: Model
    data: tuple[str, ...] = ()
    """Other text to evaluate on than the run's own."""
    rows: Literal["valid", "test"] | None = None
    """Which of the run's own; None: test where the run has data.test, else valid."""
    step: Natural | None = None
    """The checkpoint's; None: the newest."""
    batches: Natural = 0
    """At most so many of each source; 0: all."""
    tasks: str | None = None
    """A,B: tasks of the lm-evaluation-harness instead of text."""
    task_folder: Path | None = None
    """A folder of your own tasks in YAML, instead of the built-in ones."""
    shots: Natural | None = None
    """Examples before each question; None: the task's number."""
    limit: Count | None = None
    """At most so many examples of each task, or texts of each source; None: all."""
    chat: Flag = False
    """Ask by the model's chat template."""
    metric: str | None = None
    """Let the model write and compare it with the data's texts: bleu (and chrF), rouge, exact, number (the last of a
    text)."""
    beams: Count | None = None
    """--metric: beams of the search; 1 is none. None: what the model's files say, or 1."""
    code: str | None = None
    """A file of problems in HumanEval's format instead of text: pass@k."""
    run_generated_code: Flag = False
    """--code: yes, run what the model writes, shut in."""
    weak_sandbox: Flag = False
    """--code: run it also where this machine can't shut it in whole; says what is missing."""
    samples: Count = 1
    """--code: answers to each problem."""
    k: str = "1"
    """--code: of pass@k, for example 1,10."""
    temperature: NonNegative = 0.0
    """--code: of the samples; 0 is the likeliest answer."""
    top_p: PositiveShare = 1.0
    """--code: of the samples."""
    tokens: Count | None = None
    """The most new tokens of a text; None: what the model's files say, or 512 with --code, 128 with --metric."""
    seconds: Positive = 5.0
    """--code: a program's, at most."""
    memory: Count = 1024
    """--code: a program's MiB, at most."""
    cache: CacheKind | None = None
    """--tasks, --metric, --code: how keys and values of tokens that were read are stored while the model writes, such
    as int8; None: as the run says, or as computed. `against` names another model, or this one without it."""
    against: str | None = None
    """Another model on the same examples: differences with their 95 % intervals and p, by a paired bootstrap."""
    resamples: Annotated[int, Range(100)] = 10_000
    """Of the bootstrap; fewer than 1,000 give rough ends."""
    seed: Natural = 0
    """Of the bootstrap, and of samples."""
    out: Path | None = None
    """Where results.json and examples go; None: evals/NAME where there are examples or another model."""

    def run(self, rest: list[str]) -> Done:
        return _evaluate(self)


def _evaluate(args: Eval) -> Done:
    start_processes(args)
    from jaxlm.assembly import evaluate_model, open_model

    if args.cache and not (args.code or args.metric or args.tasks):
        raise ValueError("--cache: text is read at once, without a cache; leave it out, or give --metric, --code or "
                         "--tasks")  # fmt: skip
    others, out = None, args.out or Path("evals") / Path(args.model).name
    model = open_model.with_cache(args.model, args.cache)
    written: Path | None = out
    about_rows: dict[str, str] = {}
    if args.code:
        values, samples, others = _code(args, model, args.code, out)
    elif args.metric:
        values, samples, others = _texts(args, model, args.metric, out)
    elif args.tasks:
        tasks = args.tasks.split(",")
        more: dict[str, Any] = dict(shots=args.shots, limit=args.limit, folder=args.task_folder, chats=args.chat)
        values, shown, samples = evaluate_model.evaluate_tasks(model, tasks, out, step=args.step, **more)
        print(f"{shown}\n{out}: results.json, results.md and every example")
        if args.against:
            _, shown, others = evaluate_model.evaluate_tasks(args.against, tasks, out / "against", **more)
            print(shown)
    else:
        found = evaluate_model.evaluate(
            args.model, data=args.data or None, rows=args.rows, step=args.step, batches=args.batches
        )
        values, samples = dict(found.figures), found.samples
        print(": ".join(filter(None, (found.part, found.role))) + _said_sources(found.data))
        if found.report:
            print(found.report)
        if args.out and found.examples:
            evaluate_model.write_lines(args.out / "examples.jsonl", found.examples)
        about_rows = {"rows": found.part, "role": found.role}
        if args.against:
            data = args.data or found.data
            others = evaluate_model.evaluate(args.against, data=data, batches=args.batches).samples
        else:
            written = args.out
    plain = not args.tasks and not args.code and not args.metric
    about: dict[str, Any] = {"model": args.model, **about_rows, "figures": values} if plain else dict(values)
    about |= {"against": args.against} if args.against else {}
    record, shown = evaluate_model.against(samples, others, written, args.resamples, args.seed, about)
    if not args.tasks:
        known = {name: ends for each in record["intervals"].values() for name, ends in each.items()}
        for name, value in about["figures"].items():
            low, high = known.get(name, (None, None))
            print(f"{name:16} {value:<10.6g} {f'[{low:.6g}, {high:.6g}]' if low is not None else ''}".rstrip())
        sizes = ", ".join(f"{name} over {n}" for name, n in record["sizes"].items())
        if known:
            print(f"in brackets 95 % intervals: bootstrap, {args.resamples:,} resamples, {sizes}")
        else:
            print(f"no intervals, for one tells nothing of chance: {sizes}")
    if shown:
        print(f"\n{args.model} against {args.against}\n{shown}\n{out / 'results.json'}")
    return Done(values | about_rows | record)


def _said_sources(data: Sequence[str]) -> str:
    """Returns the names of sources as they are shown."""
    return f" ({', '.join(data)})" if data else " (held out of the training data)"


def _code(args: Eval, model: Any, file: str, out: Path) -> tuple[dict, dict, dict | None]:
    """(results, what they may be resampled from, the other model's)."""
    if not args.run_generated_code:
        raise ValueError("--code: runs what the model writes on this machine; say so with --run-generated-code")
    from jaxlm.assembly import evaluate_model
    from jaxlm.evaluation.pass_at_k import STOPS

    try:
        ks = [int(k) for k in args.k.split(",")]
    except ValueError:
        raise ValueError(f"--k: {args.k!r} are no whole numbers with commas between; give, for example, 1,10") from None
    asked: dict[str, Any] = dict(temperature=args.temperature, top_p=args.top_p, samples=args.samples, stop=STOPS,
                                 seed=args.seed, beams=1)  # fmt: skip
    how = evaluate_model.sampling_for(args.model, 512, args.tokens, **asked)
    more: dict[str, Any] = dict(weak=args.weak_sandbox, seconds=args.seconds, memory=args.memory << 20)
    values, sample = evaluate_model.evaluate_code(model, file, out, how, ks, step=args.step, **more)
    print(f"{out}: results.json and code.jsonl, every answer and what became of it")
    others = None
    if args.against:
        how = evaluate_model.sampling_for(args.against, 512, args.tokens, **asked)
        other = evaluate_model.evaluate_code(args.against, file, out / "against", how, ks, **more)[1]
        others = {"problems": other}
    return values, {"problems": sample}, others


def _texts(args: Eval, model: Any, metric: str, out: Path) -> tuple[dict, dict, dict | None]:
    """(results, what they may be resampled from, the other model's)."""
    from jaxlm.assembly import evaluate_model

    asked: dict[str, Any] = dict(temperature=0.0) | ({} if args.beams is None else {"beams": args.beams})
    how = evaluate_model.sampling_for(args.model, 128, args.tokens, **asked)
    more: dict[str, Any] = dict(data=args.data or None, rows=args.rows, limit=args.limit)
    values, about, sample = evaluate_model.evaluate_texts(model, metric, out, how, step=args.step, **more)
    print(": ".join(filter(None, (values["rows"], values["role"]))))
    print(f"{about}\n{out}: results.json and texts.jsonl, every text beside the true one")
    others = None
    if args.against:
        how = evaluate_model.sampling_for(args.against, 128, args.tokens, **asked)
        others = {"texts": evaluate_model.evaluate_texts(args.against, metric, out / "against", how, **more)[2]}
    return values, {"texts": sample}, others
