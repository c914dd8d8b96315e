"""A chat model from a pretrained one, by what the assistant says in conversations: three epochs at 2e-5.

jaxlm train chat --start hf:HuggingFaceTB/SmolLM2-135M-Instruct --data.train train.jsonl --data.valid test.jsonl
jaxlm eval runs/chat --metric number --tokens 256        # GSM8K: the last number in the answer counts

Conversations are `messages`, pairs of `prompt` and `completion`, and what else `data/conversations.py` reads, such as
GSM8K's `question` and `answer`. In a few minutes on a CPU, for summaries: --train.steps 12 --train.batch-size 2
--train.seq-len 384 --optim.warmup 2 --optim.lr 1e-4 --execution.dtype float32; in more, for short problems of GSM8K:
--train.steps 120 --train.batch-size 4 --train.seq-len 256 --optim.warmup 10 --optim.lr 1e-4 --execution.dtype float32
"""

from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import llama
from jaxlm.objectives import sft


def config() -> Run:
    return Run(
        name="chat",
        model=llama.Config(),  # that of --start takes its place
        objective=sft.Config(),
        data=Data(train=("train.jsonl",), valid=("test.jsonl",)),
        optim=Optim(lr=2e-5, schedule="cosine", warmup=20, final=0.1, weight_decay=0.0),
        train=Train(steps=600, batch_size=16, seq_len=1024, eval_every=100, save_every=100, prompts=(), use="best"),
        execution=Execution(dtype="bfloat16"),
    )  # GSM8K's 7,473 answers fill about 1,900 rows
