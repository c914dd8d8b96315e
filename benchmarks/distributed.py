"""Workers that train apart beside data parallelism, at equal tokens: bits per byte of held-out text, and bytes sent.

    python benchmarks/distributed.py                       # the quickstart: AdamW and Muon, 4 workers, H = 30
    python benchmarks/distributed.py --rows h workers compression fragments --steps 750
    python benchmarks/distributed.py --after 164 --steps 436   # workers part after steps in data parallelism

    python benchmarks/distributed.py --clock --steps 300   # a server and workers of unlike speeds, on a counted clock

Every row trains the same model on the same batches (Python's standard library). Workers take turns on one device, which
computes what a device each would. Bytes are those that one worker sends: an all-reduce of float32 gradients a step, or
what an exchange takes of deltas. Rows that are finished are kept in --out, and the same command goes on.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from worker import HERE, machine, save, table

import jaxlm
from jaxlm.assembly.distributed.local_steps import simulated
from jaxlm.assembly.model_source import StartModel
from jaxlm.core import config, tree
from jaxlm.core.distributed import Distributed, Outer, Server
from jaxlm.training.distributed import compression, vector
from jaxlm.training.distributed.simulate import Worker, simulate
from jaxlm.training.log import read_lines

OUTER = {"adamw": Outer("nesterov", lr=0.7, momentum=0.9), "muon": Outer("nesterov", lr=0.8, momentum=0.9)}
ADAMW = config.Optim(lr=4e-3, schedule="wsd", decay=0.5, final=0.05, warmup=20)


def diloco(**changes: Any) -> Distributed:
    """Returns the usual settings, four workers of 30 local steps, with changes."""
    return dataclasses.replace(Distributed("diloco", workers=4, every=30), **changes)


def averaged(**changes: Any) -> Distributed:
    """Returns the same with the mean of the workers in place of Nesterov's steps, which end higher in runs as short as
    these."""
    return diloco(outer=Outer("average"), **changes)


ROWS: dict[str, dict[str, Distributed]] = {
    "effect": {
        "data parallel": Distributed(),
        "DiLoCo": diloco(),
        "DiLoCo, outer average": averaged(),
        "DiLoCo, outer SGD of rate 2": diloco(outer=Outer("sgd", lr=2.0, momentum=0.0)),
    },
    "h": {f"H {h}": averaged(every=h) for h in (10, 30, 90)},
    "workers": {f"{n} workers": averaged(workers=n) for n in (1, 2, 4, 8)},
    "compression": {kind: averaged(compress=kind) for kind in ("bfloat16", "int8", "float4")}
    | {"float4, no error feedback": averaged(compress="float4", error_decay=0.0)},
    "fragments": {
        "3 fragments": averaged(fragments=3),
        "3 fragments, overlap 2, mix 0.5": averaged(fragments=3, overlap=2, mix=0.5),
    },
    "outer": {"outer adam": diloco(outer=Outer("adam", lr=1e-3, eps=1e-6))},
}

SPEEDS = (1.0, 1.0, 0.5, 0.25)
"""Local steps a second of the workers of the counted clock."""
CLOCK = {
    "sync": Distributed("server", workers=4, server=Server("sync", quorum=1.0, timeout=1e6)),
    "sync, fewer steps for the slow": Distributed(
        "server", workers=4, server=Server("sync", quorum=1.0, timeout=1e6, dynamic=True)
    ),
    "async": Distributed("server", workers=4, server=Server("async", timeout=1e6)),
    "async, all pushes alike": Distributed("server", workers=4, server=Server("async", timeout=1e6, staleness=0.0)),
    "stale, at most 2 rounds ahead": Distributed("server", workers=4, server=Server("stale", timeout=1e6, bound=2)),
}
ONE_AT_A_TIME = Outer("delayed_nesterov", lr=0.7, momentum=0.9, delay=4)


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", nargs="+", choices=ROWS, default=["effect"])
    p.add_argument("--names", nargs="+", help="these rows of them alone, such as `data parallel`")
    p.add_argument("--optimizers", nargs="+", choices=OUTER, default=list(OUTER))
    p.add_argument("--steps", type=int, help="default: the quickstart's")
    p.add_argument("--batch-size", type=int, help="sequences of all workers; default: the quickstart's")
    p.add_argument(
        "--after", type=int, default=0, help="steps in data parallelism that all rows start from; default: 0"
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--clock", nargs="*", choices=CLOCK, help="these ways of a server (default: all) instead of --rows")
    p.add_argument("--outer-lr", type=float, help="default: 0.7 (AdamW), 0.8 (Muon)")
    p.add_argument("--outer-momentum", type=float, help="default: 0.9")
    p.add_argument("--out", type=Path, default=Path("runs/distributed"))
    p.add_argument("--save", default="distributed", help="name under results/ (-: don't save)")
    return p.parse_args()


def a_run(a: argparse.Namespace, name: str, optimizer: str, c: Distributed, seed: int) -> config.Run:
    """Returns the quickstart with an optimizer and workers."""
    if c.method != "none" and c.outer == Outer():
        outer = OUTER[optimizer]
        momentum = outer.momentum if a.outer_momentum is None else a.outer_momentum
        c = dataclasses.replace(c, outer=dataclasses.replace(outer, lr=a.outer_lr or outer.lr, momentum=momentum))
    run = jaxlm.load("quickstart")
    train = dataclasses.replace(
        run.train, steps=a.steps or run.train.steps, eval_every=0, save_every=0, prompts=(),
        batch_size=a.batch_size or run.train.batch_size,
    )  # fmt: skip
    after = f"-after-{a.after}" if a.after else ""
    name = f"{name}-{optimizer}-{train.steps}-{train.batch_size}{after}-{seed}"
    return dataclasses.replace(
        run, name="".join(x if x.isalnum() else "-" for x in name), out=str(a.out), train=train, distributed=c,
        seed=seed, optim=ADAMW if optimizer == "adamw" else run.optim,
        data=dataclasses.replace(run.data, compare_compression=False, tokenize_workers=0),
    )  # fmt: skip


def started(a: argparse.Namespace, run: config.Run, optimizer: str) -> config.Run:
    """Returns a run that starts from a model of `a.after` steps in data parallelism, at a constant rate and on batches
    in another order, which is trained unless it has been."""
    if not a.after:
        return run
    first = a_run(
        argparse.Namespace(**vars(a) | {"steps": a.after, "after": 0}),
        "start",
        optimizer,
        Distributed(),
        1000 + run.seed,
    )
    first = dataclasses.replace(first, optim=dataclasses.replace(first.optim, schedule="constant"))
    trained(first)
    return dataclasses.replace(run, start=str(first.folder))


def sent(run: config.Run, count: int) -> float:
    """Returns the bytes that one worker sends in a run of `count` weights, of 4 workers where all train together."""
    c, steps = run.distributed, run.train.steps
    workers = c.workers or 4
    if c.method == "none" or c.compress == "none":
        times = steps if c.method == "none" else -(-steps // c.every)
        return times * 2 * (workers - 1) / workers * 4 * count
    return -(-steps // c.every) * (workers - 1) * compression.size(c.compress, count)


def main() -> None:
    a = arguments()
    file = HERE / "results" / f"{a.save}.json"
    results: dict[str, Any] = json.loads(file.read_text("utf-8"))["results"] if file.is_file() else {}
    for name in () if a.clock is None else a.clock or CLOCK:
        for optimizer in a.optimizers:
            results[f"clock: {name}, {optimizer}, {a.steps} steps"] = found = on_clock(a, name, optimizer)
            print(name, found)
    tried = {"outer rate": a.outer_lr, "outer momentum": a.outer_momentum}
    for group in a.rows if a.clock is None else ():
        for name, c in ROWS[group].items():
            if a.names and name not in a.names:
                continue
            name += "".join(f" {key} {value:g}" for key, value in tried.items() if value is not None)
            for optimizer in a.optimizers:
                bits, run = [], None
                for seed in a.seeds:
                    run = started(a, a_run(a, name, optimizer, c, seed), optimizer)
                    bits.append(trained(run))
                assert run is not None
                count = jaxlm.Program(run).parts.parameters[1]
                key = f"{name}, {optimizer}, {run.train.steps} steps of {run.train.batch_size}"
                key += f" after {a.after}" if a.after else ""
                results[key] = {"bits_per_byte": bits, "bytes_sent": sent(run, count), "seeds": a.seeds,
                                "outer_lr": run.distributed.outer.lr}  # fmt: skip
                print(key, bits)
    shown = [[key, f"{np.mean(r['bits_per_byte']):.4f}", f"{r['bytes_sent'] / 1e6:,.0f}",
              f"{r['seconds']:,.0f}" if "seconds" in r else ""] for key, r in results.items()]  # fmt: skip
    print(table(shown, ["row", "bits per byte", "MB sent by a worker, or all", "s on the counted clock"]))
    if a.save != "-":
        save(a.save, {"machine": machine(), "results": results})


def on_clock(a: argparse.Namespace, name: str, optimizer: str) -> dict[str, Any]:
    """Returns how long a run with workers of unlike speeds takes on the counted clock, and what comes of it."""
    c = CLOCK[name]
    outer = OUTER[optimizer] if c.server.mode == "sync" else ONE_AT_A_TIME
    run = a_run(a, f"clock {name}", optimizer, dataclasses.replace(c, outer=outer), 0)
    weights, train = simulated(run, StartModel(""))
    crew = [Worker(f"{speed:g} steps a second, {i}", 1 / speed) for i, speed in enumerate(SPEEDS)]
    out = simulate(run.distributed, crew, weights, run.train.steps, train)
    program = jaxlm.Program(dataclasses.replace(run, distributed=Distributed()))
    state = program.init()
    flat = tree.flatten(state.params)
    places = vector.places({path: x.shape for path, x in flat.items()})
    params: dict[str, Any] = {}
    for path, (first, last) in places.items():
        params = tree.put(params, path, jnp.asarray(np.reshape(out.weights[first:last], flat[path].shape)))
    bits = program.validate(state.replace(params=params))["bits_per_byte"]
    versions = [e for e in out.events if "staleness" in e]
    behind = [s for e in versions for s in e["staleness"]]
    return {"seconds": out.seconds, "bits_per_byte": bits, "bytes_sent": out.sent, "versions": len(versions),
            "mean_staleness": float(np.mean(behind)) if behind else 0.0}  # fmt: skip


def trained(run: config.Run) -> float:
    """Trains a run, or what is left of it, and returns the bits per byte of its last validation."""
    jaxlm.train(run)
    lines = [line for line in read_lines(run.folder / "metrics.jsonl") if line["kind"] == "valid"]
    if lines[-1]["step"] != run.train.steps:
        raise SystemExit(f"{run.folder} was interrupted; the same command goes on")
    return float(lines[-1]["bits_per_byte"])


if __name__ == "__main__":
    main()
