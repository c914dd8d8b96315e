"""Checks every request before it reaches a handler: its host, site and key, and how many others there are."""

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxlm.inference.server.errors import ApiError, failed
from jaxlm.inference.server.running import GONE, RETRY_SECONDS
from jaxlm.inference.server.state import State

LOG = logging.getLogger("jaxlm.server")
OPEN = ("/health",)  # paths that need no key
GRACE = 5.0  # seconds after its own deadline in which a request may still tell that it was too slow
_ID = re.compile(r"[\w.:-]{1,128}")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
SAFE = {
    "content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
    "x-frame-options": "DENY", "cross-origin-opener-policy": "same-origin",
}  # fmt: skip


@dataclass(frozen=True)
class Access:
    """An Access says who may come in: with which keys, by which host names, from pages of which other sites."""

    keys: tuple[str, ...] = ()
    """Empty: no key is asked for."""
    hosts: tuple[str, ...] = ()
    """Names that requests may call the server by; empty: any. Where only this machine reaches it, these keep pages away
    that make their own name point here."""
    origins: tuple[str, ...] = ()
    """Other sites whose pages may ask: `https://chat.example`, or `*`."""


class Guard:
    """A Guard is the outermost part of the application."""

    def __init__(self, app: ASGIApp, state: State, access: Access, asked: Collection[str]) -> None:
        self.app, self.state, self.access, self.limited = app, state, access, frozenset(asked)
        self.keys = [_digest(key.encode()) for key in access.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        arrived = scope["jaxlm.arrived"] = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        number = given if _ID.fullmatch(given) else uuid.uuid4().hex
        status = [0]

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = number
                for name, value in SAFE.items():
                    out.setdefault(name, value)
                out.setdefault("cache-control", "no-store")
            await send(message)

        try:
            await self._admitted(scope, headers, receive, tell)
        except ApiError as error:
            await error.response()(scope, receive, tell)
        except TimeoutError:
            if status[0]:
                LOG.warning("%s: the client reads too slowly; its connection is closed", number)
            else:
                slow = ApiError(504, f"the request took longer than {self.state.limits.seconds:g} s", code="timeout")
                await slow.response()(scope, receive, tell)
        except Exception as error:
            told = failed(scope["path"], error, self.state.log_requests)
            if not status[0]:
                await told.response()(scope, receive, tell)
        finally:
            if status[0] != GONE or LOG.isEnabledFor(logging.DEBUG):
                # Neither the prompt nor the query stands here; a path is cut, for strangers choose it.
                LOG.info("%s %s %s %.3f s %s", scope["method"], ascii(scope["path"][:100])[1:-1], status[0],
                         time.monotonic() - arrived, number)  # fmt: skip

    async def _admitted(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        path, state = scope["path"], self.state
        self._check_host(headers)
        self._check_origin(headers)
        if path not in OPEN and scope["method"] != "OPTIONS":
            self._check_key(headers, path)
        if path not in self.limited:
            await self.app(scope, receive, send)
            return
        if state.running >= state.limits.requests:
            raise ApiError(429, f"{state.running} requests are worked on or wait; try again later", code="overloaded",
                           retry=RETRY_SECONDS)  # fmt: skip
        state.running += 1
        try:
            async with asyncio.timeout(state.limits.seconds + GRACE):
                await self.app(scope, receive, send)
        finally:
            state.running -= 1

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
        if self.access.hosts and name.lower() not in self.access.hosts:
            raise ApiError(
                403, "host: this server is not called by that name; it answers to this machine alone", "host"
            )

    def _check_origin(self, headers: Headers) -> None:
        """Refuses pages of other sites, even those that a browser lets send requests whose answers it then hides."""
        origin = headers.get("origin")
        if origin is None or origin in self.access.origins or "*" in self.access.origins:
            return
        if urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
            raise ApiError(403, "origin: pages of other sites may not ask this server", "origin")

    def _check_key(self, headers: Headers, path: str) -> None:
        if not self.keys:
            return
        kind, _, value = headers.get("authorization", "").partition(" ")
        given = (value.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")).encode("latin-1")
        if kind.lower() == "basic":  # browsers ask for a user and a password; the password is the key
            given = _password(value)
        found = _digest(given)
        same = [hmac.compare_digest(found, key) for key in self.keys]  # all, each in one time whatever was given
        if not any(same):
            what = "wrong API key" if given else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, what, code="invalid_api_key", page=path == "/")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _password(value: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


def local_hosts(host: str) -> tuple[str, ...]:
    """Returns the names that a server on a loopback address is called by; empty where others may reach it."""
    local = ("localhost", "127.0.0.1", "[::1]", "::1")
    return (*local, host) if host in local or host.startswith("127.") else ()
