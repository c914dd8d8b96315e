"""Shapes that are measured. Plain dicts, so that every peer's Python can read them."""

from typing import Any

SMALL = {"layers": 6, "width": 384, "heads": 6, "vocab": 16384, "batch": 8, "seq": 256, "dtype": "float32"}
LARGE = {"dtype": "bfloat16", "batch": 16, "seq": 1024}
REHEARSAL = {"layers": 2, "width": 64, "heads": 2, "vocab": 512, "batch": 4, "seq": 64, "dtype": "bfloat16"}

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-17m": SMALL | {"family": "gpt2"},
    "bert-17m": SMALL | {"family": "bert", "ffn": 1536},
    "llama-17m": SMALL | {"family": "llama", "kv_heads": 2, "ffn": 1024},
    "t5-25m": SMALL | {"family": "t5", "layers": 3, "ffn": 1024},
    "tiny": {"family": "llama", "layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "ffn": 128, "vocab": 512}
    | {"batch": 8, "seq": 128, "dtype": "float32"},
    # for accelerators
    "gpt2-124m": LARGE | {"family": "gpt2", "layers": 12, "width": 768, "heads": 12, "vocab": 50304},
    "bert-110m": LARGE
    | {"family": "bert", "layers": 12, "width": 768, "heads": 12, "ffn": 3072, "vocab": 30592}
    | {"batch": 32, "seq": 512},
    "llama-1b": LARGE
    | {"family": "llama", "layers": 16, "width": 2048, "heads": 32, "kv_heads": 8, "ffn": 8192}
    | {"vocab": 32000, "batch": 4, "seq": 4096},
    # both as small as they come, for rehearsals of what is meant for accelerators
    "gpt2-rehearsal": REHEARSAL | {"family": "gpt2"},
    "llama-rehearsal": REHEARSAL | {"family": "llama", "kv_heads": 1, "ffn": 128},
}

ADAMW = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}
