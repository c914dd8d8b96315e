"""`jaxlm doctor`: what is installed, what is missing, and the command that mends it. Changes nothing."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxlm.commands.arguments import Command, Done
from jaxlm.core.errors import one_line
from jaxlm.runtime import allocator, compile_cache

Status = Literal["ok", "note", "bad"]
MARKS = {"ok": "green", "note": "yellow", "bad": "bold red"}
CORE = {  # distribution: what is imported
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "optax": "optax",
    "orbax-checkpoint": "orbax.checkpoint",
    "grain": "grain",
    "tensorflow-datasets": "tensorflow_datasets",
    "importlib_resources": "importlib_resources",
    "sentencepiece": "sentencepiece",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "tyro": "tyro",
    "rich": "rich",
}
DEVICES = ("cuda", "tpu")  # extras of machines, which the rows of devices tell of
MIN_DISK_GB = 5.0


@dataclass(frozen=True)
class Row:
    name: str
    status: Status
    found: str
    remedy: str = ""
    """A command or one instruction; empty where nothing is to be done."""


@dataclass(frozen=True)
class Doctor(Command):
    """Lists devices and versions, what is missing, and the command that mends it. Changes nothing.

    example: jaxlm doctor
    """

    def run(self, rest: list[str]) -> Done:
        rows, ok = doctor()
        print_rows(rows)
        return Done({"ok": ok, "findings": [vars(row) for row in rows]}, 0 if ok else 1)


def doctor(*, cache: str | os.PathLike = "~/.cache/jaxlm") -> tuple[list[Row], bool]:
    """Every finding, and whether jaxlm can run here. cache: the folder of data and compile caches."""
    rows = [_python(), *_core(), *_extras()]
    if all(row.status != "bad" for row in rows if row.name in ("jax", "jaxlib")):
        rows += [*_devices(), _matmul(), _few_bits()]
    rows.append(Row("memory allocator", "ok", allocator.describe(os.environ)))
    rows += [_disk(), _writable("cache folder", Path(cache).expanduser()), _compile_cache()]
    return rows, all(row.status != "bad" for row in rows)


def print_rows(rows: list[Row], console: Console | None = None) -> None:
    """Prints a table of the findings, then the remedies on lines of their own, unwrapped, so that they can be copied.

    `console`; None: a new one.
    """
    console = console or Console()
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        table.add_row(Text(row.status, MARKS[row.status]), row.name, Text(row.found))
    console.print(table)
    for row in rows:
        if row.remedy:
            mark = Text(f"{row.status} ", MARKS[row.status])
            console.print(mark.append(f"{row.name}: {row.remedy}", "default"), soft_wrap=True)


# ---- packages


def _python() -> Row:
    return Row("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _declared() -> list[str]:
    """Returns what jaxlm requires, as its metadata has it; nothing for a checkout that isn't installed."""
    try:
        return importlib.metadata.requires("jaxlm") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _requirement(package: str) -> str:
    """`package` with the bound that jaxlm declares."""
    mine = (line for line in _declared() if re.match(rf"{re.escape(package)}\s*([<>=!~;(]|$)", line))
    return next((line.split(";")[0].strip() for line in mine if "extra" not in line), package)


def _too_old(version: str, requirement: str) -> bool:
    def numbers(text: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", text)]

    bound = re.search(r">=\s*([\d.]+)", requirement)
    return bound is not None and numbers(version) < numbers(bound[1])


def _core() -> list[Row]:
    rows = []
    for package, module in CORE.items():
        version = _version(package)
        required = _requirement(package)
        remedy = f'pip install "{required}"'
        if version is None or _too_old(version, required):
            rows.append(Row(package, "bad", "missing" if version is None else f"{version} is too old", remedy))
            continue
        try:  # imported, not just looked up: a broken binary is what people come here for
            importlib.import_module(module)
            rows.append(Row(package, "ok", version))
        except Exception as error:
            rows.append(Row(package, "bad", f"{version}, but {_named_line(error)}", f"{remedy} --force-reinstall"))
    return rows


def _extras() -> list[Row]:
    rows = []
    extras: dict[str, list[str]] = {}
    for line in _declared():
        package, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"](\w+)['\"]", line)
        if package and extra and package[0] != "jaxlm" and extra[1] not in DEVICES:
            extras.setdefault(extra[1], []).append(package[0])
    for name, packages in extras.items():
        missing = [package for package in packages if _version(package) is None]
        if missing:
            rows.append(Row(f"extra: {name}", "note", f"without {', '.join(missing)}", f'pip install "jaxlm[{name}]"'))
        else:
            rows.append(Row(f"extra: {name}", "ok", ", ".join(f"{p} {_version(p)}" for p in packages)))
    return rows


# ---- devices


