"""Predicted against published speed of training runs on TPUs and H100s: what `jaxlm plan --analytic` is worth.

The published runs are MaxText's and NVIDIA's, so each is predicted as their program would be: fused causal attention,
their remat, their mesh. The one number that is calibrated is `Chip.efficiency`, the share of the peak that products
reach in a step; one a chip kind, the median over that chip's points of the share that makes a point exact. Every point
is also predicted with the share that the chip's *other* points give (left out). Fails above `--limit` of median error.
"""

import argparse
import dataclasses
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import jax
from worker import save, table

from jaxlm.assembly import program, run_objective
from jaxlm.core import config
from jaxlm.models import gpt2, llama, mixtral
from jaxlm.nn.moe import Moe
from jaxlm.objectives import causal
from jaxlm.planning import roofline, targets
from jaxlm.runtime import chips
from jaxlm.runtime.mesh import Described, on_devices

L = llama.Config
LLAMA2_7B = L(vocab=32000, layers=32, width=4096, heads=32, kv_heads=32, head_width=128, ffn=11008)
LLAMA2_70B = L(vocab=32000, layers=80, width=8192, heads=64, kv_heads=8, head_width=128, ffn=28672)
LLAMA3_8B = L(vocab=128256, layers=32, width=4096, heads=32, kv_heads=8, head_width=128, ffn=14336)
LLAMA3_70B = dataclasses.replace(LLAMA2_70B, vocab=128256)
MIXTRAL = mixtral.Config(
    vocab=32000, layers=32, width=4096, heads=32, kv_heads=8, head_width=128,
    moe=Moe(experts=8, top_k=2, ffn=14336),
)  # fmt: skip
GPT_5B = gpt2.Config(vocab=51200, layers=24, width=4096, heads=32, positions=2048)


def scaled(heads: int, ffn: int, width: int, layers: int) -> L:
    """MaxText's `global_parameter_scale`: 16 heads of 128, 7,168 and 2,048 wide, 16 layers, each doubled in turn."""
    return L(vocab=32000, layers=layers, width=width, heads=heads, kv_heads=heads, head_width=128, ffn=ffn)


B16, B32 = scaled(64, 28672, 4096, 32), scaled(64, 28672, 8192, 32)
B64, B128 = scaled(64, 28672, 8192, 64), scaled(128, 57344, 8192, 64)
B256, B512 = scaled(128, 57344, 16384, 64), scaled(128, 57344, 16384, 128)
V4_22B = L(vocab=32000, layers=48, width=6144, heads=24, kv_heads=24, head_width=128, ffn=24576)
V4_52B = L(vocab=32000, layers=32, width=12288, heads=32, kv_heads=32, head_width=128, ffn=49152)
TIERS, SCALES = "MaxText, docs/reference/models/tiering.md", "MaxText, configs/tpu/{}/README.md and its scripts"
NVIDIA = "JAX-Toolbox, docs/frameworks/maxtext/README.md"


@dataclass(frozen=True)
class Point:
    name: str
    model: Any
    target: str
    batch: float
    """Sequences a device."""
    seq: int
    remat: str
    """The nearest of ours: their `minimal` and `save_dot…` keep products (dots), offloaded ones are computed again."""
    source: str
    mesh: dict[str, int]
    speed: float | None = None
    """Published tokens a second and device."""
    mfu: float | None = None
    """Published instead: their share of the peak, which counts all pairs of positions."""


FSDP = {"fsdp": -1}
V5P, V5E, V4 = (SCALES.format(v) for v in ("v5p", "v5e", "v4"))
POINTS = [
    Point("Llama-2-7B", LLAMA2_7B, "h100:8", 2, 4096, "dots", NVIDIA, FSDP, speed=11361),
    Point("Llama-3-70B", LLAMA3_70B, "h100:16x8", 2, 8192, "full", "NGC, MaxText Llama3 70B 25.02", FSDP, speed=1052),
    Point("GPT-5B", GPT_5B, "h100:32x8", 8, 2048, "none", "JAX-Toolbox, rosetta/projects/pax/README.md", {"data": -1},
          speed=13258),
    Point("Llama-3.1-8B", LLAMA3_8B, "v6e:16x16", 4, 8192, "full", TIERS, FSDP, speed=7207),
    Point("Llama-3.1-70B", LLAMA3_70B, "v6e:16x16", 5, 8192, "full", TIERS, FSDP, speed=960),
    Point("Llama-2-70B", LLAMA2_70B, "v6e:16x16", 2, 4096, "full", TIERS, FSDP, speed=900),
    Point("Mixtral 8x7B", MIXTRAL, "v6e:16x16", 12, 4096, "full", TIERS, FSDP, speed=3899),
    Point("Llama-2-70B", LLAMA2_70B, "v5p-1024", 4, 4096, "dots", TIERS, FSDP, speed=692),
    Point("Mixtral 8x7B", MIXTRAL, "v5p-512", 8, 4096, "full", TIERS, FSDP, speed=2909),
    Point("32B", B32, "v5p-128", 6, 2048, "dots", V5P, {"fsdp": -1, "tensor": 4}, mfu=0.7147),
    Point("32B, two slices", B32, "2*v5p-128", 6, 2048, "dots", V5P, {"data": 2, "fsdp": -1, "tensor": 4}, mfu=0.6943),
    Point("64B", B64, "v5p-128", 3, 2048, "dots", V5P, {"fsdp": -1, "tensor": 4}, mfu=0.7031),
    Point("128B", B128, "v5p-256", 1, 2048, "dots", V5P, {"fsdp": -1, "tensor": 8}, mfu=0.6868),
    Point("256B", B256, "v5p-1024", 1, 2048, "dots", V5P, {"fsdp": -1, "tensor": 8}, mfu=0.6709),
    Point("16B", B16, "v5e:16x16", 6, 2048, "full", V5E, FSDP, mfu=0.6110),
    Point("32B", B32, "v5e:16x16", 4, 2048, "full", V5E, FSDP, mfu=0.6690),
    Point("64B", B64, "v5e:16x16", 1, 2048, "full", V5E, FSDP, mfu=0.5990),
    Point("128B", B128, "v5e:16x16", 1, 2048, "full", V5E, {"fsdp": 16, "tensor": 16}, mfu=0.5610),
    Point("22B", V4_22B, "v4-128", 13, 2048, "full", V4, FSDP, mfu=0.567),
    Point("52B", V4_52B, "v4-384", 7, 2048, "full", V4, FSDP, mfu=0.560),
]  # fmt: skip


