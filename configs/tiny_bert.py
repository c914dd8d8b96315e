"""BERT at toy size, masked LM and next-sentence prediction together: a run in under a minute on a CPU."""

from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import bert
from jaxlm.objectives import next_sentence


def config() -> Run:
    return Run(
        name="tiny_bert",
        model=bert.Config(vocab=384, layers=2, width=64, heads=4, ffn=128, positions=128),
        objective=next_sentence.Config(),
        data=Data(train=("stdlib",), holdout=0.005, tokenizer="bytes"),
        optim=Optim(lr=2e-3, warmup=10),
        train=Train(steps=60, batch_size=8, seq_len=128, eval_every=30, eval_batches=4, save_every=20),
        execution=Execution(dtype="float32"),
    )
