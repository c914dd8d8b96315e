"""PyTorch's side of `generate.py`: Hugging Face's `generate` on the same directory; it also makes that directory."""

import json
import sys
import time

import torch
import transformers
from worker import serve


class Peer:
    def __init__(self, folder: str, shape: dict, prompts: list[list[int]], tokens: int, dtype: str, threads: int):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        if shape:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
            model.save_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        self.prompts, self.tokens = prompts, tokens

    def describe(self) -> dict:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"versions": versions, "threads": torch.get_num_threads()}

    def _generate(self, batch: int, tokens: int) -> torch.Tensor:
        ids = torch.tensor(self.prompts[:batch])
        with torch.inference_mode():
            return self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )

    def first(self, batch: int) -> dict:
        started = time.perf_counter()
        made = self._generate(batch, self.tokens)[:, len(self.prompts[0]) :]
        return {"tokens": made.tolist(), "seconds": time.perf_counter() - started}

    def time(self, batch: int) -> dict:
        started = time.perf_counter()
        self._generate(batch, 1)
        middle = time.perf_counter()
        self._generate(batch, self.tokens)
        whole, prefill = time.perf_counter() - middle, middle - started
        return {"prefill": prefill, "step": (whole - prefill) / (self.tokens - 1)}


if __name__ == "__main__":
    peer = Peer(**json.loads(sys.argv[1]))
    serve({name: getattr(peer, name) for name in ("describe", "first", "time")})
