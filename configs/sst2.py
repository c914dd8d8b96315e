"""Sentiment of sentences (SST-2) with a pretrained encoder, as usually done: three epochs at 2e-5, falling to 0.

jaxlm train sst2 --start all-MiniLM-L6-v2 --data.train train.tsv --data.valid dev.tsv

The files are GLUE's: tabs between `sentence` and `label`, which the first line names. In a few minutes on a CPU:
--train.steps 200 --train.seq-len 48 --optim.lr 1e-4
"""

from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import bert
from jaxlm.objectives import classify


def config() -> Run:
    return Run(
        name="sst2",
        model=bert.Config(),  # that of --start takes its place
        objective=classify.Config(text="sentence"),
        data=Data(train=("train.tsv",), valid=("dev.tsv",)),
        optim=Optim(lr=2e-5, schedule="linear", warmup=0, final=0.0, beta2=0.999, weight_decay=0.0),
        train=Train(steps=6315, batch_size=32, seq_len=128, eval_every=2105, save_every=2105, prompts=(),
                    metric="accuracy", use="best"),  # an epoch of GLUE's 67,349 texts is 2,105 steps
        execution=Execution(dtype="float32"),
    )  # fmt: skip
