"""Starts or joins a Ray cluster, and finds the server of a run in it. Ray is an optional package, asked for here
alone."""

import importlib.util
import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlm.core import config
from jaxlm.runtime.processes import ProcessError

NAMESPACE = "jaxlm"
POLL = (0.02, 0.5)
"""Seconds between two questions: at first, and at most."""


def ignore_forks() -> None:
    """Lets processes be started without a word: JAX warns of forks, and those that at once become another program are
    safe."""
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)


class Away(Exception):
    """An Away says that there is no server where one is looked for; there may be one soon."""


def need() -> Any:
    """Returns the package. ValueError: it isn't installed."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError('distributed.method: server needs Ray: pip install "jaxlm[ray]"')
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise: on a busy machine a server would hardly ever run
    # A cluster that is started where there is a token asks for it; Ray sends it to one that is named only if told to.
    named = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if named or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    return ray


def connect(address: str, dashboard: bool = False) -> str:
    """Joins the cluster at an address, or starts one on this machine if it is empty; returns the address by which
    others join. ValueError: there is none."""
    ray = need()
    ignore_forks()
    common: dict[str, Any] = dict(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    if address:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ValueError(
                f"address: no Ray cluster answers at {address} ({' '.join(str(error).split())[:200]}); start one with "
                "`ray start --head`, and give this machine the ~/.ray/auth_token of that one if it has one"
            ) from None
    else:
        # One CPU: Ray's own processes are as many as it takes the CPUs to be, and nothing here is scheduled by them.
        ray.init(num_cpus=1, include_dashboard=dashboard, **common)
    return ray.get_runtime_context().gcs_address


def keeper_of(run: config.Run) -> Any:
    """Returns the actor that keeps the book of a run. Away: there is none now."""
    try:
        return need().get_actor(name_of(run))
    except ValueError:
        raise Away(f"no server of {run.name} is in this cluster") from None


def name_of(run: config.Run) -> str:
    """Returns the name that the server of a run has in a cluster."""
    return f"server of {run.name}"


def bounded(what: str, seconds: float, attempt: Callable[[], Any], say: Callable[[str], None] = print) -> Any:
    """Returns what an attempt returns. An attempt that finds the server away is made again until `seconds` have passed.
    ProcessError: it never was there."""
    ray = need()
    began, pause, told = time.monotonic(), POLL[0], False
    while True:
        try:
            return attempt()
        except (ray.exceptions.RayError, Away) as error:
            if time.monotonic() - began > seconds:
                line = " ".join(str(error).split())[:200]
                raise ProcessError(
                    f"{what}: no answer for {seconds:.0f} s ({line}); see whether `jaxlm coordinate` runs"
                ) from None
        if not told and time.monotonic() - began > 5:
            say(f"{what}: no answer; asking for {seconds:.0f} s")
            told = True
        time.sleep(pause)
        pause = min(2 * pause, POLL[1])
