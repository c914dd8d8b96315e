"""Models of a few thousand random weights: in memory, and in Hugging Face directories whose tokenizer is bytes."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.core import spec
from jaxlm.data.tokenizer import Bytes
from jaxlm.formats import huggingface
from jaxlm.models import MODELS

SHAPES = {
    "llama": dict(vocab=264, layers=1, width=16, heads=2, kv_heads=1, head_width=8, ffn=24, positions=64),
    "bert": dict(vocab=264, layers=1, width=16, heads=2, ffn=32, positions=64),
    "t5": dict(vocab=264, layers=1, width=16, heads=2, head_width=8, ffn=32),
}


def published(folder: Path, name: str = "llama", seed: int = 0, **more) -> Path:
    family = MODELS[name]
    c = family.Config(**SHAPES.get(name, {}) | more)
    specs = family.specs(c)
    tokens = folder.parent / "bytes"
    Bytes().save(tokens)
    weights = jax.device_put(random_weights(specs, seed))
    huggingface.save(folder, family, c, specs, weights, dtype="float32", extra_files_from=tokens, card=False)
    return folder


def random_weights(specs: Any, seed: int = 0) -> Any:
    """Weights that NumPy draws, so that nothing is compiled for them; biases and norms too have no special values."""
    rng = np.random.default_rng(seed)

    def one(s: spec.Spec) -> np.ndarray:
        return (rng.standard_normal(s.shape) / 4 + (s.role == "norm")).astype(np.float32)

    return jax.tree.map(one, specs, is_leaf=spec.is_spec)
