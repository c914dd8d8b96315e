"""Our train step beside PyTorch's and MaxText's: one device, one run, in turns, medians.

    python benchmarks/step_time.py --shape gpt2-17m --torch-python TORCH_VENV/bin/python
    python benchmarks/step_time.py --shape llama-17m --maxtext-python MAXTEXT_VENV/bin/python
    python benchmarks/step_time.py --shape gpt2-17m --only jaxlm --rounds 3 --execution.loss_chunk 512

Peers start from our weights and our batch, and their losses are compared with ours before anything is timed. A row
"+ malloc" runs under the allocator settings of the command line. Further arguments are overrides of our run.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from shapes import ADAMW, SHAPES
from worker import Worker, launcher_environment, machine, save, table


def arguments() -> tuple[argparse.Namespace, list[str]]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="gpt2-17m", choices=SHAPES)
    p.add_argument("--torch-python", help="a Python that has torch and transformers")
    p.add_argument("--maxtext-python", help="a Python that has maxtext (Llama shapes only)")
    p.add_argument("--only", default="", help="rows whose name begins so")
    p.add_argument("--malloc", choices=("both", "launcher", "default"), default="both")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds", type=int, default=6)
    p.add_argument("--steps", type=int, default=3, help="of each row in each round")
    p.add_argument("--loop-rounds", type=int, default=4, help="rounds of the whole training loop; 0: none")
    p.add_argument("--loop-steps", type=int, default=6, help="of each round of the training loop")
    p.add_argument("--matmul", type=int, help="size of the lone product (default: 2048 on a CPU, 8192 on a GPU)")
    p.add_argument("--save", help="name under results/ (default: step_time-SHAPE-BACKEND; - : don't save)")
    return p.parse_known_args()


def start(a: argparse.Namespace, overrides: list[str], file: Path) -> dict[str, Worker]:
    """Our workers first: the first of them writes the weights and the batch that the peers read."""
    tuned = launcher_environment()
    plain: dict[str, str | None] = dict.fromkeys(tuned)
    environments = {"": plain, " + malloc": tuned}
    if a.malloc != "both":
        environments = {k: v for k, v in environments.items() if bool(k) == (a.malloc == "launcher")}
    root = str(Path(__file__).parents[1])
    path = {"PYTHONPATH": root}
    workers: dict[str, Worker] = {}
    for label, environment in environments.items():
        given = {"shape": a.shape, "overrides": overrides}
        workers[f"jaxlm{label}"] = Worker(sys.executable, "step_jaxlm.py", given, environment | path, a.threads)
        workers[f"jaxlm{label}"].ask("describe")  # one at a time: start-up is heavy
    next(iter(workers.values())).ask("export", file=str(file))
    variants = ["plain", "gathered"] if SHAPES[a.shape]["family"] == "bert" else ["plain"]
    for compiled in (False, True) if a.torch_python else ():
        for variant in variants:
            for label, environment in environments.items():
                kind = ("torch.compile" if compiled else "torch eager") + (f", {variant}" if len(variants) > 1 else "")
                given = {"shape": a.shape, "file": str(file), "compiled": compiled, "variant": variant}
                if (kind + label).startswith(a.only):
                    workers[kind + label] = Worker(
                        a.torch_python, "step_torch.py", given | {"threads": a.threads}, environment, a.threads
                    )
    return workers


def check(workers: dict[str, Worker], dtype: str) -> dict[str, list[float]]:
    """Warm up, and compare the losses of the first updates: step 0 is the model, the others the optimizer too."""
    losses = {name: w.ask("steps", n=4)["losses"] for name, w in workers.items()}
    first = next(iter(losses.values()))
    for name, values in losses.items():
        print(f"losses of the first updates  {name:28}" + "  ".join(f"{x:.6f}" for x in values), flush=True)
        tolerance = 1e-4 if dtype == "float32" else 2e-2
        if abs(values[0] - first[0]) > tolerance or abs(values[-1] - first[-1]) > 20 * tolerance:
            raise SystemExit(f"{name} does not compute what ours does: {values} against {first}")
    return losses


def measure(workers: dict[str, Worker], a: argparse.Namespace, size: int) -> dict[str, dict[str, list[float]]]:
    """Seconds and CPU seconds of a step, FLOP/s of a lone product; every second round in the opposite order."""
    out: dict[str, dict[str, list[float]]] = {k: {n: [] for n in workers} for k in ("seconds", "cpu", "matmul")}
    for turn in range(a.rounds):
        for name in list(workers)[:: -1 if turn % 2 else 1]:
            workers[name].ask("steps", n=1)  # memory of a process that waited may have to be fetched back first
            times = workers[name].ask("steps", n=a.steps)
            out["seconds"][name].append(times["seconds"])
            out["cpu"][name].append(times["cpu_seconds"])
            out["matmul"][name].append(workers[name].ask("matmul", n=size)["flops_per_s"])
        shown = "  ".join(f"{n} {1e3 * s[-1]:.4g} ms" for n, s in out["seconds"].items())
        print(f"round {turn + 1}: {shown}", flush=True)
    return out


def loop_overhead(worker: Worker, rounds: int, steps: int) -> dict[str, Any]:
    """The real loop (loader, transfer, logs; no validation) beside the bare step, in turns."""
    bare, whole = [], []
    for _ in range(rounds):
        bare.extend(worker.ask("steps", n=1)["seconds"] for _ in range(steps))
        whole.extend(worker.ask("loop", n=steps + 3)["seconds"])
    over, best = statistics.median(whole) / statistics.median(bare) - 1, min(whole) / min(bare) - 1
    print(f"training loop: {1e3 * statistics.median(whole):.4g} ms a step, bare step "
          f"{1e3 * statistics.median(bare):.4g} ms: overhead {over:.2%} (by the fastest {best:.2%})")  # fmt: skip
    return {"bare_s": bare, "loop_s": whole, "overhead": over, "overhead_by_fastest": best}


def maxtext(a: argparse.Namespace, worker: Worker, seconds: dict[str, list[float]], mine: str) -> dict[str, Any]:
    """MaxText's own loop reports its step times, so it runs as a whole; ours runs before, between and after."""
    about = {}
    for remat in ("minimal", "minimal_with_context"):  # those that compute least again
        given = {"shape": a.shape, "steps": a.rounds * a.steps}
        peer = Worker(a.maxtext_python, "step_maxtext.py", given, dict.fromkeys(launcher_environment()), a.threads)
        result = peer.ask("train", remat=remat)
        peer.close()
        seconds[f"maxtext, {remat}"] = result.pop("seconds")
        about[f"maxtext, {remat}"] = result
        seconds[mine].extend(worker.ask("steps", n=a.steps)["seconds"] for _ in range(a.rounds))
    return about


