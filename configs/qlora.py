"""A chat model of 7B or 8B on one GPU of 24 GB: LoRA over weights of four bits, as QLoRA's authors tune.

jaxlm train qlora --start hf:meta-llama/Llama-3.1-8B --data.train train.jsonl --data.valid valid.jsonl
jaxlm export runs/qlora adapter --format peft            # or --format hf: merged

In a few minutes on a CPU with SmolLM2-135M: --train.steps 20 --train.batch-size 4 --train.seq-len 256
--train.micro-batches 1 --optim.warmup 2 --execution.dtype float32
"""

from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import llama
from jaxlm.objectives import sft
from jaxlm.weights.adapters import Lora


def config() -> Run:
    return Run(
        name="qlora",
        model=llama.Config(),  # that of --start takes its place
        objective=sft.Config(),
        data=Data(train=("train.jsonl",), valid=("valid.jsonl",)),
        optim=Optim(lr=2e-4, schedule="constant", warmup=10, beta2=0.999, clip=0.3, weight_decay=0.0),
        adapter=Lora(base="nf4", targets=("all",), rank=64, alpha=16.0, dropout=0.1),
        train=Train(steps=1000, batch_size=16, micro_batches=16, seq_len=1024, eval_every=200, save_every=200,
                    prompts=(), use="best"),
        execution=Execution(dtype="bfloat16", remat="full"),
    )  # fmt: skip
