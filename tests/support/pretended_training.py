"""Stands in for `jaxlm train` in tests of sweeps, which start it by their `launcher`: writes the log of a run directory
by a formula, in no time, and can be stopped and go on as the real one.

    python pretended_training.py ANY -m jaxlm train RUN_DIR

The loss falls with the steps towards how far the rate is from 0.01 in powers of ten, and rates above 1 aren't finite. A
batch of 13 is refused, one of 14 dies of SIGKILL. `JAXLM_TEST_SECONDS` is what a validation takes.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    folder = Path(sys.argv[-1])
    run = json.loads((folder / "config.json").read_text())
    rate, batch, train = run["optim"]["lr"], run["train"]["batch_size"], run["train"]
    with (folder / "starts").open("a") as file:
        file.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES', '-')}\n")
    if batch == 13:
        print("jaxlm: train.batch_size: 13 rows don't divide", file=sys.stderr)
        return 2
    if batch == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    noted: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))
    log = folder / "metrics.jsonl"
    before = [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []
    with log.open("a") as file:

        def write(**line: Any) -> None:
            file.write(json.dumps(line | {"time": {"unix": time.time()}}) + "\n")
            file.flush()

        for step in range(max(before, default=-1) + 1, train["steps"] + 1):
            if rate > 1 and step == 2:
                write(kind="event", name="stopped", step=step, reason=f"step {step}: loss nan")
                return 1
            if step % train["eval_every"] == 0:
                loss = (math.log10(rate) + 2) ** 2 + 1 / (1 + step) + run["seed"] / 1000
                write(kind="valid", step=step, loss=loss, score=loss)
                time.sleep(float(os.environ.get("JAXLM_TEST_SECONDS", "0")))
            if noted:
                print(f"interrupted after step {step}; saved")
                return 1
        write(kind="event", name="end", step=train["steps"], reason="finished", used=train["steps"])
    (folder / "checkpoints").mkdir(exist_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
