"""GPT-2 124M as it was trained: 1,024 positions, 512 sequences an update. Put your own text in `data.train`.

On one GPU raise `train.micro_batches` until a step fits; on several set `mesh.fsdp`, or leave the default: all of them
share the batch.
"""

from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import gpt2
from jaxlm.objectives import causal


def config() -> Run:
    return Run(
        name="gpt2_124m",
        model=gpt2.Config(vocab=50304, layers=12, width=768, heads=12, positions=1024),
        objective=causal.Config(),
        data=Data(train=("tfds:lm1b",), tokenizer="sentencepiece:50257", workers=4),
        optim=Optim(lr=6e-4, schedule="cosine", warmup=700, final=0.1),
        train=Train(steps=19073, batch_size=512, seq_len=1024, micro_batches=8, eval_every=500, save_every=1000),
        execution=Execution(dtype="bfloat16"),
    )
