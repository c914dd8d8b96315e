"""What matters most of one NVIDIA GPU, in eight minutes and without network: one command, one table, one file.

    python benchmarks/accelerator.py                       # on the GPU machine; needs torch and transformers too
    python benchmarks/accelerator.py --rehearse            # every part on a CPU, with shapes as small as they come
    python benchmarks/accelerator.py --show FILE           # the table of a saved file, of a run that was cut too
    bash benchmarks/accelerator.sh                         # wheels for a machine without network, and its command

Most important first: the device's own ceilings (large bfloat16 products, copies); packed = unpacked rows and fused =
plain attention, without which nothing is timed (status 1); our step and PyTorch's (Hugging Face's model of the same
shape and weights, bfloat16 autocast, fused AdamW, torch.compile, SDPA) at the same batch, GPT-2 124M with 1,024 and
Llama 1B with 4,096 positions, scanned and unrolled; the tests marked `gpu`; the largest batch of each. Each side has a
process of its own, and they take turns where both fit into the device's memory. Of every side: the memory that the
compiler foretold beside the most that was used, and the time by kind of kernel from a trace.

The file is written after each side of each part, so a run that is cut keeps what it had. What no time is left for is
named as skipped; what fails is told with its error, and the rest goes on. `--keep` adds to the parts of an earlier file
those that `--parts` asks for. A rehearsal says so in its file and table, and its figures mean nothing.
Status: 0 done, 1 something failed, 2 there is no GPU.
"""

import argparse
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerator_parts as parts
from accelerator_common import KINDS, Clock, TooLittleTime
from shapes import ADAMW
from worker import machine, table

from jaxlm.runtime import chips

ROOT = Path(__file__).parents[1]
PARTS = ("ceilings", "numerics", "gpt2", "llama", "tests", "llama without mask", "gpt2 largest", "llama largest")
OF_THE_MODEL = {"gpt2": "gpt2-124m", "llama": "llama-1b"}


