"""MaxText's side of `step_time.py`: its own training loop on its synthetic data, and the step times that it reports.

It runs in a Python of its own (`pip install "maxtext[tpu]"`, Python 3.12) and knows nothing of jaxlm.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from shapes import ADAMW, SHAPES
from worker import serve

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["DECOUPLE_GCLOUD"] = "TRUE"
WARM_UP = 3


def settings(shape: str, steps: int, remat: str, folder: str) -> dict[str, object]:
    s = SHAPES[shape]
    if s["family"] != "llama":
        raise SystemExit("MaxText is measured on Llama shapes only")
    return {
        "run_name": "peer", "base_output_directory": folder, "hardware": os.environ["JAX_PLATFORMS"],
        "enable_checkpointing": False, "dataset_type": "synthetic", "log_config": False, "enable_tensorboard": False,
        "metrics_file": f"{folder}/metrics.txt", "jax_cache_dir": "", "skip_jax_distributed_system": True,
        "decoder_block": "llama2", "attention": "dot_product", "remat_policy": remat, "scan_layers": True,
        "base_emb_dim": s["width"], "base_num_query_heads": s["heads"], "base_num_kv_heads": s["kv_heads"],
        "head_dim": s["width"] // s["heads"], "base_mlp_dim": s["ffn"], "base_num_decoder_layers": s["layers"],
        "vocab_size": s["vocab"], "max_target_length": s["seq"], "per_device_batch_size": s["batch"],
        "dtype": s["dtype"], "weight_dtype": "float32", "steps": steps + WARM_UP, "learning_rate": ADAMW["lr"],
        "adam_b1": ADAMW["beta1"], "adam_b2": ADAMW["beta2"], "adam_eps": ADAMW["eps"],
        "adam_weight_decay": ADAMW["weight_decay"], "gradient_clipping_threshold": ADAMW["clip"],
    }  # fmt: skip


def train(shape: str, steps: int, remat: str) -> dict:
    """Seconds of each step after the warm-up, and losses, as MaxText logs them."""
    from importlib.metadata import version

    import maxtext
    from maxtext.trainers.pre_train import train as loop

    with tempfile.TemporaryDirectory() as folder:
        words = [f"{k}={v}" for k, v in settings(shape, steps, remat, folder).items()]
        loop.main(["train", str(Path(maxtext.__file__).parent / "configs" / "base.yml"), *words])
        lines = [json.loads(x) for x in (Path(folder) / "metrics.txt").read_text().splitlines()]
    return {
        "seconds": [x["perf/step_time_seconds"] for x in lines][WARM_UP:],
        "losses": [x["learning/loss"] for x in lines],
        "remat": remat,
        "versions": {name: version(name) for name in ("maxtext", "jax", "flax", "optax")},
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    serve({"train": lambda **more: train(**given, **more)})