def cost(p: Point) -> tuple[roofline.Cost, targets.Target, dict[str, int]]:
    t = targets.parse(p.target)
    run = config.Run(
        name="x", model=p.model, objective=causal.Config(), mesh=config.Mesh(**p.mesh, replicated=(".*",)),
        train=config.Train(batch_size=round(p.batch * t.count), seq_len=p.seq),
        execution=config.Execution(remat=p.remat),
    )  # fmt: skip
    with on_devices([Described(t.chip.platform, t.chip.kind)] * t.count):
        made = program.program(run, run_objective.placeholder_tokenizer(run))
        sizes = dict(made.mesh.shape)
        return roofline.cost(made, t, "flash"), t, sizes


def published(p: Point, c: roofline.Cost, t: targets.Target) -> float:
    """Tokens a second and device."""
    return p.speed or (p.mfu or 0.0) * t.chip.flops / c.model_flops["full"]


def predicted(c: roofline.Cost, t: targets.Target, sizes: dict[str, int], efficiency: float) -> float:
    t = dataclasses.replace(t, chip=dataclasses.replace(t.chip, efficiency=efficiency))
    again = roofline.combine(c, t, sizes)
    return again.speed(t.count, t.chip.flops)["tokens_per_s_device"]


def exact(want: float, c: roofline.Cost, t: targets.Target, sizes: dict[str, int]) -> float:
    """The efficiency that would make a point exact, by halving; the end of the range where none does."""
    low, high = 0.05, 1.5
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted(c, t, sizes, middle) < want else (low, middle)
    return low


def main() -> int:
    jax.config.update("jax_platforms", "cpu")
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--limit", type=float, default=0.15, help="of the median error (default 0.15)")
    a.add_argument("--save", default="plan_accuracy", help="name under results/; - : don't save")
    args = a.parse_args()
    found = [(p, *cost(p)) for p in POINTS]
    fits = [exact(published(p, c, t), c, t, s) for p, c, t, s in found]
    rows = []
    for i, (p, c, t, sizes) in enumerate(found):
        want = published(p, c, t)
        others = [e for j, e in enumerate(fits) if j != i and found[j][2].chip is t.chip]
        now = predicted(c, t, sizes, t.chip.efficiency)
        left = predicted(c, t, sizes, statistics.median(others)) if others else float("nan")
        rows.append({"model": p.name, "target": p.target, "published": want, "predicted": now, "error": now / want - 1,
                     "left_out_error": left / want - 1, "exact_efficiency": fits[i], "source": p.source})  # fmt: skip
    print(table([[r["model"], r["target"], r["published"], r["predicted"], f"{r['error']:+.1%}",
                  f"{r['left_out_error']:+.1%}", r["exact_efficiency"]] for r in rows],
                ["model", "target", "published", "predicted", "error", "left out", "exact efficiency"]))  # fmt: skip
    names = list(dict.fromkeys(t.chip.name for _, _, t, _ in found))
    medians = {n: statistics.median(e for e, (_, _, t, _) in zip(fits, found, strict=True) if t.chip.name == n)
               for n in names}  # fmt: skip
    print("efficiency, median of the exact ones / in the table:",
          {n: (round(m, 3), chips.CHIPS[n].efficiency) for n, m in medians.items()})  # fmt: skip
    error, left = (statistics.median(abs(r[k]) for r in rows) for k in ("error", "left_out_error"))
    print(f"median error {error:.1%}, left out {left:.1%}, worst {max(abs(r['error']) for r in rows):.1%}, "
          f"{len(rows)} points")  # fmt: skip
    if args.save != "-":
        save(args.save, {"what": __doc__, "rows": rows, "median_error": error, "median_left_out": left,
                         "efficiency": medians})  # fmt: skip
    return 1 if left > args.limit else 0


if __name__ == "__main__":
    sys.exit(main())
