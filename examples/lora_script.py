"""Fine-tunes a model with LoRA, watches the loss, and writes the merged model for transformers.

python examples/lora_script.py MODEL TEXT    # for example hf:HuggingFaceTB/SmolLM2-135M mine.jsonl
python examples/lora_script.py               # adapts a tiny model that it makes first
"""

import shutil
import sys
from pathlib import Path

import jaxlm
from jaxlm.weights.adapters import Lora

HERE = Path(__file__).parent


def main(model: str, text: str, out: str = "runs", steps: int = 20) -> list[float]:
    losses: list[float] = []
    run = jaxlm.load(
        "tiny_llama",
        start=model,  # whose architecture and tokenizer the run takes
        name="lora_script",
        out=out,
        adapter=Lora(rank=8),
        data={"train": (text,), "holdout": 0.3, "cache": f"{out}/cache"},
        train={"steps": steps, "batch_size": 8, "seq_len": 64, "prompts": ()},
        optim={"lr": 1e-2, "warmup": 2},
    )
    merged = Path(out) / "lora_script-merged"
    for earlier in (run.folder, merged):  # of an earlier go at this example
        shutil.rmtree(earlier, ignore_errors=True)
    folder = jaxlm.train(run, on_step=lambda step, metrics: losses.append(metrics["loss"]))
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
    print(*folder.open().save(merged), sep="\n")
    return losses


if __name__ == "__main__":
    if sys.argv[2:]:
        main(*sys.argv[1:3])
    else:
        import training_loop

        main(str(training_loop.main().path), str(HERE))
