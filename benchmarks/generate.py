"""Text from SmolLM2-135M: ours beside Hugging Face's `generate` on PyTorch, in turns, and beside the memory's speed.

    python benchmarks/generate.py --torch-python TORCH_VENV/bin/python [--model DIRECTORY]

Without --model: random weights of that shape. Greedy tokens of both must agree before anything is timed. The bound: a
step reads all weights and the whole cache once, at the bandwidth that this very run measures.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from worker import Worker, machine, save, table

SMOLLM2 = {
    "vocab_size": 49152, "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5, "initializer_range": 0.04,
}  # fmt: skip


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--torch-python", required=True, help="a Python that has torch and transformers")
    p.add_argument("--model", help="a Hugging Face directory (default: random weights)")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    p.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    p.add_argument("--tokens", type=int, default=64, help="new ones")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--rounds", type=int, default=4)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--save", default="generate", help="name under results/ (- : don't save)")
    return p.parse_args()


def start(a: argparse.Namespace, folder: str) -> dict[str, Worker]:
    draw = random.Random(0)
    prompts = [[draw.randrange(100, 49000) for _ in range(a.prompt)] for _ in range(max(a.batches))]
    given: dict[str, Any] = {"folder": folder, "prompts": prompts, "tokens": a.tokens, "dtype": a.dtype}
    shape = {} if a.model else SMOLLM2
    root = {"PYTHONPATH": str(Path(__file__).parents[1])}
    # The peer first: it writes the directory.
    torch = Worker(a.torch_python, "generate_torch.py", given | {"shape": shape, "threads": a.threads}, {}, a.threads)
    torch.ask("describe")
    ours = Worker(sys.executable, "generate_jaxlm.py", given, root, a.threads)
    ours.ask("describe")
    return {"torch": torch, "jaxlm": ours}


def agreement(workers: dict[str, Worker], batch: int) -> float:
    """Share of places up to and with the first difference, over rows; rounding may part two ways at a near tie."""
    a, b = (workers[name].ask("first", batch=batch)["tokens"] for name in ("torch", "jaxlm"))
    same = [next((i for i, (s, t) in enumerate(zip(x, y, strict=True)) if s != t), len(x)) for x, y in zip(a, b)]  # noqa: B905
    share = sum(same) / sum(map(len, a))
    print(f"batch {batch}: greedy tokens agree up to place {min(same)} of {len(a[0])} in every row ({share:.1%})")
    if min(same) < 4:
        raise SystemExit("jaxlm does not compute what torch does")
    return share


def measure(workers: dict[str, Worker], a: argparse.Namespace, batch: int) -> dict[str, dict[str, list[float]]]:
    kinds = {"torch": ("torch", {}), "jaxlm": ("jaxlm", {})}
    kinds |= {f"jaxlm {how}": ("jaxlm", {"how": how}) for how in ("top-k", "top-p")}
    out: dict[str, dict[str, list[float]]] = {name: {} for name in kinds}
    for _, (worker, more) in kinds.items():
        workers[worker].ask("time", batch=batch, **more)  # compiles, and fetches memory back
    for turn in range(a.rounds):
        for name in list(kinds)[:: -1 if turn % 2 else 1]:
            worker, more = kinds[name]
            for key, value in workers[worker].ask("time", batch=batch, **more).items():
                out[name].setdefault(key, []).append(value)
        out["jaxlm"].setdefault("bandwidth", []).append(workers["jaxlm"].ask("bandwidth")["bytes_per_s"])
        print(
            f"batch {batch}, round {turn + 1}: "
            + "  ".join(f"{n} {1e3 * s['step'][-1]:.4g} ms" for n, s in out.items())
        )
    return out


def main() -> None:
    a, host, rows, results = arguments(), machine(), [], {}
    with tempfile.TemporaryDirectory() as made:
        workers = start(a, a.model or made)
        about = {name: w.ask("describe") for name, w in workers.items()}
        for batch in a.batches:
            share = agreement(workers, batch)
            samples = measure(workers, a, batch)
            mine = samples["jaxlm"]
            read = about["jaxlm"]["weight_bytes"] + mine["cache_bytes"][0]
            bound = read / max(mine["bandwidth"])
            peer = {key: statistics.median(samples["torch"][key]) for key in ("prefill", "step")}
            for name, found in samples.items():
                prefill, step = (statistics.median(found[key]) for key in ("prefill", "step"))
                rows.append([
                    f"{name}, batch {batch}", round(batch * a.prompt / prefill), 1e3 * step, batch / step,
                    peer["prefill"] / prefill, peer["step"] / step, bound / step,
                ])  # fmt: skip
            results[str(batch)] = {"samples": samples, "bytes_per_step": read, "agreement": share}
        for w in workers.values():
            w.close()
    header = ["", "prefill tokens/s", "ms/step", "decode tokens/s", "prefill, × torch", "decode, × torch",
              "of bandwidth bound"]  # fmt: skip
    print(table(rows, header))
    if a.save != "-":
        settings = {"shape": None if a.model else SMOLLM2} | {
            k: getattr(a, k) for k in ("prompt", "tokens", "dtype", "rounds")
        }
        result = {
            "what": "greedy (and sampled) decoding with a key/value cache: seconds of the prefill and of each step",
            "machine": host | {"threads": a.threads}, "settings": settings, "about": about, "batches": results,
            "table": [dict(zip(["row", *header[1:]], row, strict=True)) for row in rows],
        }  # fmt: skip
        print("saved", save(a.save, result).name)


if __name__ == "__main__":
    main()
