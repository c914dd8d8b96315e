"""What attention of packed documents costs on a GPU that isn't here: kernels, arrays and bytes of a compiled step.

    python benchmarks/aot_attention.py [--ways offsets mask] [--layers scanned unrolled] [--hlo FOLDER]

GPT-2 124M in bfloat16, from shapes alone: documents of a row kept apart by where they begin and end, and, as before
that, by a mask of all pairs of positions. Nothing runs. `pip install "jax[cuda13]"` brings the compiler. Fails where
the first way makes an array of all pairs, or doesn't call cuDNN's fused kernel.
"""

import argparse
import collections
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from aot_qlora import compilers
from worker import save, table

from jaxlm.core import config, config_io
from jaxlm.nn.kernels import packed_attention
from jaxlm.planning import ahead_of_time, targets
from jaxlm.training import environment

WAYS = {"offsets": None, "mask": "asked for by a measurement"}


def compiled(run: config.Run, t: targets.Target, way: str) -> tuple[str, dict[str, Any]]:
    """Returns the program's text and what it says of attention."""
    why = packed_attention.unavailable if WAYS[way] is None else lambda *_: WAYS[way]
    with mock.patch.object(packed_attention, "unavailable", why):
        made = ahead_of_time.compile_step(run, t)
    text, memory, T = made.executable.as_text(), made.executable.memory_analysis(), run.train.seq_len
    pairs = collections.Counter(re.findall(rf"\b\w+\[(?:\d+,)*{T},{T}\]", text))
    return text, {
        "attention": made.program.notes["attention"],
        "calls": collections.Counter(re.findall(r'custom_call_target="(__cudnn\$fmha[^"]*)"', text)),
        "arrays_of_pairs": pairs,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_s": round(made.seconds, 1),
    }


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="h100")
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    p.add_argument("--layers", nargs="+", default=["scanned", "unrolled"], choices=["scanned", "unrolled"])
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--hlo", type=Path, help="folder to write the compiled programs to")
    p.add_argument("--save", default="aot_attention", help="name under results/; - : don't save")
    a = p.parse_args()
    base = config_io.load(Path(__file__).parents[1] / "configs" / "gpt2_124m.py")
    t, found = targets.parse(f"{a.device}:1x1"), {}
    for layers in a.layers:
        for way in a.ways:
            run = dataclasses.replace(
                base, mesh=config.Mesh(), train=config.Train(batch_size=a.batch, seq_len=1024),
                execution=config.Execution(dtype="bfloat16", scan=layers == "scanned"),
            )  # fmt: skip
            text, one = compiled(run, t, way)
            found[f"{way}, {layers}"] = one
            print(way, layers, one, flush=True)
            if a.hlo:
                a.hlo.mkdir(parents=True, exist_ok=True)
                (a.hlo / f"{way} {layers}.txt").write_text(text)
            if a.save != "-":  # after each program, as they take minutes
                what = "attention of packed documents in a train step of GPT-2 124M, from the compiler; nothing ran"
                save(a.save, {
                    "what": what, "device": t.chip.kind, "found": found,
                    "settings": {"batch": a.batch, "seq": 1024, "dtype": "bfloat16", "remat": "none"},
                    "versions": environment.environment()["versions"] | compilers(),
                })  # fmt: skip
    rows = [[name, sum(x["calls"].values()), sum(x["arrays_of_pairs"].values()), f"{x['temporary_bytes'] / 1e9:.2f}"]
            for name, x in found.items()]  # fmt: skip
    print(table(rows, ["documents by", "fused calls", "arrays of pairs", "temporaries GB"]))
    mine = [one for name, one in found.items() if name.startswith("offsets")]
    return 0 if all(one["calls"] and not one["arrays_of_pairs"] for one in mine) else 1


if __name__ == "__main__":
    sys.exit(main())
