"""Translation learned from pairs of sentences alone (Multi30k, English to German): a small Transformer, 20 epochs.

jaxlm train translate --data.train train --data.valid val        # train.en and train.de, line by line
jaxlm eval runs/translate --data test_2016_flickr --metric bleu --beams 5 --tokens 64

In some ten minutes on a CPU: --train.steps 1600 --train.batch-size 16 --optim.warmup 100 --optim.lr 2e-3
--model.layers 2 --model.width 128 --model.ffn 512 --model.dropout 0.1 --data.tokenizer sentencepiece:4096
--model.vocab 4096
"""

from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import bart
from jaxlm.objectives import seq2seq


def config() -> Run:
    return Run(
        name="translate",
        model=bart.Config(vocab=8192, layers=3, width=256, heads=4, ffn=1024, positions=128, norm_first=True,
                          scaled=True, decoder_start=None, dropout=0.2, model_type="mbart"),
        objective=seq2seq.Config(source="en", target="de", label_smoothing=0.1),
        data=Data(train=("train",), valid=("val",), tokenizer="sentencepiece:8192"),
        optim=Optim(lr=1.5e-3, schedule="inverse_sqrt", warmup=400, beta2=0.98, weight_decay=0.0),
        train=Train(steps=2600, batch_size=64, seq_len=64, eval_every=200, save_every=200, prompts=("A dog runs.",),
                    sample_tokens=32, use="best"),  # an epoch is 130 steps: a row holds three pairs or four
        execution=Execution(dtype="float32"),
    )  # fmt: skip
