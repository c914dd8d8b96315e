"""What one device must hold to fine-tune an 8B model: all weights, LoRA over bfloat16, and QLoRA over NF4.

The train step that `jaxlm train` would run is compiled for a device that isn't here, from shapes alone: no weight
exists and nothing runs. `pip install "jax[cuda13]"` brings the GPU's compiler (half a minute a program), `pip install
libtpu` the TPUs' (`--device v5e`, some minutes). Fails if QLoRA needs more than `--budget` on the GPU.
"""

import argparse
import dataclasses
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from worker import save, table

from jaxlm.core import config, config_io, spec, tree
from jaxlm.planning import ahead_of_time, targets
from jaxlm.training import environment
from jaxlm.weights.adapters import Lora

LORA = Lora(rank=16, targets=("all",))
WAYS = {
    "all weights": config.Adapter(),
    "LoRA over bfloat16": dataclasses.replace(LORA, base="bfloat16"),
    "QLoRA over NF4": dataclasses.replace(LORA, base="nf4"),
}


def compilers() -> dict[str, str]:
    have = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {n: have[n] for n in ("jax-cuda13-pjrt", "nvidia-cudnn-cu13", "libtpu") if n in have}


def needs(run: config.Run, t: targets.Target) -> dict[str, Any]:
    """Bytes of the compiled step of a run on one such device."""
    made = ahead_of_time.compile_step(run, t)
    p, m = made.program, made.executable.memory_analysis()
    flat = tree.flatten(spec.abstract(p.specs))
    trained = {path for path in flat if p.optimizer.trainable(path)}
    copied = m.output_size_in_bytes - m.alias_size_in_bytes  # what of the new state doesn't take the old one's place
    return {
        "parameters": spec.count(p.model.specs),
        "trained": sum(flat[path].size for path in trained),
        "weight_bytes": sum(x.size * x.dtype.itemsize for x in flat.values()),
        "argument_bytes": m.argument_size_in_bytes,
        "temporary_bytes": m.temp_size_in_bytes,
        "copied_bytes": copied,
        "total_bytes": m.argument_size_in_bytes + m.temp_size_in_bytes + copied,
        "attention": p.notes["attention"],
        "compile_s": round(made.seconds, 1),
        "text": made.executable.as_text(),
    }


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", nargs="+", default=["rtx4090"], help="rtx4090, or a TPU: v5e, v6e")
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--seq", type=int, default=2048)
    p.add_argument("--budget", type=float, default=24.0, help="GB (1e9 bytes) of QLoRA on the GPU")
    p.add_argument("--hlo", type=Path, help="folder to write the compiled programs to")
    p.add_argument("--save", default="aot_qlora", help="name under results/; - : don't save")
    a = p.parse_args()
    shape = config_io.load(Path(__file__).parents[1] / "configs" / "llama_8b.py")
    found: dict[str, Any] = {}
    for name in a.device:
        device = targets.parse(f"{name}:1x1")
        for way in a.ways:
            run = dataclasses.replace(
                shape,
                adapter=WAYS[way],
                optim=config.Optim(lr=2e-4),
                train=config.Train(batch_size=a.batch, seq_len=a.seq),
                mesh=config.Mesh(),
                execution=config.Execution(dtype="bfloat16", remat="full"),
            )
            try:
                one = needs(run, device)
            except ahead_of_time.Refused as e:  # a TPU's compiler refuses what doesn't fit
                one = {"refused": str(e).partition("\n")[0][:300]}
            if a.hlo:
                a.hlo.mkdir(parents=True, exist_ok=True)
                (a.hlo / f"{name} {way}.txt").write_text(one.get("text", ""))
            one.pop("text", None)
            found.setdefault(name, {})[way] = one | {"device": device.chip.kind}
            print(name, way, one, flush=True)
    header = ["device", "way", "trained", "arguments GB", "temporaries GB", "total GB"]
    rows = [
        [name, way, one.get("trained", 0)]
        + [one.get(f"{part}_bytes", float("nan")) / 1e9 for part in ("argument", "temporary", "total")]
        for name, ways in found.items()
        for way, one in ways.items()
    ]
    print(table(rows, header))
    if a.save != "-":
        save(a.save, {
            "what": "bytes of one device for a train step of an 8B Llama shape, from the compiler; nothing ran",
            "settings": {"batch": a.batch, "seq": a.seq, "rank": LORA.rank, "targets": "all", "dtype": "bfloat16",
                         "remat": "full", "optimizer": "adamw, float32"},
            "versions": environment.environment()["versions"] | compilers(), "found": found,
        })  # fmt: skip
    mine = found.get("rtx4090", {}).get("QLoRA over NF4", {}).get("total_bytes", 0)
    return 1 if mine > a.budget * 1e9 else 0


if __name__ == "__main__":
    sys.exit(main())