def _devices() -> list[Row]:
    import jax

    try:
        devices = jax.local_devices()
    except RuntimeError as error:  # a plugin is installed but its accelerator isn't usable
        remedy = "JAX_PLATFORMS=cpu runs without it; else check the driver and reinstall the plugin"
        return [Row("devices", "bad", _named_line(error), remedy)]
    first = devices[0]
    rows = [Row("devices", "ok", f"{len(devices)} × {first.device_kind} ({first.platform}), {_memory(first)}")]
    if first.platform == "cpu":
        asked = os.environ.get("JAX_PLATFORMS")
        for name, found in (("cuda", nvidia_gpus()), ("tpu", tpu_chips())):
            if found:
                remedy = f"unset JAX_PLATFORMS (it is {asked!r})" if asked else f'pip install "jaxlm[{name}]"'
                rows.append(Row("accelerator", "note", f"{found}, but JAX only sees the CPU", remedy))
    return rows


def _memory(device: Any) -> str:
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return f"{stats['bytes_limit'] / 1e9:.0f} GB each"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB of host memory"


def nvidia_gpus(root: Path = Path("/"), smi: str = "nvidia-smi") -> str | None:
    """Names the NVIDIA GPUs of this machine, with or without JAX: by the driver's files, else by its tool; None if
    none."""
    folder = root / "proc/driver/nvidia/gpus"
    names = []
    for info in sorted(folder.glob("*/information")):
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        names.append(lines.get("Model", "NVIDIA GPU").strip())
    if not names and (tool := shutil.which(smi)):
        done = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
        names = [x.split(":")[1].split("(")[0].strip() for x in done.stdout.splitlines() if x.startswith("GPU ")]
    return f"{len(names)} × {names[0]}" if names else None


def tpu_chips(root: Path = Path("/")) -> str | None:
    """Counts TPU chips by the device files of a TPU VM; None if none."""
    chips = [*(root / "dev").glob("accel[0-9]*")]
    if not chips:  # newer ones are on the VFIO bus, told apart by Google's PCI vendor
        vendors = (root / "sys/bus/pci/devices").glob("*/vendor")
        chips = [v for v in vendors if v.read_text().strip() == "0x1ae0"] if (root / "dev/vfio").is_dir() else []
    return f"{len(chips)} TPU chips" if chips else None


def _matmul() -> Row:
    import jax
    import jax.numpy as jnp

    begin = time.perf_counter()
    try:
        result = jax.jit(lambda a: a @ a)(jnp.ones((256, 256), jnp.bfloat16))
        value = float(result.astype(jnp.float32).sum())
    except Exception as error:
        return Row("compile and run", "bad", _named_line(error), "the installed jax and its driver don't fit together")
    if value != 256.0**3:
        return Row("compile and run", "bad", f"256³ came out as {value}", "the device or its driver is faulty")
    return Row("compile and run", "ok", f"a matrix product in {time.perf_counter() - begin:.1f} s")


def _few_bits() -> Row:
    """Multiplies a row by a matrix of int8 as decoding would here."""
    import jax
    import numpy as np

    from jaxlm.nn.kernels import few_bit_matmul

    name, choice = "int8 and int4", few_bit_matmul.choose()
    if choice.method == "dense":
        return Row(name, "note" if choice.remedy else "ok", f"matrices are {choice.description}", choice.remedy)
    codes, ones = np.arange(-90, 90, dtype=np.int8).reshape(9, 20), np.ones(20, np.float32)
    begin = time.perf_counter()
    try:
        result = np.asarray(jax.jit(few_bit_matmul.int8)(ones[None, :9], codes, ones))
    except Exception as error:
        return Row(name, "bad", _named_line(error), "pip uninstall llvmlite; decoding is slower without it")
    if (result != codes.sum(0, dtype=np.float32)).any():
        return Row(name, "bad", "a product came out wrong", "pip uninstall llvmlite; decoding is slower without it")
    seconds = time.perf_counter() - begin
    return Row(name, "ok", f"matrices are {choice.description}; compiled in {seconds:.1f} s")


# ---- disk


def _disk(usage: Callable[[str], Any] = shutil.disk_usage) -> Row:
    free = usage(os.getcwd()).free / 1e9
    if free < MIN_DISK_GB:
        return Row(
            "disk", "note", f"{free:.1f} GB free here", "checkpoints of weights and moments need 12 bytes a weight"
        )
    return Row("disk", "ok", f"{free:.0f} GB free here")


def _compile_cache() -> Row:
    if os.environ.get(compile_cache.SWITCH, "true").lower() in ("false", "0"):
        return Row("compile cache", "note", f"off ({compile_cache.SWITCH})", "leave that out for faster starts")
    folder = os.environ.get(compile_cache.VARIABLE) or str(compile_cache.folder())
    if "://" in folder:
        return Row("compile cache", "note", f"{folder} is not looked at from here")
    return _writable("compile cache", Path(folder).expanduser())


def _writable(name: str, folder: Path) -> Row:
    """Tries the nearest part of the path that exists, so that nothing is left behind."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return Row(name, "ok", f"{folder} is writable" if there == folder else f"{folder} can be made")
    except OSError as error:
        return Row(name, "bad", f"{folder}: {error.strerror}", f"make {there} a writable folder or choose another")


def _named_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error, 200)}"
