"""What a checkpoint costs: time that training is blocked, time to disk, time back, beside the disk's own speed.

    python benchmarks/checkpoint.py --shapes gpt2-17m gpt2-124m --folder /a/disk/to/measure

"blocked" is the time inside `Checkpoints.save`; "cost" is how much longer training takes with a save in the background
than without, in turns. The disk's rate is that of a plain file of the same size: written, synced; read back after its
pages were dropped from memory. 1 GB is 10⁹ bytes.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from shapes import SHAPES
from step_jaxlm import Ours
from worker import machine, save, table

from jaxlm.assembly import run_directory
from jaxlm.formats.checkpoint import Checkpoints


def seconds(f: Callable[[], Any]) -> float:
    started = time.perf_counter()
    f()
    return time.perf_counter() - started


def forget(folder: Path) -> None:
    """Drop a folder's pages from the page cache, so that reading it reads the disk."""
    for path in [folder] if folder.is_file() else [p for p in folder.rglob("*") if p.is_file()]:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def disk(folder: Path, size: int) -> tuple[float, float]:
    """(write with sync, read) bytes a second of one plain file."""
    path, block = folder / "plain", np.random.default_rng(0).bytes(16 << 20)

    def write() -> None:
        with open(path, "wb", buffering=0) as file:
            for start in range(0, size, len(block)):
                file.write(block[: size - start])
            os.fsync(file.fileno())

    def read() -> None:
        with open(path, "rb", buffering=0) as file:
            while file.read(16 << 20):
                pass

    written = seconds(write)
    forget(path)
    back = seconds(read)
    path.unlink()
    return size / written, size / back


def measure(ours: Ours, folder: Path, rounds: int, steps: int) -> dict[str, list[float]]:
    """Samples in seconds, but for the disk's rates."""
    size = sum(x.nbytes for x in jax.tree.leaves(ours.state))
    out: dict[str, list[float]] = {k: [] for k in ("disk_write", "disk_read", "blocked", "save", "restore", "cost")}
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        for turn in range(rounds + 1):
            write, read = disk(folder, size)

            def start(number: int) -> None:
                checkpoints.save(number, run_directory.saved(ours.state, ours.program.adapter), {"step": number})

            began = time.perf_counter()
            blocked = seconds(lambda: start(2 * turn + 1))  # noqa: B023  called at once
            checkpoints.wait()
            whole = time.perf_counter() - began
            forget(folder)
            wanted = run_directory.saved(ours.program.abstract_state(), ours.program.adapter)
            back = seconds(lambda: jax.block_until_ready(checkpoints.restore(wanted)))  # noqa: B023
            quiet = ours.steps(steps)["seconds"] * steps
            busy = seconds(lambda: (start(2 * turn + 2), ours.steps(steps)))  # noqa: B023
            checkpoints.wait()
            sample = (write, read, blocked, whole, back, busy - quiet)
            if turn:  # the first round warms up
                for name, value in zip(out, sample, strict=True):
                    out[name].append(value)
            print("  ".join(f"{k} {v:.4g}" for k, v in zip(out, sample, strict=True)), flush=True)
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", default=["gpt2-17m", "gpt2-124m"], choices=SHAPES)
    p.add_argument("--folder", help="where to write (default: the system's folder for temporary files)")
    p.add_argument("--rounds", type=int, default=4)
    p.add_argument("--steps", type=int, default=12, help="training steps while a save is under way")
    p.add_argument("--save", default="checkpoint", help="name under results/; - : don't save")
    a = p.parse_args()
    host, found, rows = machine(), {}, []
    small = ["--train.batch_size", "1", "--train.seq_len", "128", "--execution.dtype", "float32"]  # many short steps
    for shape in a.shapes:
        ours = Ours(shape, small if jax.default_backend() == "cpu" else [])
        size = sum(x.nbytes for x in jax.tree.leaves(ours.state))
        with tempfile.TemporaryDirectory(dir=a.folder) as folder:
            samples = measure(ours, Path(folder), a.rounds, a.steps)
        typical = {k: statistics.median(v) for k, v in samples.items()}
        write, read = typical["disk_write"], typical["disk_read"]
        found[shape] = {"bytes": size, "samples": samples, "median": typical}
        rows.append([
            shape, size / 1e9, typical["blocked"], typical["cost"],
            typical["save"], size / typical["save"] / 1e9, write / 1e9, size / typical["save"] / write,
            typical["restore"], size / typical["restore"] / 1e9, read / 1e9, size / typical["restore"] / read,
        ])  # fmt: skip
    header = ["state of", "GB", "blocked s", "cost s", "save s", "GB/s", "disk GB/s", "of disk",
              "restore s", "GB/s", "disk GB/s", "of disk"]  # fmt: skip
    print(table(rows, header))
    if a.save != "-":
        about = {"device": jax.devices()[0].device_kind, "versions": ours.describe()["versions"]}
        what = "checkpoint of weights and AdamW state: seconds blocked, extra seconds of training, to disk, and back"
        save(a.save, {"what": what, "machine": host | about, "settings": {"steps": a.steps}, "results": found})


if __name__ == "__main__":
    main()
