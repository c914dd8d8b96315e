"""The server listens on an address until it is told to end, and then lets running requests finish."""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette

from jaxlm.core import errors
from jaxlm.inference.server.limits import Limits

BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that listens. ValueError: the address can't be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except socket.gaierror as error:
        raise ValueError(f"host: {host!r} is no address here ({error.strerror}); give one, such as 127.0.0.1") from None
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else errors.one_line(error)
        raise ValueError(
            f"port: {host}:{port} can't be had ({why}); give another one, or 0 for any that is free"
        ) from None


def address(bound: socket.socket) -> str:
    """Returns the address of a socket as a browser takes it."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def settings(app: Starlette, limits: Limits) -> uvicorn.Config:
    """Returns how uvicorn runs the application."""
    return uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_keep_alive=30, lifespan="on", ws="none",
        limit_concurrency=limits.connections, timeout_graceful_shutdown=round(limits.drain_seconds),
        proxy_headers=False,
    )  # fmt: skip


def serve(app: Starlette, bound: socket.socket, limits: Limits, ready: Callable[[], Any]) -> None:
    """Serves until SIGTERM or Ctrl-C, calls `ready` when requests are answered, and returns when the last request has
    ended or its time to do so is over. A second Ctrl-C ends it at once."""
    log_to(sys.stderr)
    server = _Server(settings(app, limits), ready)
    before = {}
    # Once it has drained, uvicorn raises the signal again; that is no error here.
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda *_: None)
    try:
        server.run([bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    """A server that says when it is ready."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], Any]) -> None:
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts, and says so."""
        await super().startup(sockets)
        self.ready()


def log_to(stream: Any) -> None:
    """Writes the server's own lines, with their time, and warnings of the libraries to a stream."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (("jaxlm.server", logging.INFO), ("uvicorn", logging.WARNING)):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(level)
