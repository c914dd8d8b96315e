"""What FSDP's compiled step moves, beside theory: of the layers' weights two all-gathers and one reduction a step.

`pip install libtpu` or `pip install "jax[cuda13]"`, then `python fsdp_theory.py --targets h100:8 v6e:2x4`; some minutes
a TPU. Fails where a compiler moves more than 5 % more or less than theory says, says that it copied an array to every
device, or holds all layers' weights whole. A reduction is best a reduce-scatter; the share that is one is shown.
"""

import argparse
import sys

from worker import save, table

from jaxlm import config, plan, targets
from jaxlm.models import llama
from jaxlm.objectives import causal

MODEL = llama.Config(vocab=8192, layers=4, width=1024, heads=8, kv_heads=8, head_width=128, ffn=2816, positions=2048)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--targets", nargs="+", default=["h100:8"])
    p.add_argument("--save", default="fsdp_theory", help="name under results/; - : don't save")
    a = p.parse_args()
    layers = 2 * MODEL.layers * (4 * MODEL.width**2 + 3 * MODEL.width * MODEL.ffn)  # bytes in bfloat16
    rows, bad = [], False
    for name in a.targets:
        t = targets.parse(name)
        run = config.Run(
            name="fsdp", model=MODEL, objective=causal.Config(), mesh=config.Mesh(fsdp=-1),
            train=config.Train(batch_size=t.count, seq_len=1024), execution=config.Execution(remat="full"),
        )  # fmt: skip
        made = plan.compile_step(run, t)
        looped = [c for c in made.module.collectives if c.times == MODEL.layers]
        total = lambda *kinds, of=looped: sum(c.bytes * c.times for c in of if c.kind in kinds)  # noqa: E731
        gathered = total("all-gather") / (2 * layers)
        reduced = total("reduce-scatter", "all-reduce") / layers
        whole = [b for b in made.module.buffers(50) if b.shape.startswith(f"f32[{MODEL.layers},")
                 and b.bytes >= 4 * MODEL.layers * MODEL.width * MODEL.ffn]  # fmt: skip
        rows.append([name, gathered, reduced, total("reduce-scatter") / total("reduce-scatter", "all-reduce"),
                     len(whole), len(made.warnings), made.seconds])  # fmt: skip
        bad |= abs(gathered - 1) > 0.05 or abs(reduced - 1) > 0.05 or bool(whole) or bool(made.warnings)
    header = ["target", "gathered / theory", "reduced / theory", "scattered", "whole arrays", "warnings", "compile s"]
    print(table(rows, header))
    if a.save != "-":
        save(a.save, {"what": __doc__, "columns": header, "rows": rows})
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
