"""What FSDP's compiled step sends, beside theory, for models and machines that aren't here.

`pip install libtpu` or `pip install "jax[cuda13]"`, then `python fsdp_theory.py --cases 8b@h100:8x8 70b@v5p:4x4x4`; up
to two minutes each. Theory: of the layers' weights two gathers and one reduction a step, in bfloat16. Fails where the
arrays that a step gathers and reduces over the fsdp axis are 5 % more or less than that, where a compiler says that it
copied an array to every device, or where it makes an array of a whole stack of layers.

A compiler may write a reduction of which every device keeps a part as an all-reduce, which sends twice as much, as
those for TPUs do over many chips: what is sent is shown beside theory too, in all and by kind. On GPUs more than
5 % above theory fails as well, and so it does for dense models with flags against it
(`8b@v5p:4x4x4+tpu_reduce_scatter`); gradients of experts are made by kernels, which those flags don't reach.
"""

import argparse
import math
import sys
from collections import Counter
from typing import Any

from worker import machine, save, table

from jaxlm.core import config, tree
from jaxlm.core.spec import is_spec
from jaxlm.models import MODELS as FAMILIES
from jaxlm.models import llama, mixtral
from jaxlm.nn.moe import Moe
from jaxlm.objectives import causal
from jaxlm.planning import ahead_of_time, targets

MODELS = {
    "small": (llama.Config(vocab=8192, layers=4, width=1024, heads=8, kv_heads=8, head_width=128, ffn=2816), 1024, 1),
    "8b": (llama.Config(vocab=128256, layers=32, width=4096, heads=32, kv_heads=8, head_width=128, ffn=14336), 4096, 1),
    "70b": (llama.Config(vocab=128256, layers=80, width=8192, heads=64, kv_heads=8, head_width=128, ffn=28672),
            4096, 1),
    "mixtral": (mixtral.Config(vocab=32000, layers=32, width=4096, heads=32, kv_heads=8, head_width=128,
                               moe=Moe(experts=8, top_k=2, ffn=14336)), 4096, 8),
}  # fmt: skip
TARGETS = ("h100:8x8", *(t + flags for t in ("v5p:4x4x4", "v6e:8x8") for flags in ("", "+tpu_reduce_scatter")))
CASES = [f"{m}@{t}" for m in ("8b", "70b", "mixtral") for t in TARGETS]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", nargs="+", default=CASES, help=f"MODEL@TARGET; models: {', '.join(MODELS)}")
    p.add_argument("--save", default="fsdp_theory", help="name under results/; - : don't save")
    a = p.parse_args()
    rows, bad = [], False
    for case in a.cases:
        name, _, rest = case.partition("@")
        target, *presets = rest.split("+")
        model, seq, experts = MODELS[name]
        t = targets.parse(target)
        run = config.Run(
            name="fsdp", model=model, objective=causal.Config(), mesh=config.Mesh(fsdp=-1, expert=experts),
            train=config.Train(batch_size=t.count, seq_len=seq),
            execution=config.Execution(remat="full", flags=tuple(presets)),
        )  # fmt: skip
        made = ahead_of_time.compile_step(run, t)
        fsdp, layers = made.sizes["fsdp"], stacks(model, experts)
        sent: Counter[str] = Counter()
        arrays = 0.0
        for c in made.module.collectives:
            if "fsdp" in c.axes and c.times > 1:
                sent[c.kind] += round(c.sent)
                arrays += c.sent / (2 if c.kind == "all-reduce" else 1)
        theory = 3 * 2 * sum(map(math.prod, layers)) * (fsdp - 1) / fsdp
        whole = [b for b in made.module.buffers(50) if dimensions(b.shape) in layers]
        rows.append([case, made.program.choices.attention.implementation, arrays / theory,
                     sum(sent.values()) / theory, *(sent[k] / 1e9 for k in KINDS),
                     sum(made.cost.memory.values()) / 1e9,
                     made.module.estimated_cycles / 1e9, len(whole), len(made.warnings), made.seconds])  # fmt: skip
        print(table(rows[-1:], HEADER), flush=True)
        bad |= abs(arrays / theory - 1) > 0.05 or bool(whole) or bool(made.warnings)
        bad |= sum(sent.values()) / theory > 1.05 and (t.chip.platform == "gpu" or (bool(presets) and experts == 1))
    print(table(rows, HEADER))
    if a.save != "-":
        save(a.save, {"what": __doc__, "machine": machine(), "columns": HEADER, "rows": rows})
    return 1 if bad else 0


KINDS = ("all-gather", "reduce-scatter", "collective-permute", "all-reduce")
HEADER = ["case", "attention", "arrays / theory", "sent / theory", *(f"{k} GB" for k in KINDS), "memory GB", "Gcycles",
          "whole stacks", "warnings", "compile s"]  # fmt: skip


def stacks(model: Any, experts: int) -> list[tuple[int, ...]]:
    """Shapes of the layers' matrices, all layers together: of experts a device's share."""
    family = next(f for f in FAMILIES.values() if isinstance(model, f.Config))
    return [tuple(n // experts if a == "experts" else n for n, a in zip(s.shape, s.axes, strict=True))
            for s in tree.flatten(family.specs(model), is_spec).values()
            if {"layers", "embed"} < {*s.axes}]  # fmt: skip


def dimensions(shape: str) -> tuple[int, ...]:
    return tuple(int(n) for n in shape.partition("[")[2].rstrip("]").split(",") if n)


if __name__ == "__main__":
    sys.exit(main())
