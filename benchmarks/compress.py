"""What making SmolLM2-135M small costs: perplexity and KL on text that no method was calibrated on, before and after.

    python benchmarks/compress.py MODEL.gguf --calibration wikitext2/valid.txt --data wikitext2/test.txt
    python benchmarks/compress.py RUN_DIR --calibration own.py --data another.py --save compress_own   # a model of ours
    python benchmarks/compress.py MODEL.gguf … --rows int8 "int4 g128" --windows 16 --window 256

All rows see the same windows: the first of --data, packed, each read from an empty context. In brackets are 95 %
intervals of a bootstrap over windows. Compressed models stay in --out, finished rows in results/compress.json; the same
command goes on.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from worker import HERE, machine, save, table

from jaxlm.assembly import compress, corpus, scoring
from jaxlm.assembly.compress_report import predictions
from jaxlm.assembly.open_model import Pretrained, open_model, program
from jaxlm.core.compress_request import Calibration, Comparison, Settings
from jaxlm.evaluation import bootstrap

ROWS = {
    "int8": Settings("nearest", format="int8"),
    "int4 g128": Settings("nearest"),
    "magnitude 50 %": Settings("magnitude"),
    "Wanda 50 %": Settings("wanda"),
    "int4 g128 GPTQ": Settings("gptq"),
    "SparseGPT 50 %": Settings("sparsegpt"),
    "Wanda 2:4": Settings("wanda", pattern="2:4"),
    "SparseGPT 2:4": Settings("sparsegpt", pattern="2:4"),
    "magnitude 2:4": Settings("magnitude", pattern="2:4"),
    "int4 g128 AWQ": Settings("awq"),
    "int8 SmoothQuant": Settings("smooth"),
    "SVD, 20 % fewer numbers": Settings("svd", share=0.2),
}


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--calibration", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--calibrated", type=int, default=16, help="rows of the calibration")
    p.add_argument("--window", type=int, default=256, help="tokens of a row and of a window")
    p.add_argument("--windows", type=int, default=16)
    p.add_argument("--out", type=Path, default=Path("runs/compress"))
    p.add_argument("--save", default="compress")
    return p.parse_args()


def measured(a: argparse.Namespace, before: Pretrained, after: Pretrained) -> dict[str, Any]:
    """Returns the perplexities of both, KL(before ‖ after) and the share of the same likeliest token."""
    p = program(before, (a.data,), window=a.window)
    held = scoring.HeldOut(p, corpus.corpus(p.run.data, p.objective, ("valid",)).valid)
    sample = predictions(p, held, before, after, -(-a.windows // p.run.train.batch_size))
    assert sample is not None
    whole, ends = sample.figures(sample.counts_NM.sum(0)[None]), bootstrap.intervals(sample)
    return {name: {"value": float(x[0]), "interval": ends.get(name)} for name, x in whole.items()}


def a_row(a: argparse.Namespace, name: str, before: Pretrained) -> dict[str, Any]:
    settings = ROWS[name]
    folder = a.out / "".join(x if x.isalnum() else "-" for x in name)
    began = time.perf_counter()
    if not folder.is_dir():
        needs = settings.method not in ("nearest", "magnitude")
        c = Calibration((a.calibration,), a.calibrated, a.window, 4) if needs else Calibration()
        compress.compress(a.model, folder, settings, c, Comparison(compare="sizes"))
    record = json.loads((folder / compress.RECORD).read_text("utf-8"))
    seconds = time.perf_counter() - began
    found = measured(a, before, open_model(folder))
    errors = {n: float(np.mean([w[n] / w["power"] for w in record["weights"]])) for n in ("error", "plain_error")}
    sizes = {n: record["comparison"][n] for n in ("bytes_on_disk", "bytes_in_memory")}
    return found | {"layer_errors": errors, **sizes, "seconds": seconds, "calibration": record["calibration"]}


def main() -> None:
    a = arguments()
    file = HERE / "results" / f"{a.save}.json"
    results: dict[str, Any] = json.loads(file.read_text("utf-8"))["results"] if file.is_file() else {}
    before = open_model(a.model)
    for name in a.rows:
        key = f"{name}, {a.windows} windows of {a.window}"
        if key not in results:
            results[key] = a_row(a, name, before)
            about = {"model": a.model.name, "calibrated on": f"{a.calibrated} rows of {a.window} tokens"}
            save(a.save, {"machine": machine(), "about": about, "results": results})
        print(key, results[key]["perplexity"], results[key]["kl"], flush=True)
    shown = [[key, *(_with_ends(r[n]) for n in ("perplexity_before", "perplexity", "kl", "same_top")),
              f"{r['bytes_in_memory'][1] / 1e6:.0f}"] for key, r in results.items()]  # fmt: skip
    print(table(shown, ["row", "original", "perplexity", "KL", "same top", "MB in memory"]))


def _with_ends(x: dict[str, Any]) -> str:
    return f"{x['value']:.4g} [{x['interval'][0]:.4g}, {x['interval'][1]:.4g}]"


if __name__ == "__main__":
    main()