class NotEqual(Exception):
    """The device computes something else than it should: nothing that follows would mean anything."""


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=8.0, help="of all parts together")
    p.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    p.add_argument("--parts", default=",".join(PARTS), help="those to run, by commas")
    p.add_argument("--keep", action="store_true", help="the other parts that the file already has")
    p.add_argument("--out", type=Path, help="a file, or a folder for it (default: benchmarks/results; of a rehearsal "
                   "the folder for temporary files)")  # fmt: skip
    p.add_argument("--torch-python", default=sys.executable, help="a Python that has torch and transformers")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--show", type=Path, help="print the table of this file, and measure nothing")
    a = p.parse_args()
    a.parts = [x.strip() for x in a.parts.split(",")]
    if unknown := set(a.parts) - set(PARTS):
        p.error(f"--parts: there is no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return a


# ---------------------------------------------------------------------------------------------------------- the record


class Record:
    """All that is known so far, on disk after every change."""

    def __init__(self, a: argparse.Namespace, info: dict[str, Any]) -> None:
        name = re.sub(r"[^a-z0-9]+", "-", info["device"].lower()).strip("-")
        file = f"accelerator-{'rehearsal' if a.rehearse else name}.json"
        usual = Path(tempfile.gettempdir()) if a.rehearse else ROOT / "benchmarks" / "results"
        self.path = a.out or usual
        if self.path.suffix != ".json":
            self.path = self.path / file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.result: dict[str, Any] = {
            "what": "one GPU: ceilings, equality, train step (forward, backward, clip, AdamW) beside PyTorch's",
            "rehearsal": a.rehearse,
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine() | info | {"published_flops_per_s": chips.peak_flops(info["device"])},
            "settings": {"minutes": a.minutes, "parts": a.parts, "threads": a.threads} | ADAMW,
            "parts": json.loads(self.path.read_text())["parts"] if a.keep and self.path.exists() else {},
        }

    def put(self, part: str, value: dict[str, Any]) -> None:
        self.result["parts"][part] = value
        text = json.dumps(self.result, indent=1) + "\n"
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.rename(self.path)


def run(record: Record, bench: parts.Bench, name: str, needs: float, f: Callable[[parts.Put], dict[str, Any]]) -> None:
    """One part. Its status: done, skipped, failed, unequal, or in the file of a run that was cut, running."""
    state: dict[str, Any] = {"status": "running"}
    started = time.monotonic()

    def put(value: dict[str, Any]) -> None:
        state.update(value, seconds=round(time.monotonic() - started, 1))
        record.put(name, state)

    put({})
    try:
        bench.clock.need(needs, name)
        put(f(put))
        put({"status": "done"})
    except (TooLittleTime, TimeoutError) as why:
        put({"status": "skipped", "why": str(why)})
        bench.say(f"SKIPPED {name}: {why}")
    except NotEqual as why:
        put({"status": "unequal", "why": str(why)})
        raise
    except Exception as error:
        put({"status": "failed"} | parts.failure(error))
        bench.say(f"FAILED {name}: {state['error']}")
    else:
        if any("error" in row for row in state.get("rows", {}).values()):
            put({"status": "failed", "error": "see its rows"})


def numerics(bench: parts.Bench, worker: Any, put: parts.Put) -> dict[str, Any]:
    found = parts.numerics(bench, worker)
    put(found)
    bench.say(f"compared: {found['compared']}")
    for name, error in found["raised"].items():
        bench.say(f"FAILED {name}: {error}")
    if found["unequal"]:
        raise NotEqual("not equal on this device: " + "; ".join(found["unequal"]))
    return {"error": f"raised: {', '.join(found['raised'])}"} if found["raised"] else {}


def measure(a: argparse.Namespace, bench: parts.Bench) -> Record:
    worker = bench.start()
    info = parts.device(bench, worker)
    if info["backend"] != "gpu" and not a.rehearse:
        print(f"error: jax finds no GPU here, only {info['device']}; install its CUDA plugin, or --rehearse")
        raise SystemExit(2)
    record = Record(a, info)
    bench.say(f"{info['device']}; results go to {record.path.name}")
    shape = {n: f"{n}-rehearsal" if a.rehearse else full for n, full in OF_THE_MODEL.items()}
    scanned, unrolled, scanned_plain, _ = parts.OURS
    before = lambda n: record.result["parts"].get(n, {})  # noqa: E731
    plan: dict[str, tuple[float, Callable[[parts.Put], dict[str, Any]]]] = {
        "ceilings": (10, lambda put: parts.ceilings(bench, worker)),
        "numerics": (30, lambda put: numerics(bench, worker, put)),
        "gpt2": (50, lambda put: parts.step(bench, shape["gpt2"], [scanned, unrolled, scanned_plain], put)),
        "llama": (60, lambda put: parts.step(bench, shape["llama"], [scanned, unrolled], put)),
        "tests": (20, lambda put: parts.tests(bench)),
        "llama without mask": (50, lambda put: parts.alone(bench, shape["llama"], scanned_plain, before("llama"), put)),
        "gpt2 largest": (60, lambda put: parts.largest(bench, shape["gpt2"], before("gpt2"), put)),
        "llama largest": (80, lambda put: parts.largest(bench, shape["llama"], before("llama"), put)),
    }
    for name in a.parts:
        needs, f = plan[name]
        if name not in ("ceilings", "numerics"):
            bench.drop(worker)
        try:
            run(record, bench, name, 5 if a.rehearse else needs, f)
        except NotEqual as why:
            bench.say(f"REFUSED to go on: {why}")
            break
        finally:
            if name not in ("ceilings", "numerics"):
                bench.drop_all()
    return record


# ----------------------------------------------------------------------------------------------------------- the table


def rows(result: dict[str, Any]) -> list[list[Any]]:
    """One row for each side that was measured, skipped or failed."""
    ceiling = result["parts"].get("ceilings", {}).get("flops_per_s")
    peak = result["machine"].get("published_flops_per_s")
    out: list[list[Any]] = []
    for part in result["parts"].values():
        others = [p["rows"] for p in result["parts"].values() if "rows" in p and p["shape"] == part.get("shape")]
        for side, r in part.get("rows", {}).items():
            label, seconds = f"{part['shape']}, {side}", parts.samples(r)
            if not seconds:
                out.append([label, how(r), *["-"] * (len(HEADER) - 2)])
                continue
            s, memory, kernels = statistics.median(seconds), r["memory"], r.get("kernels", {})
            rate = work(others, r["batch"]) / s
            row = [label, f"{r['batch']} × {r['positions']}", 1e3 * s]
            row += [f"{1e3 * min(seconds):.4g}–{1e3 * max(seconds):.4g}", round(r["batch"] * r["positions"] / s)]
            row += [rate / 1e12, of(rate, ceiling), of(rate, peak), versus_torch(others, side, r)]
            row += [giga(memory.get("compiled")), giga(memory.get("peak"))]
            if "kinds_share" in kernels:
                shares = [*(kernels["kinds_share"][k] for k in (*KINDS, "other")), kernels["idle_share"]]
                row += [percent(x) for x in shares]
            out.append(row + ["-"] * (len(HEADER) - len(row)))
    return out


def how(row: dict[str, Any]) -> str:
    """What became of a side: measured, skipped, failed, or cut with the run."""
    return (
        "skipped" if "skipped" in row else "failed" if "error" in row else "measured" if parts.samples(row) else "cut"
    )


HEADER = ["", "rows × positions", "ms/step", "min–max", "tokens/s", "TFLOP/s", "of ceiling", "of published",
          "time / PyTorch's", "compiled GB", "peak GB", *KINDS, "other", "idle"]  # fmt: skip


def work(others: list[dict[str, Any]], batch: int) -> float:
    """FLOPs of a step by the causal convention, of the peer too, from any row of ours of that shape."""
    known = (r["flops_per_step"] / r["batch"] for rows in others for r in rows.values() if r.get("flops_per_step"))
    return batch * next(known, float("nan"))


def versus_torch(others: list[dict[str, Any]], side: str, mine: dict[str, Any]) -> str | float:
    """Time over PyTorch's with as many rows of the same shape: of the rounds in turns, if there were any."""
    for rows in others:
        for name, peer in rows.items():
            if name.startswith(parts.TORCH) and parts.samples(peer) and peer["batch"] == mine["batch"]:
                turns = mine["seconds"].get(name), peer["seconds"].get(side)
                a, b = turns if all(turns) else (parts.samples(mine), parts.samples(peer))
                return statistics.median(a) / statistics.median(b)
    return "-"


def of(rate: float, whole: float | None) -> str:
    return percent(rate / whole) if whole else "-"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def giga(n: float | None) -> str | float:
    return "-" if n is None else n / 1e9


def show(result: dict[str, Any]) -> None:
    done = result["parts"]
    print()
    if result["rehearsal"]:
        print("A REHEARSAL on a CPU with tiny shapes: these figures mean nothing.")
    print(f"{result['machine']['device']}, {result['machine']['versions']}")
    if "flops_per_s" in (c := done.get("ceilings", {})):
        sizes = ", ".join(f"{n}³ {p['flops_per_s'] / 1e12:.4g}" for n, p in c["products"].items())
        copies = ", ".join(f"{n} {p['bytes_per_s'] / 1e9:.4g}" for n, p in c["copies"].items())
        print(f"ceilings: bfloat16 products, TFLOP/s: {sizes}; bytes read and written, GB/s: {copies}")
    if "compared" in (n := done.get("numerics", {})):
        print(f"equality: {n['compared']}; not equal: {', '.join(n['unequal']) or 'none'}"
              + (f"; raised: {', '.join(n['raised'])}" if n["raised"] else ""))  # fmt: skip
    if "passed" in (t := done.get("tests", {})):
        print(f"tests marked gpu: {t['passed']} passed, {t['failed'] + t['error']} failed, {t['skipped']} skipped")
    for name, part in done.items():
        if part["status"] != "done":
            print(f"{'cut' if part['status'] == 'running' else part['status']}: {name}: "
                  f"{part.get('why') or part.get('error') or 'the run ended here'}")  # fmt: skip
        for side, row in part.get("rows", {}).items():
            if why := row.get("skipped") or row.get("error"):
                print(f"{how(row)}: {name}, {side}: {why}")
    if found := rows(result):
        print("\n" + table(found, HEADER))


def main() -> int:
    a = arguments()
    if a.show:
        show(json.loads(a.show.read_text()))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    roomy = Path("/dev/shm")  # weights of 4 GB pass through here
    place = str(roomy) if os.access(roomy, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        bench = parts.Bench(a, Clock(a.minutes), Path(folder))
        try:
            record = measure(a, bench)
        finally:
            bench.drop_all()
    show(record.result)
    print(f"\nsaved {record.path.name}")
    failed = {n for n, part in record.result["parts"].items() if part["status"] not in ("done", "skipped")}
    return int(bool(failed) or bool(record.result["parts"].get("tests", {}).get("failed")))


if __name__ == "__main__":
    sys.exit(main())
