"""Layers that multiply in few bits beside bfloat16: loss curves on a CPU, which emulates them, and steps compiled for a
device that isn't here.

    python benchmarks/fp8.py curves --data FILE --cache FOLDER [--matmul dtype fp8] [--steps 2000] [--seeds 0 1]
    python benchmarks/fp8.py compiled [CONFIG …] [--matmul dtype fp8] [--device h100] [--layers 2] [--hlo FOLDER]

FILE is text, such as Tiny Shakespeare; a model of Llama's form on bytes reads it. CONFIG is a run's configuration, with
so many of its layers. `pip install "jax[cuda13]"` brings the compiler for GPUs, `jax[tpu]` that for TPUs: fp8 is for
h100, mxfp8 for b200, int8 for v5e and v6e. Exit status 1 if the loss of few bits at the end is worse than bfloat16's by
more than twice the standard deviation of bfloat16 over seeds (and 0.01), or if a compiled step has no product in few
bits, or another one of two matrices in a wider type than the head's (XLA makes one of several with the same input) and,
in int8, the gradients of the layers' matrices.
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
from jaxlm.nn.matmul import WAYS
from jaxlm.objectives import causal
from jaxlm.planning import ahead_of_time, targets
from jaxlm.training import environment

CALLS = {"fp8": "__cublas$lt$matmul$f8", "mxfp8": "__cudnn$blockScaledDot"}
HEAD = 3  # logits, and the gradients of both factors
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
        for matmul in a.matmul:
            key = f"{matmul}/{seed}/{a.steps}"
            if key not in found:
                found[key] = curve(a, matmul, seed)
                partial.write_text(json.dumps(found))
            print(key, found[key]["validation"], found[key]["losses"][-1], found[key]["cpu_s"], flush=True)
    ends = {w: [found[f"{w}/{seed}/{a.steps}"]["validation"] for seed in a.seeds] for w in a.matmul}
    noise = statistics.stdev(ends["dtype"]) if len(a.seeds) > 1 else 0.0
    narrow = [w for w in a.matmul if w != "dtype"]
    worse = {w: statistics.fmean(ends[w]) - statistics.fmean(ends["dtype"]) for w in narrow}
    print(table([[w, *values] for w, values in ends.items()], ["validation loss", *map(str, a.seeds)]))
    for w, much in worse.items():
        print(f"{w} - bfloat16: {much:+.4f} nats a byte; deviation over seeds {noise:.4f}")
    if a.save != "-":
        runs = {f"{w}/{s}": found[f"{w}/{s}/{a.steps}"] for s in a.seeds for w in a.matmul}
        save(f"{a.save}_curves", {
            "what": f"losses of a model of 4 layers of width 64 on bytes, its products in {in_words(a.matmul)}",
            "steps": a.steps, "window": WINDOW, "machine": machine(), "deviation_over_seeds": noise, "runs": runs,
            **{f"{w}_minus_bfloat16": much for w, much in worse.items()},
        })  # fmt: skip
        partial.unlink(missing_ok=True)
    return int(any(much > max(2 * noise, 0.01) for much in worse.values()))


def step(run: config.Run, t: targets.Target, folder: Path | None, name: str) -> dict[str, Any]:
    """What the compiled step of a run multiplies with, and its bytes."""
    made = ahead_of_time.compile_step(run, t)
    text, memory = made.executable.as_text(), made.executable.memory_analysis()
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(text)
    wide = re.findall(r"= \(?(\w+\[\d+,\d+\])\S* .*?custom-call\(.*\"__cublas\$(?:lt\$matmul|gemm)\"", text)
    dots, whole = products(text)
    return {
        "dots": dots, "whole_number_products": whole,
        "calls": dict(collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text))),
        "wide_products": wide,
        "precision": made.program.notes["precision"], "layers": made.program.notes["layers"],
        "temporary_bytes": memory.temp_size_in_bytes, "traffic_bytes": made.module.traffic,
        "compile_s": round(made.seconds, 1),
    }  # fmt: skip


def products(text: str) -> tuple[dict[str, int], int]:
    """Returns how many dots and convolutions a program has by the types of their factors and result, and how many of
    them multiply int8 numbers."""
    types = dict(re.findall(r"%([\w.\-]+) = \(?(\w+)\[", text))
    made = re.findall(r"= (\w+)\[[^=]*? (?:dot|convolution)\(%([\w.\-]+), %([\w.\-]+)\)", text)
    found = collections.Counter(f"{types[x]} x {types[w]} -> {out}" for out, x, w in made)
    return dict(found), found["s8 x s8 -> s32"]


def is_narrow(way: str, step: dict[str, Any]) -> bool:
    """Returns whether the layers of a compiled step multiply in few bits and nothing but the head in more."""
    wide = sum(n for types, n in step["dots"].items() if types.startswith("bf16 x bf16")) + len(step["wide_products"])
    if way == "int8":  # of three products of each matrix two are of whole numbers
        return 0 < step["whole_number_products"] >= 2 * (wide - HEAD)
    return CALLS[way] in step["calls"] and wide <= HEAD


def in_words(ways: list[str]) -> str:
    return " and ".join("bfloat16" if way == "dtype" else way for way in ways)


def compiled(a: argparse.Namespace) -> int:
    t, found, failed = targets.parse(f"{a.device}:1x1"), {}, 0
    for file in a.configs or [HERE.parent / "configs" / "gpt2_124m.py"]:
        base = config_io.load(file)
        model = base.model.at_depth(a.layers) if a.layers else base.model
        for matmul in a.matmul:
            run = dataclasses.replace(
                base, model=model, mesh=config.Mesh(), optim=config.Optim(),
                train=config.Train(batch_size=a.rows, seq_len=a.seq),
                execution=config.Execution(dtype="bfloat16", matmul=matmul, scan=a.scan),
            )  # fmt: skip
            name = f"{file.stem} {model.layers} layers {a.rows} x {a.seq} {matmul}"
            found[name] = one = step(run, t, a.hlo, name)
            if matmul != "dtype":
                failed |= not is_narrow(matmul, one)
            print(name, one, flush=True)
    if a.save != "-":
        save(f"aot_{a.save}", {
            "what": f"products of train steps in {in_words(a.matmul)}, read from the compiled programs; nothing ran",
            "device": t.chip.kind, "versions": environment.environment()["versions"] | compilers(), "found": found,
        })  # fmt: skip
    return int(failed)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["curves", "compiled"])
    p.add_argument("configs", nargs="*", type=Path)
    p.add_argument("--matmul", nargs="+", default=["dtype", "fp8"], choices=["dtype", *WAYS])
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
    if a.what == "curves" and not (a.data and a.cache and "dtype" in a.matmul):
        p.error("curves needs --data and --cache, and --matmul dtype to compare with")
    jax.config.update("jax_platforms", "cpu")
    return curves(a) if a.what == "curves" else compiled(a)


if __name__ == "__main__":
    sys.exit(main())
