"""Summaries of dialogues (DialogSum) with a pretrained encoder-decoder: five epochs at 3e-5, falling to 0.

jaxlm train summarize --start hf:facebook/bart-base --data.train train.jsonl --data.valid dev.jsonl
jaxlm eval runs/summarize --metric rouge --beams 4 --tokens 100

In minutes on a CPU a small chat model says more: `chat`, from pairs of `prompt` (what to do, and the dialogue) and
`completion` (the summary), and jaxlm eval runs/chat --metric rouge. A small model from nothing learns the form and
little more: --train.steps 150 --optim.lr 1e-3 --optim.warmup 20 --data.tokenizer sentencepiece:4096 --model.vocab 4096
--model.layers 2 --model.width 128 --model.heads 4 --model.ffn 512 --train.seq-len 256
"""

from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import bart
from jaxlm.objectives import seq2seq


def config() -> Run:
    return Run(
        name="summarize",
        model=bart.Config(decoder_start=None),  # that of --start takes its place
        objective=seq2seq.Config(source="dialogue", target="summary", target_len=128, label_smoothing=0.1, pack=False),
        data=Data(train=("train.jsonl",), valid=("dev.jsonl",)),
        optim=Optim(lr=3e-5, schedule="linear", warmup=200, final=0.0, beta2=0.999, weight_decay=0.01),
        train=Train(steps=3900, batch_size=16, seq_len=512, eval_every=780, save_every=780, prompts=(), use="best"),
        execution=Execution(dtype="float32"),
    )
