"""An 8B Llama shape (Llama 3's) at 8,192 positions: weights sharded over all devices, 2-way tensor parallel."""

from jaxlm import Data, Execution, Mesh, Optim, Run, Train
from jaxlm.models import llama
from jaxlm.nn.rope import Rope
from jaxlm.objectives import causal


def config() -> Run:
    return Run(
        name="llama_8b",
        model=llama.Config(
            vocab=128256,
            layers=32,
            width=4096,
            heads=32,
            kv_heads=8,
            head_width=128,
            ffn=14336,
            positions=8192,
            rope=Rope(theta=5e5),
        ),
        objective=causal.Config(z_loss=1e-4),
        data=Data(train=("tfds:c4/en",), tokenizer="llama3/tokenizer.json", workers=8),
        optim=Optim(lr=3e-4, schedule="cosine", warmup=2000, final=0.1),
        train=Train(steps=250_000, batch_size=512, seq_len=8192, eval_every=1000, eval_batches=32, save_every=1000),
        mesh=Mesh(fsdp=-1, tensor=2),
        execution=Execution(dtype="bfloat16", remat="full"),
    )
