"""Train a small Llama on Python's own standard library, on any machine: `jaxlm train configs/quickstart.py`.

On two CPU cores about ten minutes. Ends with the validation text's bits per byte beside gzip's and xz's.
"""

from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import llama
from jaxlm.objectives import causal


def config() -> Run:
    return Run(
        name="quickstart",
        model=llama.Config(vocab=8192, layers=4, width=128, heads=2, kv_heads=2, head_width=64, ffn=344, positions=512),
        objective=causal.Config(),
        data=Data(train=("stdlib",), holdout=0.02, tokenizer="sentencepiece:8192", compare_compression=True),
        optim=Optim(name="muon", lr=8e-3, muon_lr=0.02, schedule="wsd", decay=0.5, final=0.05, warmup=20),
        train=Train(steps=2250, batch_size=8, seq_len=256, eval_every=750, save_every=750, sample_tokens=96),
        execution=Execution(dtype="float32"),
    )
