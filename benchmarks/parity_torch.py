"""PyTorch's side of `parity.py`: transformers on the directory that ours has exported."""

import json
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional
from worker import serve


def main(folder: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def nats(file: str) -> dict[str, Any]:
        out, start = [], time.perf_counter()
        with torch.inference_mode():
            for row in torch.from_numpy(np.load(file)).long():
                scores = model(row[None]).logits[0, :-1]
                out.append(float(functional.cross_entropy(scores, row[1:])))
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"nats": out, "seconds": time.perf_counter() - start, "versions": versions}

    serve({"nats": nats})


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
