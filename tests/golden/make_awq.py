"""Writes tests/golden/quantized/awq.npz: matrices that AutoAWQ packed in each of its layouts.

Run it where torch is installed, with the folder `awq` of AutoAWQ's sources (its last version needs an old transformers,
so that only the modules of its layouts are imported): `python tests/golden/make_awq.py SOURCES`.
"""

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent / "quantized"
LAYOUTS = {"gemm": "WQLinear_GEMM", "gemv": "WQLinear_GEMV", "gemv_fast": "WQLinear_GEMVFast"}
OUTS, INS, GROUP = 32, 128, 64


def sources(folder: str) -> None:
    """Makes AutoAWQ's modules importable without what its packages import."""
    for name in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(folder).joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    for name, members in {"awq.utils.module": ("try_import",), "awq.utils.utils": ("get_best_device",)}.items():
        stub = types.ModuleType(name)
        for member in members:
            setattr(stub, member, {"try_import": lambda _: (None, ""), "get_best_device": lambda: "cpu"}[member])
        sys.modules[name] = stub


def main() -> None:
    sources(sys.argv[1])
    rng, made = np.random.default_rng(0), {}
    codes, zeros = rng.integers(0, 16, (OUTS, INS)), rng.integers(0, 16, (OUTS, INS // GROUP))
    scales = (rng.random((OUTS, INS // GROUP)) * 0.05 + 0.01).astype(np.float16)
    dense = (codes - np.repeat(zeros, GROUP, 1)) * np.repeat(scales.astype(np.float32), GROUP, 1)
    linear = torch.nn.Linear(INS, OUTS, bias=False)
    linear.weight.data = torch.from_numpy(dense.astype(np.float32))
    for layout, name in LAYOUTS.items():
        cls = getattr(importlib.import_module(f"awq.modules.linear.{layout}"), name)
        s, z = torch.from_numpy(scales), torch.from_numpy(zeros).to(torch.float16)
        if layout == "gemm":
            s, z = s.T.contiguous(), z.T.contiguous()
        packed = cls.from_linear(linear, 4, GROUP, scales=s.float(), zeros=z.float())
        made |= {f"{layout}.{last}": getattr(packed, last).numpy() for last in ("qweight", "qzeros", "scales")}
    np.savez_compressed(HERE / "awq.npz", dense=dense.astype(np.float32), **made)
    print({name: (x.dtype, x.shape) for name, x in made.items()})


if __name__ == "__main__":
    main()
