"""Writes tests/golden/gguf: what llama.cpp's own quantizer makes of the rows of tests/support/gguf_rows.py.

Run it with the folder of llama.cpp's libraries, such as that of the npm package @node-llama-cpp/linux-x64:
`PYTHONPATH=. python tests/golden/make_gguf.py FOLDER`. The tests read the files and need none of it.
"""

import ctypes
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import gguf_rows

from jaxlm.core.spec import is_spec
from jaxlm.formats import gguf_file_types, gguf_quants, gguf_write
from jaxlm.models import MODELS

HERE = Path(__file__).parent / "gguf"
WEIGHTED = [("llama", file_type) for file_type in ("q4_0", "q5_0", "q4_k_m")]  # are asked with importance, too


class Entry(ctypes.Structure):
    """llama_model_imatrix_data."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class Parameters(ctypes.Structure):
    """llama_model_quantize_params, and room for what later versions append."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("ftype", ctypes.c_int32),
        ("types", ctypes.c_int32 * 2),
        ("flags", ctypes.c_bool * 8),
        ("imatrix", ctypes.c_void_p),
        ("rest", ctypes.c_char * 480),
    )


def libraries(folder: Path) -> tuple[Any, Any]:
    base, _, llama = (
        ctypes.CDLL(str(next(iter(sorted(folder.glob(name))))), mode=ctypes.RTLD_GLOBAL)
        for name in ("libggml-base*", "libggml.*", "libllama.*")
    )
    llama.llama_model_quantize_default_params.restype = Parameters
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    return base, llama


def kinds(llama: Any, file: Path, file_type: str, weighted: bool) -> dict[str, str]:
    """The kind of numbers that llama.cpp gives most matrices of a file, and the tensors that have others."""
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = int(gguf.LlamaFileType[gguf_file_types.FILE_TYPES[file_type][1]])
    entries = (Entry * 2)(Entry(b"no tensor", 0, 0), Entry(None, 0, 0))
    if weighted:
        parameters.imatrix = ctypes.addressof(entries)
    out = file.with_suffix(".out")
    assert llama.llama_model_quantize(str(file).encode(), str(out).encode(), ctypes.byref(parameters)) == 0
    by_kind: dict[str, list[str]] = {}
    for t in gguf.GGUFReader(out).tensors:
        if t.tensor_type.name != "F32":
            by_kind.setdefault(t.tensor_type.name, []).append(t.name)
    most = max(by_kind, key=lambda kind: len(by_kind[kind]))
    return {"most": most} | {kind: " ".join(sorted(names)) for kind, names in by_kind.items() if kind != most}


def mixtures(llama: Any) -> None:
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name, (family_name, c) in gguf_rows.MIXED.items():
        family = MODELS[family_name]
        specs = family.specs(c)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), specs, is_leaf=is_spec)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "x.gguf"
            gguf_write.save(file, family, c, specs, zeros)
            for file_type in gguf_file_types.QUANTIZED:
                for weighted in (False, True) if (name, file_type) in WEIGHTED else (False,):
                    made = kinds(llama, file, file_type, weighted)
                    found.setdefault(name, {})[file_type + " weighted" * weighted] = made
                    print(name, file_type, made["most"], flush=True)
    (HERE / "mixtures.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def blocks(base: Any) -> None:
    rows, importance = gguf_rows.numbers()
    made = {}
    for kind, k in gguf_quants.KINDS.items():
        for name, weights in ((kind, None), (f"{kind} weighted", importance)):
            out = np.zeros((len(rows), rows.shape[1] // k.size * k.nbytes), np.uint8)
            base.ggml_quantize_chunk(
                ctypes.c_int(int(gguf.GGMLQuantizationType[kind])), ctypes.c_void_p(rows.ctypes.data),
                ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(0), ctypes.c_int64(len(rows)),
                ctypes.c_int64(rows.shape[1]), ctypes.c_void_p(None if weights is None else weights.ctypes.data),
            )  # fmt: skip
            made[name] = out
    np.savez_compressed(HERE / "blocks.npz", **made)


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    ggml, llama_cpp = libraries(Path(sys.argv[1]))
    blocks(ggml)
    mixtures(llama_cpp)
