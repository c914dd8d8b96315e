"""Serving on this machine: throughput and latency at several numbers of clients, over HTTP, beside our own generation
of one answer after the other, `transformers serve` and llama.cpp's server.

    python benchmarks/serve.py MODEL [--peer-python VENV/bin/python] [--llama-python VENV/bin/python]

MODEL is anything that `jaxlm serve` reads. The first peer's Python has torch and `transformers[serving]`, and reads
MODEL's weights in float32 (as ours are); the second has xllamacpp, and reads them in float16 and in Q8_0. Each client
sends the next request when it has the answer to its last one; all send the same prompts, which begin unlike each
other, and get answers of the same length. Each server runs alone, with --threads.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from worker import machine, save, table

import jaxlm
from jaxlm.assembly import convert
from jaxlm.inference import stream
from jaxlm.inference.sampling import Sampling

LLAMA = """
import sys, time
import xllamacpp

path, port, threads, clients, length = sys.argv[1], *map(int, sys.argv[2:])
p = xllamacpp.CommonParams()
p.model.path, p.port, p.hostnames, p.n_parallel, p.n_ctx = path, port, ["127.0.0.1"], clients, clients * length
p.cont_batching, p.warmup, p.verbosity = True, True, -1
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(p)
print("LISTENING", server.listening_address, flush=True)
time.sleep(10**6)
"""


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--peer-python", help="a Python that has torch and transformers[serving]")
    p.add_argument("--llama-python", help="a Python that has xllamacpp")
    p.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    p.add_argument("--requests", type=int, default=2, help="of each client")
    p.add_argument("--tokens", type=int, default=64, help="of each answer")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--transformers-clients", type=int, nargs="+", default=[1, 8])
    p.add_argument("--save", default="serve", help="name under results/ (- : don't save)")
    return p.parse_args()


def prompts(count: int) -> list[str]:
    """Returns prompts of some 40 tokens."""
    return [
        f"{i} people met in a small town by the sea. They wanted to find out how the old lighthouse, which nobody had "
        f"entered for {i + 20} years, could be opened again. The first of them said"
        for i in range(count)
    ]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def server(command: list[str], port: int, name: str, env: dict[str, str] | None = None) -> Iterator[str]:
    """Runs a server until the block ends, which begins when it answers."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | (env or {}))
        try:
            for _ in range(900):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"{name} ended: {log.read()[-3000:]}")
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


async def load(url: str, model: str, clients: int, a: argparse.Namespace, more: dict[str, Any]) -> dict[str, float]:
    """Returns what so many clients see of a server. They parse no more of what comes than they must, since they run on
    the same machine."""
    work = iter(prompts(clients * a.requests))
    first, between, tokens = [], [], 0
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")

    async def one() -> None:
        nonlocal tokens
        for prompt in work:
            body = dict(model=model, prompt=prompt, max_tokens=a.tokens, temperature=0, stream=True,
                        stream_options={"include_usage": True}) | more  # fmt: skip
            raw = json.dumps(body).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n"
            reader, writer = await asyncio.open_connection(host, int(port))
            sent = last = time.perf_counter()
            writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + raw)
            got, text = 0, b""
            while part := await reader.read(1 << 16):
                new, text = part.count(b"data: {"), text + part
                now = time.perf_counter()
                for _ in range(new):
                    (between if got else first).append(now - last if got else now - sent)
                    last, got = now, got + 1
            writer.close()
            if not (used := re.findall(rb'"completion_tokens": ?(\d+)', text)):
                raise RuntimeError(f"{url}: {text[-500:]!r}")
            tokens += int(used[-1])

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    seconds = time.perf_counter() - began
    p = lambda x, q: float(np.percentile(x, q))  # noqa: E731
    return dict(
        tokens_per_s=tokens / seconds, requests_per_s=clients * a.requests / seconds,
        ttft_p50=p(first, 50), ttft_p99=p(first, 99), itl_p50=p(between, 50), itl_p99=p(between, 99),
    )  # fmt: skip


def measure(url: str, model: str, numbers: list[int], a: argparse.Namespace, more: dict[str, Any]) -> dict[str, Any]:
    asyncio.run(load(url, model, 1, argparse.Namespace(**vars(a) | dict(requests=1)), more))  # to be warm
    return {str(n): asyncio.run(load(url, model, n, a, more)) for n in numbers}


def one_by_one(a: argparse.Namespace, p: Any) -> dict[str, Any]:
    """Returns the speed of `jaxlm generate`'s own loop, one answer after the other, in this process."""
    generate = p.generator()
    weights, s = generate.prepare(p.params), Sampling(tokens=a.tokens, banned_ids=tuple(p.eos))
    ids, source = p.prompts(prompts(5))
    seconds = []
    for i, prompt in enumerate(ids):
        began = time.perf_counter()
        stream.answers(generate, p.tokens, weights, [prompt], s, source and [source[i]])
        seconds.append(time.perf_counter() - began)
    return {"1": dict(tokens_per_s=a.tokens / float(np.median(seconds[1:])))}


def main() -> None:
    a = arguments()
    p = jaxlm.open(a.model).pretrained
    found = {"jaxlm, one by one": one_by_one(a, p)}
    length = 256 * -(-(a.tokens + 64) // 256)
    port = free_port()
    command = [sys.executable, "-m", "jaxlm", "serve", a.model, "--port", str(port), "--engine.length", str(length)]
    with server([*command, "--engine.rows", *map(str, a.clients)], port, "jaxlm serve") as url:
        name = json.load(urllib.request.urlopen(f"{url}/models"))["data"][0]["id"]
        found["jaxlm serve"] = measure(url, name, a.clients, a, dict(ignore_eos=True))
    with tempfile.TemporaryDirectory() as folder:
        if a.llama_python:
            for kind in ("f16", "q8_0"):
                file = Path(folder) / f"{kind}.gguf"
                convert.export(p.source.path, file, format="gguf", **({} if kind == "f16" else dict(quantize=kind)))
                arguments_ = [str(file), port, a.threads, max(a.clients), length]
                with server([a.llama_python, "-c", LLAMA, *map(str, arguments_)], port, "llama.cpp") as url:
                    more = dict(ignore_eos=True, cache_prompt=False)
                    found[f"llama.cpp {kind}"] = measure(url, "any", a.clients, a, more)
        if a.peer_python:
            convert.export(p.source.path, Path(folder) / "hf", dtype="float32")
            place, env = str(Path(folder) / "hf"), {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(a.threads)}
            command = [str(Path(a.peer_python).with_name("transformers")), "serve", place, "--port", str(port)]
            for name, more in {"": [], ", continuous batching": ["--continuous-batching"]}.items():
                with server([*command, "--dtype", "float32", *more], port, f"transformers serve{name}", env) as url:
                    found[f"transformers serve{name}"] = measure(url, place, a.transformers_clients, a, {})
    base = found["jaxlm, one by one"]["1"]["tokens_per_s"]
    rows = [
        [name, n, f"{r['tokens_per_s']:.1f}", f"{r['tokens_per_s'] / base:.2f}"]
        + [f"{1e3 * r[k]:.0f}" if k in r else "" for k in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")]
        for name, each in found.items()
        for n, r in each.items()
    ]
    header = ["server", "clients", "tokens/s", "× one by one"]
    print(table(rows, [*header, "TTFT p50, ms", "p99", "a token p50, ms", "p99"]))
    if a.save != "-":
        save(a.save, {"machine": machine(), "model": Path(a.model).name, "tokens": a.tokens, "servers": found})


if __name__ == "__main__":
    main()
