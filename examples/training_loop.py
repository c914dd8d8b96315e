"""Trains with a loop of one's own: state, batches and the jitted step are plain parts.

python examples/training_loop.py
"""

import shutil
from pathlib import Path

import jaxlm

HERE = Path(__file__).parent


def main(out: str = "runs", steps: int = 30) -> jaxlm.RunDirectory:
    run = jaxlm.load(
        "tiny_llama",
        name="own_loop",
        out=out,
        data={"train": (str(HERE),), "holdout": 0.3, "cache": f"{out}/cache"},
        train={"steps": steps, "batch_size": 8, "seq_len": 64},
        optim={"lr": 3e-3, "warmup": 2},
    )
    shutil.rmtree(run.folder, ignore_errors=True)  # of an earlier go at this example
    program = jaxlm.Program(run)
    state = program.init()
    for number, batch in zip(range(1, steps + 1), program.batches(), strict=False):
        state, metrics = program.step(state, batch)  # the old state is given up
        if number % 10 == 0:  # reading a metric waits for the step, so not every time
            print(f"step {number}: loss {float(metrics['loss']):.3f}")
    print("validation:", {name: round(value, 3) for name, value in program.validate(state).items()})
    folder = program.save(state)
    print(f"saved to {folder.path}; go on with: jaxlm generate {folder.path} --prompt 'def '")
    return folder


if __name__ == "__main__":
    main()
