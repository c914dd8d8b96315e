"""A model of programs from a pretrained one, by reading Python: what follows each token of your files is learned.

jaxlm train code --start hf:HuggingFaceTB/SmolLM2-135M --data.train src/**/*.py
jaxlm eval runs/code --code HumanEval.jsonl --run-generated-code --samples 20 --k 1,10 --temperature 0.2 --top-p 0.95

Without --data.train it reads the standard library of your Python. In a few minutes on a CPU: --train.steps 12
--train.batch-size 4 --train.seq-len 256 --train.eval-batches 2 --optim.warmup 2 --execution.dtype float32
"""

from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import llama
from jaxlm.objectives import causal


def config() -> Run:
    return Run(
        name="code",
        model=llama.Config(),  # that of --start takes its place
        objective=causal.Config(),
        data=Data(train=("stdlib",)),
        optim=Optim(lr=2e-5, schedule="cosine", warmup=20, final=0.1, weight_decay=0.0),
        train=Train(steps=1000, batch_size=16, seq_len=1024, eval_every=200, save_every=200,
                    prompts=("def add(a, b):",), use="best"),  # the standard library is about 600 steps
        execution=Execution(dtype="bfloat16"),
    )  # fmt: skip