def main() -> None:
    a, overrides = arguments()
    shape = SHAPES[a.shape]
    host = machine()
    with tempfile.TemporaryDirectory() as folder:
        workers = start(a, overrides, Path(folder) / "weights.npz")
        losses = check(workers, shape["dtype"])
    about = {name: w.ask("describe") for name, w in workers.items()}
    ours = next(iter(about.values()))
    size = a.matmul or (2048 if ours["backend"] == "cpu" else 8192)
    workers = {name: w for name, w in workers.items() if name.startswith(a.only)}
    samples = measure(workers, a, size)
    mine = list(workers)[-1] if a.only else [n for n in workers if n.startswith("jaxlm")][-1]
    if a.maxtext_python:
        about |= maxtext(a, workers[mine], samples["seconds"], mine)
    loop = loop_overhead(workers[mine], a.loop_rounds, a.loop_steps) if a.loop_rounds else None

    tokens, flops = shape["batch"] * shape["seq"], ours["flops_per_step"]
    middle = {k: {n: statistics.median(v) for n, v in one.items()} for k, one in samples.items()}
    best = {n: min(v) for n, v in samples["seconds"].items()}
    rows = []
    for name, s in middle["seconds"].items():
        cpu, peak = ((f"{middle[k].get(name, 0) / unit:.4g}" if name in middle[k] else "-")
                     for k, unit in (("cpu", 1), ("matmul", 1e9)))  # fmt: skip
        spread = f"{1e3 * best[name]:.4g}–{1e3 * max(samples['seconds'][name]):.4g}"
        rows.append([
            name, round(tokens / s), 1e3 * s, spread, cpu, s / middle["seconds"][mine], best[name] / best[mine],
            peak, flops / s / max(middle["matmul"].values()),
        ])  # fmt: skip
    header = ["", "tokens/s", "ms/step", "min–max", "CPU s", "time / ours", "by fastest", "matmul GFLOP/s",
              "of best matmul"]  # fmt: skip
    print(table(rows, header))
    for w in workers.values():
        w.close()
    if a.save != "-":
        result = {
            "what": "train step (forward, backward, clip, AdamW): seconds a step, samples are means over `steps`",
            "machine": host | {"device": ours["device"], "threads": a.threads},
            "settings": {"shape": a.shape} | shape | ADAMW | {"steps": a.steps, "matmul": size, "overrides": overrides},
            "about": about, "first_losses": losses, "flops_per_step": flops,
            "samples": samples, "loop": loop,
            "table": [dict(zip(["row", *header[1:]], row, strict=True)) for row in rows],
        }  # fmt: skip
        print("saved", save(a.save or f"step_time-{a.shape}-{ours['backend']}", json.loads(json.dumps(result))).name)


if __name__ == "__main__":
    main()
