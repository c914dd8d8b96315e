"""Our side of `step_time.py`: the train step and the training loop as `jaxlm train` has them, on synthetic tokens."""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import rich.console
from shapes import ADAMW, SHAPES
from worker import serve

from jaxlm.assembly import program
from jaxlm.assembly.corpus import Corpus, training_loader
from jaxlm.core import config, config_io, spec, tree
from jaxlm.data.token_cache import Cache
from jaxlm.models import bert, gpt2, llama, t5
from jaxlm.objectives import causal, masked, span_corruption
from jaxlm.training import environment, log, loop
from jaxlm.training.progress import Meter, Progress

OBJECTIVES: dict[str, Any] = {"bert": masked.Config(), "t5": span_corruption.Config()}  # others: causal


def make_run(name: str, overrides: list[str]) -> config.Run:
    s = SHAPES[name]
    sizes = {k: s[k] for k in ("vocab", "layers", "width", "heads")}
    if s["family"] == "gpt2":
        model: Any = gpt2.Config(**sizes, positions=s["seq"])
    elif s["family"] == "bert":
        model = bert.Config(**sizes, ffn=s["ffn"], positions=s["seq"], dropout=0.0)
    elif s["family"] == "t5":
        model = t5.Config(**sizes, ffn=s["ffn"], head_width=s["width"] // s["heads"], dropout=0.0)
    else:
        model = llama.Config(**sizes, kv_heads=s["kv_heads"], head_width=s["width"] // s["heads"], ffn=s["ffn"])
    run: config.Run = config.Run(
        name=name,
        model=model,
        objective=OBJECTIVES.get(s["family"], causal.Config()),
        optim=config.Optim(**ADAMW, schedule="constant", warmup=0),
        train=config.Train(steps=1 << 20, batch_size=s["batch"], seq_len=s["seq"]),
        execution=config.Execution(dtype=s["dtype"]),
    )
    return config_io.override(run, overrides)


def synthetic(vocab: int) -> tuple[Any, Corpus]:
    """One long document of random tokens: a window is one segment, so peers that know no segments compute the same."""
    tokens = np.random.default_rng(0).integers(8, vocab, 1 << 21).astype(np.uint16 if vocab <= 1 << 16 else np.uint32)
    size = np.array([len(tokens)], np.int64)
    cache = Cache(Path(), tokens, np.append(0, size), size, vocab, "synthetic", 0)  # type: ignore[arg-type]
    names = {"bos_id": 1, "eos_id": 2, "cls_id": 3, "sep_id": 4, "pad_id": 0, "mask_id": 5, "id_of": lambda piece: None}
    return SimpleNamespace(vocab_size=vocab, **names), Corpus([cache], [1.0], [])


class Ours:
    """`segments` False leaves the documents of a window out of the batch, so that attention has no mask but the causal
    one: with our one document a window that is the same function, and what peers without documents compute."""

    def __init__(self, shape: str, overrides: list[str] = (), segments: bool = True) -> None:  # type: ignore[assignment]
        self.run = make_run(shape, list(overrides))
        self.segments = segments
        self._assemble()
        self.state = self.program.init()
        self._compile()

    def _assemble(self) -> None:
        reserved = getattr(self.run.objective, "sentinels", 0)  # span corruption puts its marks behind the tokens
        tokens, corpus = synthetic(self.run.model.vocab - reserved)
        self.program = program.program(self.run, tokens)
        self.loader = training_loader(self.run, self.program.objective, corpus, None)
        self.host_batch = self.loader.batch(0)
        if not self.segments:
            del self.host_batch["segments"]
        self.batch = self.program.to_device(self.host_batch, None)
        self.tokens = self.run.train.batch_size * self.run.train.seq_len

    def _compile(self) -> None:
        started = time.perf_counter()
        self.step = self.program.train_step().lower(self.state, self.batch).compile()
        self.compile_s = time.perf_counter() - started

    def resize(self, batch: int) -> None:
        """The same run with another number of rows; its state stays."""
        train = dataclasses.replace(self.run.train, batch_size=batch)
        self.run = dataclasses.replace(self.run, train=train)
        del self.step
        self._assemble()
        self._compile()

    def describe(self) -> dict:
        flops = self.program.flops_per_token()
        memory = self.step.memory_analysis()
        return {
            "parameters": spec.count(self.program.specs),
            "flops_per_step": self.tokens * flops["causal" if self.program.model.family.generates else "full"],
            "notes": self.program.notes,
            "config": config_io.to_dict(self.run),
            "compile_s": self.compile_s,
            "bytes": memory and memory.argument_size_in_bytes + memory.temp_size_in_bytes,
            "versions": environment.environment()["versions"],
            "device": jax.devices()[0].device_kind,
            "backend": jax.default_backend(),
        }

    def export(self, file: str) -> dict:
        """Weights and the batch, for the peer to compute the same from."""
        flat = {f"w/{k}": np.asarray(v) for k, v in tree.flatten(self.state.params).items()}
        np.savez(file, **flat, **{f"b/{k}": v[0] for k, v in self.host_batch.items()})
        return {}

    def steps(self, n: int) -> dict:
        """`n` updates on one batch that lies on the device; waits once, at the end."""
        losses: list[Any] = []
        started, used = time.perf_counter(), time.process_time()
        for _ in range(n):
            self.state, metrics = self.step(self.state, self.batch)
            losses.append(metrics["loss"])
        jax.block_until_ready(self.state)
        times = {"seconds": (time.perf_counter() - started) / n, "cpu_seconds": (time.process_time() - used) / n}
        return times | {"losses": [float(x) for x in losses]}

    def loop(self, n: int) -> dict:
        """`n` updates by the real loop: loader, transfer, step, log. Seconds of each but the first two."""
        times = []
        c = self.run.train
        with tempfile.TemporaryDirectory() as folder, log.RunLog(folder) as out:
            meter = Meter(c.steps, flops=self.program.flops_per_token(), peak=1e12)
            progress = Progress(c.steps, console=rich.console.Console(file=sys.stderr))

            def show(step: int, metrics: dict, data_s: float, step_s: float) -> None:
                times.append(time.perf_counter())
                meter.update(data_s=data_s, step_s=step_s, tokens=self.tokens)
                reading = meter.read()
                progress.update(step, metrics, reading)
                if step % c.log_every == 0:
                    out.train(step, metrics, reading)

            hooks = loop.Hooks(
                batches=self.loader.iterate,
                to_device=lambda batch: self.program.to_device(batch, None),
                step=self.step,
                indices=self.loader.indices,
                log=show,
                validate=lambda step, state: {"loss": 0.0},
                sample=lambda step, state: None,
                save=lambda *_: None,
            )
            every = {"eval_every": 0, "sample_every": 0, "save_every": 0, "patience": 0}
            self.state = loop.train(self.state, hooks, start=0, steps=n, **every).state
        return {"seconds": np.diff(times)[2:].tolist()}

    def matmul(self, n: int) -> dict:
        """FLOP/s of a lone n × n product in the step's dtype, best of several."""
        a = (jax.random.normal(jax.random.key(0), (n, n)) / n**0.5).astype(self.run.execution.dtype)
        f = jax.jit(lambda a, b: a @ b)
        jax.block_until_ready(f(a, a))
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            b = a
            for _ in range(2):
                b = f(a, b)
            jax.block_until_ready(b)
            seconds.append((time.perf_counter() - started) / 2)
        return {"flops_per_s": 2 * n**3 / min(seconds), "median": 2 * n**3 / statistics.median(seconds)}


if __name__ == "__main__":
    ours = Ours(**json.loads(sys.argv[1]))
    serve({name: getattr(ours, name) for name in ("describe", "export", "steps", "loop", "matmul")})
