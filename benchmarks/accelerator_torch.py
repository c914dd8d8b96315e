"""PyTorch's side of `accelerator.py`: `step_torch.py` with another number of rows, its memory and its kernels."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerator_common import guarded, summarize
from step_torch import Peer
from worker import serve


class Side:
    """Commands answer `{"oom": …}` where memory is out; `most`, for rehearsals on a CPU: rows above which it is."""

    peer: Peer

    def prepare(self, shape: str, file: str, batch: int, threads: int, most: int | None) -> dict[str, Any]:
        """Our weights and batch, and the largest halving of `batch` with which a step runs."""
        self.peer, self.most = Peer(shape, file, True, "plain", threads), most
        self.rows = self.peer.batch
        tried: dict[int, str] = {}
        while (error := self.try_rows(batch)) is not None:
            tried[batch] = error
            if batch == 1:
                return {"oom": error}
            batch //= 2
        return self.peer.describe() | {"memory": self.memory(), "losses": self.losses, "tried": tried}

    def try_rows(self, batch: int) -> str | None:
        """Compile for so many of the given rows, over and over if there are fewer, and run four steps. Where memory is
        out: the error, and the last state that ran."""
        at = torch.arange(batch, device=self.peer.device) % len(self.rows[0])
        self.batch, self.peer.batch = batch, tuple(x[at] for x in self.rows)
        torch._dynamo.reset()
        self.peer.loss = torch.compile(self.peer._loss, dynamic=False)
        if self.peer.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            if self.most is not None and batch > self.most:
                raise torch.OutOfMemoryError(f"rehearsed: {batch} rows, as if no more than {self.most} fitted")
            self.losses = self.peer.steps(4)["losses"]
            return None
        except torch.OutOfMemoryError as error:
            message = str(error).split("\n")[0]
        self.peer.optimizer.zero_grad(set_to_none=True)
        return message

    def memory(self) -> dict[str, Any]:
        """Bytes: what rests between steps, the most that tensors took, and the most that was held of the device."""
        empty = {"batch": self.batch, "state": 0, "peak": None, "reserved": None}
        if self.peer.device.type != "cuda":
            return empty
        return {
            "batch": self.batch,
            "state": torch.cuda.memory_allocated(),
            "peak": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
        }

    def steps(self, n: int) -> dict:
        return self.peer.steps(n)

    def kernels(self, n: int) -> dict[str, Any]:
        """Time by kind of kernel, from a trace of `n` steps. Of a CPU: of operators, those inside others too."""
        self.peer.steps(1)
        with torch.profiler.profile() as trace:
            self.peer.steps(n)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            trace.export_chrome_trace(str(file))
            events = json.loads(file.read_text())["traceEvents"]
        wanted = {"kernel", "gpu_memcpy", "gpu_memset"} if self.peer.device.type == "cuda" else {"cpu_op"}
        found = [(e["name"], "", 1e3 * e["ts"], 1e3 * e["dur"]) for e in events if e.get("cat") in wanted]
        return summarize(found, n)


if __name__ == "__main__":
    side = Side()
    serve({n: guarded(getattr(side, n)) for n in ("prepare", "memory", "steps", "kernels")})
