"""Chooses how glibc allocates memory in programs that compute on a CPU.

XLA allocates and frees the same large buffers in every step. By default glibc gives them back to the kernel, which maps
and zeroes them anew; a GPT-2 17M step made 192,000 page faults. These settings keep them in the process, on huge pages.
glibc reads them when a process starts, so the command line starts itself anew with them.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLES = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}
CHOICE = "JAXLM_MALLOC"  # "system" leaves the allocator as it is
ACCELERATORS = ("/proc/driver/nvidia", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")


def missing(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables to set for this machine's processes; none where a user chose some of them, where there is
    no glibc, or where an accelerator computes."""
    if environ.get(CHOICE) == "system" or any(name in environ for name in VARIABLES) or not _has_glibc():
        return {}
    if environ.get("JAX_PLATFORMS", "").lower() != "cpu" and any(Path(place).exists() for place in ACCELERATORS):
        return {}
    return dict(VARIABLES)


def describe(environ: Mapping[str, str]) -> str:
    """Returns how memory is allocated, as people read it."""
    if not _has_glibc():
        return "of this system, which has no glibc"
    if chosen := {name: environ[name] for name in VARIABLES if name in environ}:
        return "glibc with " + " ".join(f"{name}={value}" for name, value in chosen.items())
    if missing(environ):
        return f"glibc, tuned by the commands that compute ({CHOICE}=system leaves it as it is)"
    return "glibc as it is"


def restart_tuned() -> None:
    """Starts this process anew with the variables that are missing, if any are. Nothing may have been done yet."""
    if more := missing(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | more)


def _has_glibc() -> bool:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") is not None
    except (AttributeError, ValueError, OSError):
        return False
