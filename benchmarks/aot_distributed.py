"""What workers that train apart within one program send each other, as compiled for machines that aren't here: two
slices of v5p and two nodes of H100, a worker on each.

`pip install libtpu "jax[cuda13]"`; a TPU's step takes minutes. Nothing runs. Fails where a collective of an inner step
goes over `replica`, where an exchange sends 5 % more or less than theory says, where the largest of four fragments
sends more than 1.1 quarters of all, where an exchange that should overlap with a step needs what the step computes or
the step needs what it brings, and where the compiler copied an array to every device for want of better. Cases that
aren't asked for stay in the saved file.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import jax
from aot_qlora import compilers
from worker import machine, save, table

from jaxlm.core import config
from jaxlm.core.distributed import Distributed
from jaxlm.models import llama
from jaxlm.objectives import causal
from jaxlm.planning import ahead_of_time, hlo, targets, workers
from jaxlm.planning.hlo_text import Instruction
from jaxlm.runtime import mesh
from jaxlm.training import environment
from jaxlm.training.distributed.exchange import AXIS
from jaxlm.weights.adapters import Lora

TARGETS = ("h100:2x8", "2*v5p:4x4x4")
MODEL = llama.Config(vocab=128256, layers=4, width=4096, heads=32, kv_heads=8, head_width=128, ffn=14336)
SMALL = dataclasses.replace(MODEL, vocab=32768, layers=2, width=2048, heads=16, ffn=4096)
INSIDE = {
    "tensor": dict(tensor=2),
    "ZeRO 1 × tensor": dict(tensor=2, zero=1),
    "context": dict(context=2),
    "stages": dict(stage=2),
}
KINDS = ("none", "bfloat16", "int8", "float4")
CASES = ("step", *(f"step, {name}" for name in INSIDE), *(f"exchange, {kind}" for kind in KINDS), "fragments",
         "overlap", "LoRA")  # fmt: skip
HEADER = ["target", "case", "over replica MB", "theory MB", "temporaries MB", "weights MB", "what", "compile s"]


def a_run(t: targets.Target, model: llama.Config = MODEL, inside: dict | None = None, **distributed: Any) -> config.Run:
    return config.Run(
        "apart", model, causal.Config(), mesh=config.Mesh(replica=2, fsdp=-1, **(inside or {})),
        train=config.Train(batch_size=t.count, seq_len=2048), execution=config.Execution(remat="full"),
        distributed=Distributed("diloco", **distributed),
    )  # fmt: skip


def over(module: hlo.Module) -> list[hlo.Collective]:
    """The collectives between workers."""
    return [c for c in module.collectives if AXIS in c.axes]


def step(t: targets.Target, run: config.Run) -> dict[str, Any]:
    made = ahead_of_time.compile_step(run, t)
    found = over(made.module)
    sent: Counter[str] = Counter()
    for c in made.module.collectives:
        sent[f"{c.kind} over {'+'.join(c.axes) or '?'}"] += round(c.sent)
    return {
        "sent_over_replica": sum(c.sent for c in found), "theory": 0.0,
        "temporaries": made.executable.memory_analysis().temp_size_in_bytes, "sent": dict(sent),
        "failures": [f"{c.kind} of {c.bytes} bytes from {c.where}" for c in found] + list(made.warnings),
        "compile_s": made.seconds, "text": ahead_of_time.hlo_of(made.executable),
    }  # fmt: skip


def exchange(t: targets.Target, run: config.Run, fragments: tuple[int, ...] | None = None) -> dict[str, Any]:
    started = time.perf_counter()
    made = ahead_of_time.compile_exchange(run, t, fragments)
    planned = workers.exchange(made.program, t)
    assert planned is not None
    sizes = made.program.fragments.sizes
    share = 1.0 if fragments is None else sum(sizes[p] for p in fragments) / sum(sizes)
    theory = planned.sent * share
    failures = []
    if abs(made.sent / theory - 1) > 0.05:
        failures.append(f"sends {made.sent / theory:.3f} times theory")
    return {
        "sent_over_replica": made.sent, "theory": theory, "temporaries": made.temporaries,
        "weights": 4 * sum(sizes) / (t.count / 2), "failures": failures,
        "collectives": dict(Counter(c.kind for c in over(made.module))),
        "sent_inside": sum(c.sent for c in made.module.collectives) - made.sent,
        "compile_s": time.perf_counter() - started, "text": ahead_of_time.hlo_of(made.executable),
    }  # fmt: skip


def fragments(t: targets.Target) -> dict[str, Any]:
    run = a_run(t, fragments=4, every=32)
    parts = [exchange(t, run, (p,)) for p in range(4)]
    whole = workers.exchange(ahead_of_time.program_for(run, t), t)
    assert whole is not None
    largest = max(part["sent_over_replica"] for part in parts)
    failures = [line for part in parts for line in part["failures"]]
    if largest > 1.1 * whole.sent / 4:
        failures.append(f"the largest sends {largest / whole.sent:.3f} of all")
    return {
        "sent_over_replica": largest, "theory": whole.sent / 4, "each": [part["sent_over_replica"] for part in parts],
        "temporaries": max(part["temporaries"] for part in parts), "weights": parts[0]["weights"],
        "failures": failures, "compile_s": sum(part["compile_s"] for part in parts), "text": parts[0]["text"],
    }  # fmt: skip


def overlap(t: targets.Target) -> dict[str, Any]:
    """A fragment that travels in the program of a step."""
    run, started = a_run(t, fragments=4, every=32, overlap=1), time.perf_counter()
    with mesh.on_devices(t.devices()):
        p = ahead_of_time.program_of(run)
        with mesh.on_mesh(p.mesh):
            made = p.train_step((0,)).lower(p.abstract_state(), ahead_of_time.abstract_batch(p)).compile()
    assert p.mesh is not None
    module, whole = ahead_of_time.read(made, dict(p.mesh.shape), t), workers.exchange(p, t)
    assert whole is not None
    found, sent = order(module), sum(c.sent for c in over(module))
    theory = whole.sent * p.fragments.sizes[0] / sum(p.fragments.sizes)
    failures = [f"{name} waits for the step" for name in found["after_compute"]]
    failures += [f"{name} waits for the exchange" for name in found["compute_after"]]
    if abs(sent / theory - 1) > 0.05:
        failures.append(f"sends {sent / theory:.3f} times theory")
    return {
        "sent_over_replica": sent, "theory": theory, "temporaries": made.memory_analysis().temp_size_in_bytes,
        "order": found, "failures": failures, "compile_s": time.perf_counter() - started,
        "text": ahead_of_time.hlo_of(made),
    }  # fmt: skip


def order(module: hlo.Module) -> dict[str, Any]:
    """Which exchanges of the program and which loops over products need each other, and what the compiler's schedule
    puts between an exchange's start and its end."""
    entry = module.computations[module.entry]
    place = {name: n for n, name in enumerate(entry)}

    def multiplies(i: Instruction) -> bool:
        inner = [i.attribute(name) or "" for name in ("body", "calls", "to_apply")]
        return i.opcode in ("dot", "convolution", "custom-call") or any(
            multiplies(k) for name in inner for k in module.computations.get(name, {}).values()
        )

    def needs(i: Instruction) -> set[str]:
        found, left = set(), list(i.operands)
        while left:
            if (name := left.pop()) in entry and name not in found:
                found.add(name)
                left += entry[name].operands
        return found

    def between(i: Instruction) -> bool:
        if i.opcode == "send":
            return hlo.BETWEEN_SLICES in i.attributes
        kind = i.opcode.removesuffix("-start")
        return kind in hlo.COLLECTIVES and AXIS in module.group(i.attributes)[1]

    compute = {name: i for name, i in entry.items() if i.opcode == "while" and multiplies(i)}
    exchanges = {name: i for name, i in entry.items() if between(i)}
    rendezvous = lambda i: i.attributes.partition("rendezvous=")[2].partition(",")[0]  # noqa: E731
    inside = {}
    for name, i in exchanges.items():
        starts = {name} | {k for k, x in entry.items() if x.opcode == "recv" and rendezvous(x) == rendezvous(i)}
        ends = [place[k] for k, x in entry.items() if x.opcode.endswith("-done") and starts & {*x.operands}]
        inside[name] = sum(place[name] < place[k] < max(ends, default=0) for k in compute)
    brought = {*exchanges} | {name for name, i in entry.items() if i.opcode == "recv" and hlo.BETWEEN_SLICES in
                              i.attributes}  # fmt: skip
    return {
        "loops": len(compute), "exchanges": len(exchanges), "loops_during": inside,
        "after_compute": [name for name, i in exchanges.items() if needs(i) & {*compute}],
        "compute_after": [name for name, i in compute.items() if needs(i) & brought],
    }  # fmt: skip


