"""T5 at toy size on bytes, with the long spans that suit them (Xue et al. 2022): a run in under a minute on a CPU."""

from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import t5
from jaxlm.objectives import span_corruption


def config() -> Run:
    return Run(
        name="tiny_t5",
        model=t5.Config(vocab=384, layers=2, width=64, heads=4, head_width=16, ffn=128, decoder_start=None),
        objective=span_corruption.Config(span=20.0),
        data=Data(train=("stdlib",), holdout=0.005, tokenizer="bytes"),
        optim=Optim(lr=3e-3, warmup=10),
        train=Train(steps=60, batch_size=8, seq_len=128, eval_every=30, eval_batches=4, save_every=20, prompts=()),
        execution=Execution(dtype="float32"),
    )
