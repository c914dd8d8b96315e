"""Models and numbers of which llama.cpp made golden files (tests/golden/make_gguf.py)."""

from typing import Any

import numpy as np

from jaxlm.models import MODELS
from jaxlm.nn.moe import Moe

LLAMA, MIXTRAL = MODELS["llama"].Config, MODELS["mixtral"].Config
_SMALL = dict(vocab=32, layers=16, width=256, heads=4, kv_heads=2, head_width=64, ffn=256, positions=64)
_EXPERTS = _SMALL | dict(layers=8, ffn=256)
MIXED: dict[str, tuple[str, Any]] = {
    "llama": ("llama", LLAMA(**_SMALL)),
    "tied": ("llama", LLAMA(**_SMALL, tied=True)),
    "rows of 96": ("llama", LLAMA(**_SMALL | dict(width=96, head_width=24), tied=True)),
    "rows of 48": ("llama", LLAMA(**_SMALL | dict(width=48, head_width=16, heads=3, kv_heads=1))),
    "80 layers": ("llama", LLAMA(**_SMALL | dict(layers=80, width=32, heads=2, kv_heads=1, head_width=16, ffn=32))),
    "8 experts": ("mixtral", MIXTRAL(**_EXPERTS, moe=Moe(experts=8, top_k=2, ffn=256))),
    "4 experts": (
        "mixtral", MIXTRAL(**_EXPERTS, moe=Moe(experts=4, top_k=2, ffn=256), model_type="qwen3_moe", qk_norm=True)
    ),
    "gpt2": (
        "gpt2", MODELS["gpt2"].Config(vocab=32, layers=8, width=256, heads=4, ffn=512, positions=64, dropout=0.0)
    ),
}  # fmt: skip
"""Models whose tensors llama.cpp's types of files mix in different ways."""


def numbers() -> tuple[np.ndarray, np.ndarray]:
    """Rows of numbers as weights have them and as they don't, and the importance of their columns."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((10, 512)) * 0.05
    rows[1] = rng.standard_t(2, 512) * 0.02
    rows[2] = rng.random(512)
    rows[3] = -rng.random(512) - 1
    rows[4, 100:300] = 0
    rows[5, 7] = 40
    rows[6] = np.round(rows[6] * 20) / 20
    rows[7] = 3e-6 * rng.standard_normal(512)
    rows[8] = 500 * rng.standard_normal(512)
    rows[9] = 0.25
    return rows.astype(np.float32), rng.lognormal(0, 1.5, 512).astype(np.float32)
