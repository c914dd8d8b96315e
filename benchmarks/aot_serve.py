"""A decode step of the engine compiled for a GPU that isn't here: the bytes that it moves, beside those that it must.

    python benchmarks/aot_serve.py [CONFIG …] [--device h100] [--rows 1 32] [--slots 2048] [--hlo FOLDER]
        [--formats int8 int8:dynamic fp8:dynamic] [--cache int8] [--read 256] [--layers N]

CONFIG is a run's configuration (`configs/llama_1b.py`): the model counts. No weight exists and nothing runs. What must
be moved is every matrix once, in bfloat16 (or in a format of few bits, of the layers), and the keys and values of all
slots once; the bandwidth of the chip makes seconds of both. `--read` also compiles the reading of so many tokens of a
prompt. `products` counts the compiled program's matrix products by the types that they multiply.
`pip install "jax[cuda13]"` brings the compiler.
"""

import argparse
import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from aot_qlora import compilers
from worker import save, table

from jaxlm.core import config, config_io, spec
from jaxlm.core.compression import Compression
from jaxlm.inference.engine.engine import shapes_of
from jaxlm.inference.engine.programs import Programs
from jaxlm.inference.engine.settings import Settings
from jaxlm.models import MODELS
from jaxlm.planning import ahead_of_time, hlo, targets
from jaxlm.runtime import mesh
from jaxlm.training import environment
from jaxlm.weights import matrices


def products(module: hlo.Module) -> dict[str, int]:
    """Returns how many matrix products a program has of each pair of types, such as `s8 × s8`: those of libraries and
    those that are compiled with it."""
    found: Counter[str] = Counter()
    for computation in module.computations.values():
        for i in computation.values():
            target = re.search(r'custom_call_target="__cu(blas|dnn)[^"]*"', i.attributes)
            if i.opcode == "dot" or (i.opcode == "custom-call" and target):
                kinds = [re.match(r"\w+", computation[name].shape) for name in i.operands[:2] if name in computation]
                found[" × ".join(kind[0] for kind in kinds if kind)] += 1
    return dict(found)


def program(run: config.Run, t: targets.Target, rows: int, slots: int, read: int) -> tuple[Any, dict[str, Any]]:
    """Returns the compiled step, or the compiled reading of `read` tokens of a prompt if not 0, and its bytes."""
    with targets.without_driver(t), mesh.on_devices(t.devices()):
        p = ahead_of_time.program_of(run)
        settings = Settings(length=slots, rows=(rows,), lengths=(slots,), pages=0, chunks=(read or 256,))
        params = spec.abstract(p.specs, p.model.shard.shardings(p.specs, None))
        programs = Programs(p.model, params, shapes_of(settings, slots, False, False), p.model.config.vocab, False)
        name = ("read", read, slots) if read else ("step", rows, slots)
        compiled = programs.lowered(*name).compile()
        weights, cache = (
            sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(each))
            for each in (programs.params, programs.described(rows, slots))
        )
    module, memory = hlo.Module(compiled.as_text()), compiled.memory_analysis()
    table_bytes = 0 if p.model.config.tied else p.model.config.vocab * p.model.config.width * 2
    return compiled, dict(
        weight_bytes=weights - table_bytes, cache_bytes=cache, moved_bytes=module.traffic,
        temporary_bytes=memory.temp_size_in_bytes, bandwidth=t.chip.hbm_bandwidth, products=products(module),
    )  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("configs", nargs="*", type=Path, default=[Path(__file__).parents[1] / "configs" / "llama_1b.py"])
    p.add_argument("--device", default="h100")
    p.add_argument("--rows", nargs="+", type=int, default=[1, 32])
    p.add_argument("--slots", type=int, default=2048)
    p.add_argument("--formats", nargs="+", default=[], help="of the layers' matrices, beside bfloat16")
    p.add_argument("--cache", default="dtype", help="how keys and values are stored: dtype, int8 or fp8")
    p.add_argument("--read", type=int, default=0, help="tokens of a prompt that are read at once; 0: the step alone")
    p.add_argument("--layers", type=int, default=0, help="0: as many as the configuration has")
    p.add_argument("--hlo", type=Path, help="folder to write the compiled programs to")
    p.add_argument("--save", default="aot_serve", help="name under results/; - : don't save")
    a = p.parse_args()
    t = targets.parse(f"{a.device}:1x1")
    found: dict[str, Any] = {}
    for file in a.configs:
        base = dataclasses.replace(
            config_io.load(file), mesh=config.Mesh(), execution=config.Execution(dtype="bfloat16", cache=a.cache),
            train=config.Train(batch_size=1, seq_len=a.slots), optim=config.Optim(),
        )  # fmt: skip
        if a.layers:
            base = dataclasses.replace(base, model=base.model.at_depth(a.layers))
        paths = matrices.select(matrices.matrices(MODELS.of(base.model), base.model), ("all",))
        kinds = {"bfloat16": Compression()}
        kinds |= {f: Compression(weights=tuple(f"{path}={f}" for path in paths)) for f in a.formats}
        for kind, compression in kinds.items():
            for rows, read in [*((rows, 0) for rows in a.rows), *([(1, a.read)] if a.read else [])]:
                compiled, one = program(dataclasses.replace(base, compression=compression), t, rows, a.slots, read)
                name = f"{file.stem} {kind} {f'reading {read}' if read else rows} × {a.slots}"
                found[name] = one
                print(name, one, flush=True)
                if a.hlo:
                    a.hlo.mkdir(parents=True, exist_ok=True)
                    (a.hlo / f"{name}.txt").write_text(compiled.as_text())
    header = [
        "step",
        "weights GB",
        "cache GB",
        "moved GB",
        "moved / must",
        "ms by bandwidth",
        "tokens/s at most",
        "products",
    ]
    rows_ = [
        [name, f"{x['weight_bytes'] / 1e9:.2f}", f"{x['cache_bytes'] / 1e9:.2f}", f"{x['moved_bytes'] / 1e9:.2f}",
         f"{x['moved_bytes'] / (x['weight_bytes'] + x['cache_bytes']):.2f}",
         f"{1e3 * x['moved_bytes'] / x['bandwidth']:.2f}",
         f"{int(name.split()[-3]) * x['bandwidth'] / x['moved_bytes']:.0f}",
         ", ".join(f"{n} of {kinds}" for kinds, n in sorted(x["products"].items()))]
        for name, x in found.items()
    ]  # fmt: skip
    print(table(rows_, header))
    if a.save != "-":
        save(a.save, {
            "what": "bytes of a decode step of the engine, read from the compiled program; nothing ran",
            "device": t.chip.kind, "versions": environment.environment()["versions"] | compilers(), "found": found,
        })  # fmt: skip


if __name__ == "__main__":
    main()
