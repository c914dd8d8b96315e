"""Our side of `accelerator.py`: the device's ceilings, its numerics, and the train step with its memory and kernels."""

import glob
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import accelerator_numerics
import jax
import jax.numpy as jnp
from accelerator_common import fitting, guarded, summarize
from step_jaxlm import Ours
from worker import serve

from jaxlm.training import environment

# --------------------------------------------------------------------------------------------------------- the device


def device() -> dict[str, Any]:
    """What runs here. `memory`: bytes that this process may have; None where the device doesn't say (a CPU)."""
    found = jax.devices()[0]
    stats = found.memory_stats() or {}
    return {
        "backend": jax.default_backend(),
        "device": found.device_kind,
        "devices": jax.device_count(),
        "memory": stats.get("bytes_limit"),
        "versions": environment.environment()["versions"],
    }


def _seconds(f: Callable[[Any], Any], x: Any, least: float) -> list[float]:
    """Of one call, many times in a row so that the queue never runs dry; each sample takes about `least` seconds."""
    jax.block_until_ready(f(f(x)))
    started = time.perf_counter()
    jax.block_until_ready(f(x))
    n = max(2, min(200, round(least / max(1e-6, time.perf_counter() - started))))
    samples = []
    for _ in range(5):
        started, y = time.perf_counter(), x
        for _ in range(n):
            y = f(y)
        jax.block_until_ready(y)
        samples.append((time.perf_counter() - started) / n)
    return samples


def ceilings(sizes: list[int], copy_bytes: int, least: float) -> dict[str, Any]:
    """Large bfloat16 products of random numbers, and copies, counting bytes read and bytes written."""
    products = {}
    for n in sizes:
        a = (jax.random.normal(jax.random.key(0), (n, n)) / n**0.5).astype(jnp.bfloat16)
        samples = _seconds(jax.jit(lambda b, a=a: b @ a), a, least)
        products[str(n)] = {"flops_per_s": 2 * n**3 / statistics.median(samples), "seconds": samples}
    x = jax.random.normal(jax.random.key(1), (copy_bytes // 4,), jnp.float32)
    copies = {}
    for name, f in {"copy": jax.jit(jnp.copy), "multiply by a scalar": jax.jit(lambda x: x * 1.0001)}.items():
        samples = _seconds(f, x, least)
        copies[name] = {"bytes_per_s": 2 * x.nbytes / statistics.median(samples), "seconds": samples}
    return {
        "flops_per_s": max(p["flops_per_s"] for p in products.values()),
        "bytes_per_s": max(c["bytes_per_s"] for c in copies.values()),
        "products": products, "copies": copies, "copied_bytes": x.nbytes,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the step


class Side:
    """One way to run one shape. Commands answer `{"oom": …}` where memory is out."""

    ours: Ours

    def prepare(self, shape: str, overrides: list[str], segments: bool, batch: int, limit: float) -> dict[str, Any]:
        """Compile for `batch` rows, or for the most that take less than `limit` bytes if that is fewer."""
        self.ours = Ours(shape, [*overrides, "--train.batch-size", str(batch)], segments)
        tried = self.shrink(limit)
        return self.ours.describe() | {"memory": self.memory(), "tried": tried}

    def shrink(self, limit: float) -> dict[int, int]:
        tried = {}
        while True:
            memory, batch = self.memory(), self.ours.run.train.batch_size
            tried[batch] = memory["compiled"]
            if memory["compiled"] <= limit or batch == 1:
                return tried
            self.ours.resize(min(batch // 2, fitting(batch, memory["state"], memory["compiled"], limit)))

    def resize(self, batch: int) -> dict[str, Any]:
        self.ours.resize(batch)
        return {"memory": self.memory()}

    def memory(self) -> dict[str, Any]:
        """Bytes: what the compiler says a step takes, of that its state and batch, and the most that was in use so far
        in this process, which the step decides once it has run."""
        m = self.ours.step.memory_analysis()
        stats = jax.devices()[0].memory_stats() or {}
        compiled = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
        return {
            "batch": self.ours.run.train.batch_size,
            "compiled": compiled,
            "state": m.argument_size_in_bytes,
            "temporary": m.temp_size_in_bytes,
            "code": m.generated_code_size_in_bytes,
            "peak": stats.get("peak_bytes_in_use"),
            "reserved": stats.get("bytes_reserved"),
            "limit": stats.get("bytes_limit"),
        }

    def export(self, file: str) -> dict:
        return self.ours.export(file)

    def steps(self, n: int) -> dict:
        return self.ours.steps(n)

    def kernels(self, n: int) -> dict[str, Any]:
        """Time by kind of kernel, from a trace of `n` steps."""
        self.ours.steps(1)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                self.ours.steps(n)
            (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
            return summarize(list(traced(file)), n)


def traced(file: str) -> Iterator[tuple[str, str, float, float]]:
    """(kernel, operation, start, duration) of a trace: of a GPU what its streams ran, of a CPU the operations of XLA's
    threads, without those that only hold others."""
    for plane in jax.profiler.ProfileData.from_file(file).planes:
        gpu = plane.name.startswith("/device:GPU")
        for line in plane.lines:
            if not (line.name.startswith("Stream") if gpu else line.name.startswith("tf_XLA")):
                continue
            for e in line.events:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # the binding's own, about its iterator
                    operation = str(dict(e.stats).get("hlo_op", ""))
                if gpu or (operation and not e.name.startswith(("end: ", "while", "call", "conditional"))):
                    yield e.name, operation, e.start_ns, e.duration_ns


if __name__ == "__main__":
    side = Side()
    commands = {n: getattr(side, n) for n in ("prepare", "resize", "memory", "export", "steps", "kernels")}
    commands |= {"device": device, "ceilings": ceilings, "numerics": accelerator_numerics.check}
    serve({name: guarded(f) for name, f in commands.items()})