def adapters(t: targets.Target) -> dict[str, Any]:
    """LoRA of rank 16 on every matrix: its step, and the exchange of its factors alone."""
    lora = Lora(rank=16, targets=("all",), base="bfloat16")
    run = dataclasses.replace(a_run(t), adapter=lora)
    first, then = step(t, run), exchange(t, run)
    return then | {"failures": first["failures"] + then["failures"], "sent": first["sent"],
                   "compile_s": first["compile_s"] + then["compile_s"]}  # fmt: skip


def measure(t: targets.Target, case: str) -> dict[str, Any]:
    kind, _, which = case.partition(", ")
    if kind == "step":
        return step(t, a_run(t, SMALL, INSIDE[which]) if which else a_run(t))
    if kind == "exchange":
        return exchange(t, a_run(t, compress=which))
    return {"fragments": fragments, "overlap": overlap, "LoRA": adapters}[kind](t)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--targets", nargs="+", default=list(TARGETS))
    p.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    p.add_argument("--hlo", type=Path, help="folder to write the compiled programs to")
    p.add_argument("--save", default="aot_distributed", help="name under results/; - : don't save")
    a = p.parse_args()
    found: dict[str, dict[str, Any]] = {}
    rows = []
    for name in a.targets:
        for case in a.cases:
            t = targets.parse(name)
            try:
                one = measure(t, case)
            except (ahead_of_time.Refused, jax.errors.JaxRuntimeError) as e:
                one = {"failures": [str(e)[:300]]}
            text = one.pop("text", "")
            if a.hlo:
                a.hlo.mkdir(parents=True, exist_ok=True)
                (a.hlo / f"{name} {case}.txt").write_text(text)
            found.setdefault(name, {})[case] = one
            mb = [one.get(key, float("nan")) / 1e6 for key in ("sent_over_replica", "theory", "temporaries", "weights")]
            what = one["failures"][0] if one["failures"] else "as it should be"
            rows.append([name, case, *mb, what, one.get("compile_s", 0.0)])
            print(table(rows[-1:], HEADER), flush=True)
    print(table(rows, HEADER))
    if a.save != "-":
        file = Path(__file__).parent / "results" / f"{a.save}.json"
        saved: dict[str, dict[str, Any]] = json.loads(file.read_text())["found"] if file.is_file() else {}
        save(a.save, {
            "what": __doc__, "machine": machine(), "versions": environment.environment()["versions"] | compilers(),
            "found": {name: saved.get(name, {}) | found.get(name, {}) for name in saved | found},
        })  # fmt: skip
    return 1 if any(one["failures"] for cases in found.values() for one in cases.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
