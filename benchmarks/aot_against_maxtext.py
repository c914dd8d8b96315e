"""Our train step beside MaxText's, both compiled ahead of time for the same TPU slice, shapes and batch.

Twice each: with full remat, and with the policy of each side that computes least again and still fits (`POLICIES`).
Nothing runs, so nothing is timed but the compilations: memory of a chip, bytes by kind of collective and the compiler's
own estimate of cycles are read from the compiled programs with one reader (`jaxlm/planning/hlo.py`), loops counted as
often as they run. `--maxtext-python` is the interpreter of an environment with `pip install "maxtext[tpu]"` (Python
3.12) and the libtpu that its jax asks for (a newer one's programs can't be read); without it ours alone is compiled.
Ours needs `pip install "jax[tpu]"`. One compilation at a time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from worker import machine, save, table

from jaxlm.core import config
from jaxlm.models import llama, mixtral
from jaxlm.nn.moe import Moe
from jaxlm.objectives import causal
from jaxlm.planning import ahead_of_time, hlo, targets
from jaxlm.training import environment

L = llama.Config
# Our shape, MaxText's name, our target and MaxText's, sequences a device, positions.
MODELS: dict[str, tuple[Any, str, str, str, int, int]] = {
    "7b": (L(vocab=32000, layers=32, width=4096, heads=32, kv_heads=32, head_width=128, ffn=11008),
           "llama2-7b", "v5p:2x2x2", "v5p-16", 1, 4096),
    "70b": (L(vocab=32000, layers=80, width=8192, heads=64, kv_heads=8, head_width=128, ffn=28672),
            "llama2-70b", "v5p:4x4x4", "v5p-128", 1, 4096),
    "mixtral": (mixtral.Config(vocab=32000, layers=32, width=4096, heads=32, kv_heads=8, head_width=128,
                               moe=Moe(experts=8, top_k=2, ffn=14336)),
                "mixtral-8x7b", "v5p:4x4x4", "v5p-128", 1, 4096),
}  # fmt: skip

# What else than all of it each side can compute again, least first. (MaxText's `none` still wraps each layer.)
POLICIES = {
    "ours": ("none", "dots", "attention", "qkv"),
    "maxtext": ("minimal_with_context", "minimal", "save_dot_except_mlpwi", "save_qkv_proj"),
}


def figures(module: hlo.Module) -> dict[str, Any]:
    moved: Counter[str] = Counter()
    for c in module.collectives:
        moved[c.kind] += round(c.sent)
    return {
        "sent_bytes": sum(moved.values()), "sent_by_kind": dict(moved), "estimated_cycles": module.estimated_cycles,
        "traffic_bytes": module.traffic, "largest": [vars(b) for b in module.buffers(5)],
    }  # fmt: skip


def ours(name: str, remat: str, keep: Path) -> dict[str, Any]:
    model, _, target, _, batch, seq = MODELS[name]
    t = targets.parse(target)
    run = config.Run(
        name=name, model=model, objective=causal.Config(), mesh=config.Mesh(fsdp=-1),
        train=config.Train(batch_size=batch * t.count, seq_len=seq), execution=config.Execution(remat=remat),
    )  # fmt: skip
    try:
        made = ahead_of_time.compile_step(run, t)
    except ahead_of_time.Refused as refusal:
        return {"refused": str(refusal)}
    (keep / f"{name}-{remat}-ours.txt").write_text(made.executable.as_text())
    m = made.executable.memory_analysis()
    return figures(made.module) | {
        "arguments": m.argument_size_in_bytes, "temporaries": m.temp_size_in_bytes, "seconds": made.seconds,
        "accessed": made.executable.cost_analysis()["bytes accessed"], "attention": made.program.notes["attention"],
        "warnings": made.warnings, "jax": environment.environment()["versions"]["jax"],
    }  # fmt: skip


def theirs(name: str, remat: str, python: str, keep: Path, minutes: float) -> dict[str, Any]:
    _, model, target, slice_name, batch, seq = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [python, str(Path(__file__).with_name("aot_maxtext.py")), folder, f"compile_topology={slice_name}",
             "compile_topology_num_slices=1", f"model_name={model}", f"per_device_batch_size={batch}",
             f"max_target_length={seq}", f"remat_policy={remat}", "attention=flash", "dataset_type=synthetic",
             "enable_checkpointing=false", f"base_output_directory={folder}", "run_name=aot", "steps=1"],
            capture_output=True, text=True, timeout=60 * minutes,
            # Neither the packages of another Python nor its libtpu, which is at work here already.
            env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TPU_LIBRARY_PATH")}
            | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        )  # fmt: skip
        made = Path(folder) / "maxtext.json"
        if not made.exists():
            return {"refused": done.stderr[-300:]}
        text = (Path(folder) / "maxtext.txt").read_text()
        (keep / f"{name}-{remat}-maxtext.txt").write_text(text)
        return json.loads(made.read_text()) | figures(hlo.Module(text, {"fsdp": targets.parse(target).count}))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["7b"], choices=MODELS)
    p.add_argument("--maxtext-python", help="interpreter that has maxtext")
    p.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()), help="folder for the programs' text")
    p.add_argument("--minutes", type=float, default=30, help="for each of MaxText's compilations (default 30)")
    p.add_argument("--save", default="aot_against_maxtext", help="name under results/; - : don't save")
    a = p.parse_args()
    found: dict[str, Any] = {}
    for name in a.models:
        sides: dict[str, Callable[[str], dict[str, Any]]] = {"ours": partial(ours, name, keep=a.keep)}
        if a.maxtext_python:
            sides["maxtext"] = partial(theirs, name, python=a.maxtext_python, keep=a.keep, minutes=a.minutes)
        found[name] = {}
        for side, compile_with in sides.items():
            for remat in ("full", *POLICIES[side]):
                one = found[name][f"{side}, {remat}"] = compile_with(remat)
                print(name, side, remat, json.dumps(one), flush=True)
                if remat != "full" and "refused" not in one:
                    break
    columns = ("arguments", "temporaries", "accessed", "traffic_bytes", "sent_bytes", "estimated_cycles", "seconds")
    rows = [[name, who] + [one.get(c, float("nan")) / (1e9 if c != "seconds" else 1) for c in columns]
            for name, both in found.items() for who, one in both.items()]  # fmt: skip
    heads = ("arguments GB", "temporaries GB", "accessed GB (loops once)", "traffic GB", "sent GB", "Gcycles", "s")
    print(table(rows, ["model", "", *heads]))
    if a.save != "-":
        save(a.save, {"what": __doc__, "machine": machine(), "found": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
