"""Keeps compiled programs for the next start of a command.

JAX does so wherever JAX_COMPILATION_CACHE_DIR says; the command line says it where a user didn't. Programs of unlike
machines or versions of jaxlib never meet: each have a folder of their own. Learning rates, the seed and the like are
data of a training step (`training.optimizers.Numbers`), so that runs which differ in them find each other's program.
"""

import hashlib
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

MOST_BYTES = 4 << 30
VARIABLE = "JAX_COMPILATION_CACHE_DIR"
SWITCH = "JAX_ENABLE_COMPILATION_CACHE"  # JAX's own; false turns it off
SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def folder() -> Path:
    """Returns where programs of this machine and this jaxlib are kept, a folder under ~/.cache/jaxlm."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return caches / "jaxlm" / "compiled" / f"jaxlib-{version('jaxlib')}-{_processor()}"


def use() -> None:
    """Makes JAX keep programs in `folder`, if a user chose nothing else. JAX may not be imported yet."""
    if VARIABLE in os.environ or SWITCH in os.environ:
        return
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
        _forget_oldest(place)
    except OSError:  # a home that can't be written to: nothing is kept
        return
    os.environ[VARIABLE] = str(place)
    os.environ.setdefault(SECONDS, "0.2")


def _forget_oldest(place: Path, most: int = MOST_BYTES) -> None:
    """Deletes the programs that were written longest ago, until the others take half of `most`, if all take more."""
    files = [
        (entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in os.scandir(place) if entry.is_file()
    ]
    total = sum(size for _, size, _ in files)
    if total <= most:
        return
    for _, size, path in sorted(files):
        Path(path).unlink(missing_ok=True)
        total -= size
        if total <= most // 2:
            break


def _processor() -> str:
    """Returns a short name of the processor and what it can do: programs for CPUs are made for exactly that."""
    described = platform.machine() + platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        described += "".join(sorted(set(re.findall(r"^(?:model name|flags|Features)\s*:.*$", info.read_text(), re.M))))
    return hashlib.sha256(described.encode()).hexdigest()[:12]
