"""Quantized checkpoints of other packages are read here, dequantized, and weights of few bits written as theirs.

`METHODS` has the layouts by the `quant_method` of config.json.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.core.published_config import PublishedConfig
from jaxlm.formats.quantization import awq, bitsandbytes, compressed_tensors, fp8, gptq, modelopt, mxfp4
from jaxlm.formats.quantization.coded import Coded, Tensors, coded
from jaxlm.formats.quantization.files import QuantizedFiles, Stored, dense
from jaxlm.formats.safetensors import Files, read_json

METHODS: dict[str, Callable[[Mapping[str, Any], Files], dict[str, Stored]]] = {
    "awq": awq.find,
    "bitsandbytes": bitsandbytes.find,
    "compressed-tensors": compressed_tensors.find,
    "fbgemm_fp8": fp8.find,
    "fp8": fp8.find,
    "gptq": gptq.find,
    "modelopt": modelopt.find,
    "mxfp4": mxfp4.find,
}


class Writer(NamedTuple):
    """A Writer lays matrices of few bits out as one method has them."""

    tensors: Callable[[Coded], Tensors]
    written: Callable[[Mapping[str, Coded], Sequence[str]], dict[str, Any]]
    """(matrices by their names, modules that stay plain) → quantization_config."""


WRITERS = {
    "compressed-tensors": Writer(compressed_tensors.tensors, compressed_tensors.written),
    "gptq": Writer(gptq.tensors, gptq.written),
    "awq": Writer(awq.tensors, awq.written),
}
LEFT_OUT = re.compile(r".*\.(q|k|v|kv)_(scale|zero_point|global_scale)")
"""Scales of a key-value cache of few bits, which is none here."""


SIDECARS = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Files beside a config.json in which early AutoGPTQ, AutoAWQ and Model Optimizer said how weights are quantized."""


def settings(values: PublishedConfig, directory: str | Path) -> PublishedConfig | None:
    """Returns what a directory says of its quantized weights, in config.json or a file beside it; None: they are
    plain."""
    found = values.get("quantization_config") or values.get("compression_config")
    for name, kind in SIDECARS.items():
        if not found and (file := Path(directory) / name).is_file():
            found = PublishedConfig({"quant_method": kind, **read_json(file)}, str(file))
    return found or None


def method(q: PublishedConfig) -> str:
    """Returns the method of quantized weights. ValueError: it isn't read."""
    name = q.get("quant_method")
    if name is None and (q.get("load_in_4bit") or q.get("load_in_8bit")):
        name = "bitsandbytes"
    if name is None and "config_groups" in q:
        name = "compressed-tensors"
    if name not in METHODS:
        raise ValueError(
            f"config.json: quantization_config: {name or 'unknown'!r} weights are not read, only "
            f"{', '.join(METHODS)}; bring the unquantised ones"
        )
    return name


def opened(files: Files, q: PublishedConfig) -> QuantizedFiles:
    """Returns the files with a dense tensor in place of those of each quantized matrix. ValueError: they can't be read,
    or don't hold what `quantization_config` says."""
    name = method(q)
    found = METHODS[name](q, files)
    for dense_name, stored in found.items():
        if dense_name in files.entries and dense_name not in stored.tensors:
            raise ValueError(
                f"{files.entries[dense_name].file}: holds {dense_name} beside {stored.tensors[0]}, which stands for "
                "the same weights; fetch the files again"
            )
    left = {n: e for n, e in files.entries.items() if not (found and LEFT_OUT.fullmatch(n))}
    out = dense(Files(files.directory, left), found)
    for other, entry in out.entries.items():
        if other not in found and str(entry.dtype).startswith("float8"):
            raise ValueError(f"{entry.file}: {other} is {entry.dtype} without a scale; fetch the files again")
    if not found and name != "bitsandbytes":  # whose settings may stand in config.json though the weights are plain
        raise ValueError(
            f"{files.directory}: config.json says {name} in quantization_config, but no tensor is stored so; remove "
            "quantization_config if the weights are plain"
        )
    return out


def note(q: PublishedConfig) -> str:
    """Returns a line on how quantized weights are used."""
    return f"{method(q)} weights are read as the float32 numbers that they stand for; inputs and caches stay unrounded"


__all__ = ["METHODS", "WRITERS", "Coded", "QuantizedFiles", "Tensors", "coded", "method", "note", "opened", "settings"]
