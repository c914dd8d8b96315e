"""A 1B Llama shape (Llama 3.2 1B's) at 4,096 positions, weights sharded over all devices."""

from jaxlm import Data, Execution, Mesh, Optim, Run, Train
from jaxlm.models import llama
from jaxlm.nn.rope import Rope
from jaxlm.objectives import causal


def config() -> Run:
    return Run(
        name="llama_1b",
        model=llama.Config(
            vocab=128256,
            layers=16,
            width=2048,
            heads=32,
            kv_heads=8,
            head_width=64,
            ffn=8192,
            positions=4096,
            rope=Rope(theta=5e5),
            tied=True,
        ),
        objective=causal.Config(z_loss=1e-4),
        data=Data(train=("tfds:c4/en",), tokenizer="llama3/tokenizer.json", workers=8),
        optim=Optim(lr=4e-4, schedule="wsd", warmup=2000, final=0.0),
        train=Train(steps=100_000, batch_size=256, seq_len=4096, eval_every=1000, eval_batches=64, save_every=1000),
        mesh=Mesh(fsdp=-1),
        execution=Execution(dtype="bfloat16", remat="dots"),
    )
