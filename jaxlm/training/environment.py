"""Records the versions, hardware and git state that a run was made with."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from jaxlm.runtime import processes
from jaxlm.training.log import replace_file

PACKAGES = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


# Prefixes of variables that change how devices, their network and memory are used.
RECORDED = ("JAX_", "JAXLM_", "XLA_", "LIBTPU_INIT_ARGS", "NCCL_", "TPU_", "MEGASCALE_NUM_SLICES", "CUDA_", "TF_GPU_",
            "GLIBC_TUNABLES", "MALLOC_")  # fmt: skip


# Parts of the names of variables that may hold a host, a path or a secret: these are left out.
PRIVATE = ("ADDRESS", "HOSTNAME", "NCCL_SOCKET_IFNAME", "_KEY", "TOKEN", "_FILE")


def environment() -> dict[str, Any]:
    """Returns what the run runs on, with nothing that names a person, a host or a home folder."""
    devices = jax.devices()
    home = str(Path.home())
    flags = {
        name: value.replace(home, "~") if len(home) > 1 else value
        for name, value in sorted(os.environ.items())
        if name.startswith(RECORDED) and not any(word in name for word in PRIVATE)
    }
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "local_count": jax.local_device_count(),
            "processes": jax.process_count(),
            "launcher": processes.describe_launcher(),
        },
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "count": os.cpu_count()},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "flags": flags,
        "git": _git(Path(__file__).parents[2]),
    }


def write_environment(folder: str | os.PathLike, **extra: Any) -> None:
    """Writes `environment.json` into a run's folder; `extra` adds entries, such as the compiler's options."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    replace_file(Path(folder) / "environment.json", json.dumps(environment() | extra, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def _git(root: Path) -> dict[str, Any] | None:
    """Returns the commit of the checkout that this package runs from; None if it was installed, or git is missing."""
    if not (root / ".git").exists():
        return None
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(status.strip())}
