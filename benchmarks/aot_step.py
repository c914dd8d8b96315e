"""What attention of packed documents and loops over layers cost on a GPU that isn't here: a compiled step's kernels,
arrays and bytes.

    python benchmarks/aot_step.py [--models gpt2_124m:64x1024 llama_1b:2x4096] [--ways offsets mask]
        [--layers scanned unrolled] [--hlo FOLDER]

A config's model in bfloat16, from shapes alone, with a batch of rows × positions. Documents of a row are kept apart by
where they begin and end, or by a mask of all pairs of positions; layers are a loop or unrolled. `kept` are the bytes
that a loop over layers keeps of a layer, a token and a channel. Nothing runs. `pip install "jax[cuda13]"` brings the
compiler. Programs that aren't asked for stay in the results. Fails where the first way makes an array of all pairs, or
doesn't call cuDNN's fused kernel.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from aot_qlora import compilers
from worker import HERE, save, table

from jaxlm.core import config, config_io, tree
from jaxlm.nn.kernels import packed_attention
from jaxlm.planning import ahead_of_time, targets
from jaxlm.training import environment

MODELS = "gpt2_124m:64x1024", "llama_1b:2x4096"
WIDTHS = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}
WAYS = {"offsets": None, "mask": "asked for by a measurement"}


def compiled(run: config.Run, t: targets.Target, way: str) -> tuple[str, dict[str, Any]]:
    """Returns the program's text and what it says of attention."""
    why = packed_attention.unavailable if WAYS[way] is None else lambda *_: WAYS[way]
    with mock.patch.object(packed_attention, "unavailable", why):
        made = ahead_of_time.compile_step(run, t)
    text, memory, T = made.executable.as_text(), made.executable.memory_analysis(), run.train.seq_len
    made_arrays = "\n".join(line for line in text.splitlines() if " bitcast(" not in line)  # may be a weight's
    pairs = collections.Counter(re.findall(rf"\b\w+\[(?:\d+,)*{T},{T}\]", made_arrays))
    return text, {
        "attention": made.program.notes["attention"],
        "calls": collections.Counter(re.findall(r'custom_call_target="(__cudnn\$fmha[^"]*)"', text)),
        "arrays_of_pairs": pairs,
        "kept": kept(text, run, made.program.specs),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_s": round(made.seconds, 1),
    }


def kept(text: str, run: config.Run, specs: Any) -> float | None:
    """Returns the bytes that a loop over layers hands to the backward pass, of a layer, a token and a channel; None
    where layers are no loop."""
    c: Any = run.model
    rows, positions, most = run.train.batch_size, run.train.seq_len, 0
    weights = {tuple(s.shape) for s in tree.flatten(specs).values()}
    for carried in re.findall(r"= (\(.*\)) while\(", text):
        arrays = [(kind, tuple(map(int, n.split(",")))) for kind, n in re.findall(r"(\w+)\[([\d,]+)\]", carried)]
        most = max(most, sum(
            WIDTHS[kind] * math.prod(sizes) for kind, sizes in arrays
            if sizes[0] == c.layers and (sizes[1] == rows * positions or sizes[1:3] == (rows, positions))
            and not (kind == "f32" and sizes in weights)
        ))  # fmt: skip
    return most / (c.layers * rows * positions * c.width) or None


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="h100")
    p.add_argument(
        "--models", nargs="+", default=["gpt2_124m:64x1024", "llama_1b:2x4096"], help="CONFIG:ROWSxPOSITIONS"
    )
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    p.add_argument("--layers", nargs="+", default=["scanned", "unrolled"], choices=["scanned", "unrolled"])
    p.add_argument("--hlo", type=Path, help="folder to write the compiled programs to")
    p.add_argument("--save", default="aot_step", help="name under results/; - : don't save")
    a = p.parse_args()
    file = HERE / "results" / f"{a.save}.json"
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))["found"] if file.is_file() else {}
    t = targets.parse(f"{a.device}:1x1")
    for name, layers, way in itertools.product(a.models, a.layers, a.ways):
        config_name, _, sizes = name.partition(":")
        rows, positions = map(int, sizes.split("x"))
        base = config_io.load(Path(__file__).parents[1] / "configs" / f"{config_name}.py")
        run = dataclasses.replace(
            base, mesh=config.Mesh(),
            train=dataclasses.replace(base.train, batch_size=rows, seq_len=positions, micro_batches=1),
            execution=config.Execution(dtype="bfloat16", scan=layers == "scanned"),
        )  # fmt: skip
        key = f"{name}, {way}, {layers}"
        text, found[key] = compiled(run, t, way)
        print(key, found[key], flush=True)
        if a.hlo:
            a.hlo.mkdir(parents=True, exist_ok=True)
            (a.hlo / f"{key.replace(':', ' ')}.txt").write_text(text)
        if a.save != "-":  # after each program, as they take minutes
            what = "train steps from the compiler, in bfloat16 without remat, documents of a row apart; nothing ran"
            versions = environment.environment()["versions"] | compilers()
            save(a.save, {"what": what, "device": t.chip.kind, "found": found, "versions": versions})
    shown = [[key, sum(x["calls"].values()), sum(x["arrays_of_pairs"].values()), f"{x['temporary_bytes'] / 1e9:.2f}",
              "" if x["kept"] is None else f"{x['kept']:.1f}"] for key, x in found.items()]  # fmt: skip
    print(table(shown, ["model, documents by, layers", "fused calls", "arrays of pairs", "temporaries GB", "kept"]))
    mine = [x for key, x in found.items() if ", offsets," in key]
    return 0 if all(x["calls"] and not x["arrays_of_pairs"] for x in mine) else 1


if __name__ == "__main__":
    sys.exit(main())
