"""Strict JAX for every test: eight CPU devices, no silent rank or dtype promotion."""

import os
import signal
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

from jaxlm.runtime import mesh, processes

processes.reserve_threads()
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "float32")
jax.config.update("jax_disable_most_optimizations", True)  # most of the tests' time is compilation

# A shell starts background jobs with Ctrl-C ignored, and Python then never raises KeyboardInterrupt: tests mean it to.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_device() -> Iterator[None]:
    """Programs are made for one device, which compiles much faster than for eight."""
    with mesh.on_devices(jax.devices()[:1]):
        yield
