"""Named-entity recognition with a pretrained encoder, as usually done: three epochs at 5e-5, falling to 0.

jaxlm train ner --start all-MiniLM-L6-v2 --data.train train.txt --data.valid valid.txt
"""

from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import bert
from jaxlm.objectives import tag


def config() -> Run:
    return Run(
        name="ner",
        model=bert.Config(),  # that of --start takes its place
        objective=tag.Config(),
        data=Data(train=("train.txt",), valid=("valid.txt",)),
        optim=Optim(lr=5e-5, schedule="linear", warmup=0, final=0.0, beta2=0.999, weight_decay=0.0),
        train=Train(steps=1317, batch_size=32, seq_len=128, eval_every=439, save_every=439, prompts=(), metric="f1",
                    use="best"),  # an epoch of CoNLL-2003 is 439 steps
        execution=Execution(dtype="float32"),
    )  # fmt: skip
