"""Relations between two entities (SemEval 2010 task 8) with a pretrained encoder: five epochs at 3e-5, falling to 0.

jaxlm train semeval --start all-MiniLM-L6-v2 --data.train TRAIN_FILE.TXT --data.valid TEST_FILE_FULL.TXT

The files are those published; of a table with marked texts say what its columns are, for one without a header line by
--objective.columns e1 e2 label text. In a few minutes on a CPU: --train.steps 160 --train.batch-size 16
--train.seq-len 64 --optim.lr 3e-4 --optim.warmup 16
"""

from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import bert
from jaxlm.objectives import relate


def config() -> Run:
    return Run(
        name="semeval",
        model=bert.Config(),  # that of --start takes its place
        objective=relate.Config(),
        data=Data(train=("TRAIN_FILE.TXT",), valid=("TEST_FILE_FULL.TXT",)),
        optim=Optim(lr=3e-5, schedule="linear", warmup=100, final=0.0, beta2=0.999, weight_decay=0.0),
        train=Train(steps=1250, batch_size=32, seq_len=128, eval_every=250, save_every=250, prompts=(),
                    metric="f1_macro"),  # an epoch of the 8,000 sentences is 250 steps
        execution=Execution(dtype="float32"),
    )  # fmt: skip
