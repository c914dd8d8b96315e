"""What every process of `accelerator.py` shares: estimates of memory, kinds of kernels, time that is left. Only the
standard library, as each peer's Python imports it.
"""

import math
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

# ------------------------------------------------------------------------------------------------------------- memory


def parameters(s: dict[str, Any]) -> int:
    """Of a shape's model, near enough to size a batch by."""
    width, kv = s["width"], s["width"] * s.get("kv_heads", s["heads"]) // s["heads"]
    ffn, matrices = (s["ffn"], 3) if "ffn" in s else (4 * width, 2)
    layer = 2 * width * width + 2 * width * kv + matrices * width * ffn
    return s["layers"] * layer + s["vocab"] * width * (1 if s["family"] == "gpt2" else 2)


def estimated_bytes(s: dict[str, Any], batch: int, logits: bool) -> int:
    """Of a train step with AdamW and without remat: state and gradients of 16 bytes a weight and their bfloat16
    copies, a layer's activations in bfloat16, and, where a peer keeps the logits whole, 10 bytes for each."""
    ffn, wide = (s["ffn"], 4) if "ffn" in s else (4 * s["width"], 3)
    token = 2 * s["layers"] * (8 * s["width"] + wide * ffn) + (10 * s["vocab"] if logits else 0)
    return 18 * parameters(s) + batch * s["seq"] * token


def first_batch(s: dict[str, Any], memory: float, share: float = 0.8) -> int:
    """Rows, a power of two, with which PyTorch's step should take less than `share` of the device's memory."""
    batch = 1
    while 1.15 * estimated_bytes(s, 2 * batch, logits=True) <= share * memory:
        batch *= 2
    return batch


def fitting(batch: int, fixed: float, used: float, limit: float) -> int:
    """The largest power of two of rows that should fit, if all but `fixed` of the bytes that `batch` rows took grows
    with the rows."""
    a_row = max(1.0, (used - fixed) / batch)
    return 2 ** max(0, math.floor(math.log2(max(1.0, (limit - fixed) / a_row))))


MEMORY_IS_OUT = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OutOfMemory", re.I)


def guarded(f: Callable[..., Any]) -> Callable[..., Any]:
    """A command that answers `{"oom": …}` where the device's memory was too small, and lets other errors through."""

    def command(**arguments: Any) -> Any:
        try:
            return f(**arguments)
        except Exception as error:
            if MEMORY_IS_OUT.search(f"{type(error).__name__} {error}"):
                return {"oom": str(error).strip().split("\n")[0][:300]}
            raise

    return command


# ------------------------------------------------------------------------------------------------------------ kernels

# The first pattern that is found in a kernel's name, or else in the operation that XLA launched it for, names its kind.
# Inductor's kernels come first: their names go on with all that was fused.
PATTERNS = (
    ("reduction", r"^triton_(red|per)_"),
    ("elementwise", r"^triton_poi_"),
    ("matmul", r"^triton_tem_"),
    ("collective", r"nccl|all[-_]?reduce|all[-_]?gather|reduce[-_]scatter|all[-_]?to[-_]?all|collective|permute"),
    ("attention", r"sdpa|fmha|flash|attention|\bmha"),
    ("matmul", r"gemm|nvjet|cublas|cutlass|xmma|wgmma|(^|[\W_])dot|matmul|::(add|b)?mm\b|addmm|convolution"),
    ("copy", r"memcpy|memset|^copy|[\W_]copy|transpose|concatenate|dynamic[-_](update[-_])?slice|\bslice|pad\b"),
    ("reduction", r"reduc|softmax|norm|cub::|\bsort|argmax"),
    ("elementwise", r"fus(ed|ion)|elementwise|multi_tensor|wrapped_|loop_|convert|broadcast|add|multiply|select|"
     r"compare|divide|exponential|tanh|rsqrt|subtract"),
)  # fmt: skip
RULES = [(kind, re.compile(pattern)) for kind, pattern in PATTERNS]
KINDS = ("matmul", "attention", "elementwise", "reduction", "copy", "collective")


def kind_of(kernel: str, operation: str = "") -> str:
    """matmul, attention, elementwise, reduction, copy, collective or other."""
    names = (kernel.lower(), operation.lower())
    return next((kind for name in names for kind, rule in RULES if rule.search(name)), "other")


def summarize(events: Iterable[tuple[str, str, float, float]], steps: int) -> dict[str, Any]:
    """Of (kernel, operation, start, duration), in nanoseconds: milliseconds a step and share of the traced time of each
    kind, the share in which nothing ran, and the kernels that took longest."""
    events = sorted(events, key=lambda e: e[2])
    if not events:
        raise ValueError("the trace holds no kernel")
    by_kind: dict[str, float] = dict.fromkeys((*KINDS, "other"), 0.0)
    by_name: dict[str, list[Any]] = {}
    busy, end = 0.0, events[0][2]
    for kernel, operation, start, duration in events:
        kind = kind_of(kernel, operation)
        by_kind[kind] += duration
        name = re.sub(r"[._]\d+$", "", kernel)[:100]
        row = by_name.setdefault(name, [name, kind, 0.0, 0])
        row[2] += duration
        row[3] += 1
        busy += max(0.0, start + duration - max(end, start))
        end = max(end, start + duration)
    whole, total = end - events[0][2], sum(by_kind.values())
    top = sorted(by_name.values(), key=lambda r: -r[2])[:20]
    return {
        "steps": steps,
        "traced_ms_per_step": whole / steps / 1e6,
        "idle_share": 1 - busy / whole if whole else 0.0,
        "kinds_ms_per_step": {k: v / steps / 1e6 for k, v in by_kind.items()},
        # Kernels on several streams overlap: each kind has its part of the time in which anything ran.
        "kinds_share": {k: v / total * busy / whole if whole else 0.0 for k, v in by_kind.items()},
        "kernels_per_step": len(events) / steps,
        "longest": [
            {"kernel": n, "kind": k, "ms_per_step": t / steps / 1e6, "calls_per_step": c / steps} for n, k, t, c in top
        ],
    }


# --------------------------------------------------------------------------------------------------------------- time


class TooLittleTime(Exception):
    """A part or a row of it that was not begun, and why."""


class Clock:
    """The time that is left of a run."""

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.end = now, now() + 60 * minutes

    def left(self) -> float:
        return self.end - self.now()

    def within(self, reserve: float = 3.0) -> float:
        """Seconds that one command may take, so that what is known can still be written down."""
        return max(1.0, self.left() - reserve)

    def need(self, seconds: float, what: str) -> None:
        if self.left() < seconds:
            raise TooLittleTime(f"{what} needs about {seconds:.0f} s, and {max(0.0, self.left()):.0f} s are left")
