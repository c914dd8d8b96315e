"""Decoding with weights of few bits on this machine, in turns: float32, int8 and int4 of every layer's matrices, by the
code for few rows and made dense for each product, and llama.cpp's Q8_0 and Q4_K_M files of the same model.

    python benchmarks/few_bits.py MODEL [--peer-python VENV/bin/python] [--threads 2]

MODEL is anything that `jaxlm.open` reads. The peer's Python has xllamacpp; without it the peer is left out. Each row is
the fastest of several repetitions, which take turns. The table of embeddings and the head stay float32 with us.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from worker import machine, save, table

import jaxlm
from jaxlm.assembly import convert
from jaxlm.core import tree
from jaxlm.core.compression import Format, Nearest
from jaxlm.inference.sampling import Sampling
from jaxlm.nn.kernels import few_bit_matmul
from jaxlm.weights import matrices
from jaxlm.weights.compress.solve import solve

FORMATS = {"float32": None, "int8": Format("int8"), "int4 g128": Format("int4")}
DENSE = ", made dense"  # of rows without the code for few rows
PEERS = ("q8_0", "q4_k_m")
PEER = """
import json, sys
import xllamacpp

for line in sys.stdin:
    path, prompt, tokens, threads = json.loads(line)
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.warmup, p.verbosity = path, 1024, True, -1
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(p)
    asked = dict(prompt=prompt, n_predict=tokens, temperature=0, ignore_eos=True, cache_prompt=False)
    found = server.handle_completions(asked)
    found = json.loads(found) if isinstance(found, (str, bytes)) else found
    t = found["timings"]
    step = t["predicted_ms"] / max(1, t["predicted_n"] - 1)
    print("ANSWER", json.dumps([t["prompt_ms"] / 1e3, step / 1e3]), flush=True)
"""


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--peer-python", help="a Python that has xllamacpp")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    p.add_argument("--tokens", type=int, default=33, help="new ones")
    p.add_argument("--rows", type=int, default=1, help="texts that are written at a time")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--save", default="few_bits", help="name under results/ (- : don't save)")
    return p.parse_args()


def few_bits(model: Any, params: Any, f: Format | None) -> Any:
    """The weights with every matrix of the layers rounded to the nearest numbers of a format."""
    if f is None:
        return params
    for path, m in matrices.select(matrices.matrices(model.family, model.config), ("all",)).items():
        made = jax.jit(partial(solve, Nearest(f), ins=m.ins, outs=m.outs))(tree.at(params, path))
        params = tree.put(params, path, made.weight)
    return params


def ours(a: argparse.Namespace, p: Any, prompt: list[int]) -> dict[str, dict[str, float]]:
    s = Sampling(tokens=a.tokens)
    chosen, dense = few_bit_matmul.choose(), few_bit_matmul.FewBitMatmulChoice("dense", "as asked for by the benchmark")
    print(f"few rows: {chosen.description}")
    by_code, made_dense = p.generator(), p.generator()  # each has programs of its own
    rows = {}
    for name, f in FORMATS.items():
        weights = jax.block_until_ready(by_code.prepare(few_bits(p.model, p.params, f)))
        rows[name] = (weights, by_code, chosen)
        if f is not None and chosen.method == "kernel":
            rows[name + DENSE] = (weights, made_dense, dense)
    found = {name: dict(prefill_s=np.inf, step_s=np.inf, weight_bytes=sum(x.nbytes for x in jax.tree.leaves(w)))
             for name, (w, _, _) in rows.items()}  # fmt: skip
    for _ in range(a.rounds + 1):  # the first compiles
        for name, (w, generator, how) in rows.items():
            with mock.patch.object(few_bit_matmul, "choose", lambda how=how: how):
                started = time.perf_counter()
                state = jax.block_until_ready(generator.start(w, [prompt] * a.rows, s))
                middle = time.perf_counter()
                jax.block_until_ready(generator.advance(w, state, s, a.tokens))
                ended = time.perf_counter()
            row = found[name]
            row["prefill_s"] = min(row["prefill_s"], middle - started)
            row["step_s"] = min(row["step_s"], (ended - middle) / (a.tokens - 1))
    return found


def peers(a: argparse.Namespace, p: Any, prompt: list[int]) -> dict[str, dict[str, float]]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in PEERS:
            file = Path(folder) / f"{kind}.gguf"
            convert.export(p.source.path, file, format="gguf", quantize=kind)
            line = json.dumps([str(file), prompt, a.tokens, a.threads]) + "\n"
            done = subprocess.run([a.peer_python, "-c", PEER], input=line * a.rounds, capture_output=True, text=True)
            told = [json.loads(x.removeprefix("ANSWER ")) for x in done.stdout.splitlines() if x.startswith("ANSWER")]
            assert len(told) == a.rounds, done.stderr[-2000:]
            prefill, step = (min(x[i] for x in told) for i in (0, 1))
            found[f"llama.cpp {kind}"] = dict(prefill_s=prefill, step_s=step, weight_bytes=file.stat().st_size)
    return found


def main() -> None:
    a = arguments()
    p = jaxlm.open(a.model).pretrained
    prompt = np.random.default_rng(0).integers(10, p.model.config.vocab - 10, a.prompt).tolist()
    found = ours(a, p, prompt)
    if a.peer_python:
        found |= peers(a, p, prompt)
    base = found["float32"]
    rows = [
        [name, f"{r['weight_bytes'] / 1e6:.0f}", f"{r['prefill_s'] * 1e3:.0f}", f"{r['step_s'] * 1e3:.2f}",
         f"{base['step_s'] / r['step_s']:.2f}", f"{base['prefill_s'] / r['prefill_s']:.2f}"]
        for name, r in found.items()
    ]  # fmt: skip
    header = ["weights", "MB", f"{a.prompt} tokens read, ms", "a token, ms", "× float32", "reading × float32"]
    print(table(rows, header))
    if a.save != "-":
        save(
            a.save,
            {"machine": machine(), "model": Path(a.model).name, "tokens": a.tokens, "texts": a.rows, "rows": found},
        )


if __name__ == "__main__":
    main()
