"""ModernBERT at toy size, masked LM on packed text: a run in under a minute on a CPU."""

from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import modernbert
from jaxlm.objectives import masked


def config() -> Run:
    return Run(
        name="tiny_modernbert",
        model=modernbert.Config(vocab=384, layers=4, width=64, heads=4, ffn=96, positions=128, window=17),
        objective=masked.Config(rate=0.3),
        data=Data(train=("stdlib",), holdout=0.005, tokenizer="bytes"),
        optim=Optim(lr=2e-3, warmup=10),
        train=Train(steps=60, batch_size=8, seq_len=128, eval_every=30, eval_batches=4, save_every=20),
        execution=Execution(dtype="float32"),
    )
