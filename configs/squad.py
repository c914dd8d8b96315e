"""Questions answered by a span of a text (SQuAD 1.1 and 2.0) with a pretrained encoder: two epochs at 3e-5.

jaxlm train squad --start all-MiniLM-L6-v2 --data.train train-v1.1.json --data.valid dev-v1.1.json

Other languages, such as XQuAD's, want an encoder that has read them: --start hf:FacebookAI/xlm-roberta-base learns from
SQuAD's English and answers in all of its hundred (jaxlm eval runs/squad --data xquad.zh.json). In some ten minutes on a
CPU, with a file as small as XQuAD's: --train.steps 250 --train.seq-len 256 --train.batch-size 12 --optim.lr 3e-4
--optim.warmup 25
"""

from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import bert
from jaxlm.objectives import answer


def config() -> Run:
    return Run(
        name="squad",
        model=bert.Config(),  # that of --start takes its place
        objective=answer.Config(),
        data=Data(train=("train-v1.1.json",), valid=("dev-v1.1.json",)),
        optim=Optim(lr=3e-5, schedule="linear", warmup=0, final=0.0, beta2=0.999, weight_decay=0.0),
        train=Train(steps=5500, batch_size=32, seq_len=384, eval_every=2750, save_every=2750, prompts=(),
                    metric="f1", use="best"),  # an epoch of SQuAD 1.1 is about 2,750 steps, of 2.0 4,100
        execution=Execution(dtype="float32"),
    )  # fmt: skip
