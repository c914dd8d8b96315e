"""BERT-base as it was trained: masked LM and next-sentence prediction together, 256 sequences of 512 an update."""

from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import bert
from jaxlm.objectives import next_sentence


def config() -> Run:
    return Run(
        name="bert_base",
        model=bert.Config(vocab=30592),
        objective=next_sentence.Config(),
        data=Data(train=("tfds:wiki40b/en",), tokenizer="bert/tokenizer.json", workers=4),
        optim=Optim(lr=1e-4, schedule="linear", warmup=10_000, final=0.0, beta2=0.999, eps=1e-6, weight_decay=0.01),
        train=Train(steps=1_000_000, batch_size=256, seq_len=512, eval_every=5000, eval_batches=64, save_every=5000),
        execution=Execution(dtype="bfloat16"),
    )
