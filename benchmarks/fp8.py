"""Layers that multiply in fp8 beside bfloat16: loss curves on a CPU, which emulates fp8, and steps compiled for a GPU
that isn't here.

    python benchmarks/fp8.py curves --data FILE --cache FOLDER [--steps 2000] [--seeds 0 1]
    python benchmarks/fp8.py compiled [CONFIG …] [--device h100] [--rows 8] [--layers 2] [--hlo FOLDER]

FILE is text, such as Tiny Shakespeare; a model of Llama's form on bytes reads it. CONFIG is a run's configuration, with
so many of its layers. `pip install "jax[cuda13]"` brings the GPU's compiler. Exit status 1 if fp8's loss at the end is
worse than bfloat16's by more than twice the standard deviation of bfloat16 over seeds (and 0.01), or if a compiled step
has another product of two matrices in a wider type than the head's (XLA makes one of several with the same input).
"""

import argparse
import collections
import dataclasses
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
from aot_qlora import compilers
from worker import HERE, machine, save, table

sys.path.insert(0, str(HERE.parent))

import jaxlm
from jaxlm.core import config, config_io
from jaxlm.models import llama
from jaxlm.objectives import causal
from jaxlm.planning import ahead_of_time, targets
from jaxlm.training import environment

WAYS = ("dtype", "fp8")
FP8_CALL, HEAD = "__cublas$lt$matmul$f8", 3  # logits, and the gradients of both factors
WINDOW = 50  # steps whose losses are averaged


def curve(a: argparse.Namespace, matmul: Any, seed: int) -> dict[str, Any]:
    """The losses of a run, averaged over windows of steps, and its validation loss."""
    c = llama.Config(
        vocab=264, layers=4, width=64, heads=2, kv_heads=2, head_width=32, ffn=128, positions=64,
    )  # fmt: skip
    run = jaxlm.Run(
        name="fp8", model=c, objective=causal.Config(),
        data=jaxlm.Data(train=(str(a.data),), holdout=0.05, tokenizer="bytes", cache=str(a.cache)),
        optim=jaxlm.Optim(lr=3e-3, warmup=20), train=jaxlm.Train(steps=a.steps, batch_size=16, seq_len=64),
        execution=jaxlm.Execution(matmul=matmul), seed=seed,
    )  # fmt: skip
    began, program, losses = time.process_time(), jaxlm.Program(run), []
    state, batches = program.init(), program.batches()
    for _ in range(a.steps):
        state, metrics = program.step(state, next(batches))
        losses.append(float(metrics["loss"]))
    means = [statistics.fmean(losses[i : i + WINDOW]) for i in range(0, a.steps, WINDOW)]
    return {
        "precision": program.parts.notes["precision"], "losses": means,
        "validation": program.validate(state, 16)["loss"], "cpu_s": round(time.process_time() - began, 1),
    }  # fmt: skip


def curves(a: argparse.Namespace) -> int:
    partial = HERE / "results" / "fp8_curves.partial.json"
    found: dict[str, Any] = json.loads(partial.read_text()) if partial.exists() else {}
    for seed in a.seeds:
        for matmul in WAYS:
            key = f"{matmul}/{seed}/{a.steps}"
            if key not in found:
                found[key] = curve(a, matmul, seed)
                partial.write_text(json.dumps(found))
            print(key, found[key]["validation"], found[key]["losses"][-1], found[key]["cpu_s"], flush=True)
    ends = {w: [found[f"{w}/{seed}/{a.steps}"]["validation"] for seed in a.seeds] for w in WAYS}
    noise = statistics.stdev(ends["dtype"]) if len(a.seeds) > 1 else 0.0
    worse = statistics.fmean(ends["fp8"]) - statistics.fmean(ends["dtype"])
    print(table([[w, *values] for w, values in ends.items()], ["validation loss", *map(str, a.seeds)]))
    print(f"fp8 - bfloat16: {worse:+.4f} nats a byte; deviation over seeds {noise:.4f}")
    if a.save != "-":
        runs = {f"{w}/{s}": found[f"{w}/{s}/{a.steps}"] for s in a.seeds for w in WAYS}
        save(f"{a.save}_curves", {
            "what": "losses of a model of 4 layers of width 64 on bytes, its layers multiplied in bfloat16 and fp8",
            "steps": a.steps, "window": WINDOW, "machine": machine(), "fp8_minus_bfloat16": worse,
            "deviation_over_seeds": noise, "runs": runs,
        })  # fmt: skip
        partial.unlink(missing_ok=True)
    return int(worse > max(2 * noise, 0.01))


def step(run: config.Run, t: targets.Target, folder: Path | None, name: str) -> dict[str, Any]:
    """What the compiled step of a run multiplies with, and its bytes."""
    made = ahead_of_time.compile_step(run, t)
    text, memory = made.executable.as_text(), made.executable.memory_analysis()
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(text)
    wide = re.findall(r"= \(?(\w+\[\d+,\d+\])\S* .*?custom-call\(.*\"__cublas\$(?:lt\$matmul|gemm)\"", text)
    return {
        "calls": dict(collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text))),
        "wide_products": wide,
        "precision": made.program.notes["precision"], "layers": made.program.notes["layers"],
        "temporary_bytes": memory.temp_size_in_bytes, "traffic_bytes": made.module.traffic,
        "compile_s": round(made.seconds, 1),
    }  # fmt: skip


def compiled(a: argparse.Namespace) -> int:
    t, found, failed = targets.parse(f"{a.device}:1x1"), {}, 0
    for file in a.configs or [HERE.parent / "configs" / "gpt2_124m.py"]:
        base = config_io.load(file)
        model = base.model.at_depth(a.layers) if a.layers else base.model
        for matmul in WAYS:
            run = dataclasses.replace(
                base, model=model, mesh=config.Mesh(), optim=config.Optim(),
                train=config.Train(batch_size=a.rows, seq_len=a.seq),
                execution=config.Execution(dtype="bfloat16", matmul=matmul, scan=a.scan),
            )  # fmt: skip
            name = f"{file.stem} {model.layers} layers {a.rows} x {a.seq} {matmul}"
            found[name] = one = step(run, t, a.hlo, name)
            failed |= matmul == "fp8" and (FP8_CALL not in one["calls"] or len(one["wide_products"]) > HEAD)
            print(name, one, flush=True)
    if a.save != "-":
        save(f"aot_{a.save}", {
            "what": "products of train steps in bfloat16 and fp8, read from the compiled programs; nothing ran",
            "device": t.chip.kind, "versions": environment.environment()["versions"] | compilers(), "found": found,
        })  # fmt: skip
    return int(failed)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["curves", "compiled"])
    p.add_argument("configs", nargs="*", type=Path)
    p.add_argument("--data", type=Path)
    p.add_argument("--cache", type=Path)
    p.add_argument("--steps", type=int, default=2000)
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    p.add_argument("--device", default="h100")
    p.add_argument("--rows", type=int, default=8)
    p.add_argument("--seq", type=int, default=1024)
    p.add_argument("--layers", type=int, default=2, help="0: the config's own")
    p.add_argument("--scan", action=argparse.BooleanOptionalAction, default=None)
    p.add_argument("--hlo", type=Path, help="folder to write the compiled programs to")
    p.add_argument("--save", default="fp8", help="name under results/; - : don't save")
    a = p.parse_args()
    if a.what == "curves" and not (a.data and a.cache):
        p.error("curves needs --data and --cache")
    jax.config.update("jax_platforms", "cpu")
    return curves(a) if a.what == "curves" else compiled(a)


if __name__ == "__main__":
    sys.exit(main())
