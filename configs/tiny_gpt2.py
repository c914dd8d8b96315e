"""The GPT-2 form at toy size: a run in under a minute on a CPU."""

from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import gpt2
from jaxlm.objectives import causal


def config() -> Run:
    return Run(
        name="tiny_gpt2",
        model=gpt2.Config(vocab=384, layers=2, width=64, heads=4, positions=128, dropout=0.1),
        objective=causal.Config(),
        data=Data(train=("stdlib",), holdout=0.005, tokenizer="bytes"),
        optim=Optim(lr=3e-3, warmup=10),
        train=Train(steps=60, batch_size=8, seq_len=128, eval_every=30, eval_batches=4, save_every=20),
        execution=Execution(dtype="float32"),
    )
