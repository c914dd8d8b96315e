"""Our side of `generate.py`: a Hugging Face directory, opened and decoded with."""

import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
from worker import serve

from jaxlm.core import config
from jaxlm.formats import huggingface
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.training import environment


class Ours:
    def __init__(self, folder: str, prompts: list[list[int]], tokens: int, dtype: str) -> None:
        family, c = huggingface.describe(Path(folder), MODELS)
        layout = Layout(execution=config.Execution(dtype=dtype))
        specs = family.specs(c)
        weights = huggingface.load(Path(folder), family, c, specs, layout.shardings(specs, None))
        self.generate = Generator(Model(family, c, specs, layout))
        self.weights = jax.block_until_ready(self.generate.prepare(weights))
        self.bytes = sum(w.nbytes for w in jax.tree.leaves(self.weights))
        self.prompts, self.tokens = prompts, tokens
        self.sampling = {
            "greedy": Sampling(tokens=tokens),
            "top-k": Sampling(tokens=tokens, temperature=0.8, top_k=50),
            "top-p": Sampling(tokens=tokens, temperature=0.8, top_p=0.9),
        }

    def describe(self) -> dict:
        versions = environment.environment()["versions"]
        return {"versions": versions, "device": jax.devices()[0].device_kind, "weight_bytes": self.bytes}

    def first(self, batch: int) -> dict:
        """Compile, and the tokens that greedy decoding makes."""
        started = time.perf_counter()
        s = self.sampling["greedy"]
        found = self.generate(self.weights, self.prompts[:batch], s)
        return {"tokens": [a.tokens for [a] in found], "seconds": time.perf_counter() - started}

    def time(self, batch: int, how: str = "greedy") -> dict:
        """Seconds of the prefill with the first token, and of each later step."""
        s, prompts = self.sampling[how], self.prompts[:batch]
        started = time.perf_counter()
        state = jax.block_until_ready(self.generate.start(self.weights, prompts, s))
        middle = time.perf_counter()
        cache = sum(x.nbytes for x in jax.tree.leaves(state.cache.layers))
        jax.block_until_ready(self.generate.advance(self.weights, state, s, self.tokens))
        ended = time.perf_counter()
        return {"prefill": middle - started, "step": (ended - middle) / (self.tokens - 1), "cache_bytes": cache}

    def bandwidth(self) -> dict:
        """Bytes a second that the cores read together: the dot product of two vectors far larger than any cache."""
        x = np.ones(1 << 26, np.float32)
        y = jax.device_put(x.reshape(1 << 10, -1))
        v = jax.device_put(np.ones((1, 1 << 10), np.float32))
        f = jax.jit(lambda v, y: v @ y)
        jax.block_until_ready(f(v, y))
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            jax.block_until_ready(f(v, y))
            seconds.append(time.perf_counter() - started)
        return {"bytes_per_s": x.nbytes / min(seconds), "median": x.nbytes / statistics.median(seconds)}


if __name__ == "__main__":
    ours = Ours(**json.loads(sys.argv[1]))
    serve({name: getattr(ours, name) for name in ("describe", "first", "time", "bandwidth")})
