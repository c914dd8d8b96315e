"""What keys and values in few bits cost: perplexity, and the divergence from what is computed with them as they are.

    python benchmarks/cache_bits.py MODEL TEXT [--windows 4] [--length 256] [--chunk 32]

Windows of the text are read in chunks, as an engine reads prompts, so that each token attends to stored keys and values
alone. Bytes are those that all layers store of a token.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from worker import machine, save, table

import jaxlm
from jaxlm.inference.decode import prepare
from jaxlm.inference.engine.row_caches import slot_bytes
from jaxlm.models.model import Model
from jaxlm.nn.cache import with_own_ends
from jaxlm.nn.losses import logits

KINDS = ("dtype", "int8", "fp8")


def log_probabilities(model: Model, params: Any, tokens_BT: np.ndarray, chunk: int) -> tuple[np.ndarray, int]:
    """Returns the log probabilities `[B, T, V]` after each token, and the bytes of a token in the cache."""
    B, T = tokens_BT.shape
    cache = with_own_ends(model.init_cache(B, T, model.shard.dtype, T))
    size = slot_bytes(cache.layers)

    @jax.jit
    def read(params: Any, cache: Any, batch: dict[str, jax.Array]) -> Any:
        out = model.forward(params, batch, cache=cache)
        return jax.nn.log_softmax(logits(model.readout(params, out.x_BTD), model.shard)), out.cache

    found = []
    for start in range(0, T, chunk):
        at = jnp.broadcast_to(jnp.arange(start, start + chunk), (B, chunk))
        batch = dict(tokens=tokens_BT[:, start : start + chunk], positions=at, segments=jnp.ones_like(at))
        p_BTV, cache = read(params, cache, batch)
        found.append(np.asarray(p_BTV))
    return np.concatenate(found, 1), size


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("text", type=Path)
    p.add_argument("--windows", type=int, default=4)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--chunk", type=int, default=32)
    p.add_argument("--save", default="cache_bits", help="name under results/ (- : don't save)")
    a = p.parse_args()
    opened = jaxlm.open(a.model).pretrained
    ids = opened.tokens.encode(a.text.read_text(encoding="utf-8")[: 40 * a.windows * a.length])
    tokens_BT = np.array(ids[: a.windows * a.length], np.int32).reshape(a.windows, a.length)
    params = prepare(opened.model, opened.params)
    found: dict[str, dict[str, float]] = {}
    before = np.empty(0)
    for kind in KINDS:
        execution = dataclasses.replace(opened.model.shard.execution, cache=kind)
        model = dataclasses.replace(opened.model, shard=dataclasses.replace(opened.model.shard, execution=execution))
        p_BTV, size = log_probabilities(model, params, tokens_BT, a.chunk)
        own_BT = np.take_along_axis(p_BTV[:, :-1], tokens_BT[:, 1:, None], -1)
        before = p_BTV if kind == "dtype" else before
        kl = (np.exp(before) * (before - p_BTV)).sum(-1).mean()
        same = (before.argmax(-1) == p_BTV.argmax(-1)).mean()
        found[kind] = dict(perplexity=float(np.exp(-own_BT.mean())), kl=float(kl), same_top=float(same), bytes=size)
        print(kind, found[kind], flush=True)
    rows = [[k, f"{x['bytes']:,}", f"{x['perplexity']:.3f}", f"{x['kl']:.5f}", f"{100 * x['same_top']:.2f} %"]
            for k, x in found.items()]  # fmt: skip
    print(table(rows, ["cache", "bytes a token", "perplexity", "KL, nats", "same top token"]))
    if a.save != "-":
        about = dict(model=Path(a.model).name, windows=a.windows, length=a.length, chunk=a.chunk)
        save(a.save, {"machine": machine()} | about | {"found": found})


if __name__ == "__main__":
    main()
