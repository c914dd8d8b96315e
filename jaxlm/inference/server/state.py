"""The handlers of one server share a state; how a request's body is read stands here too."""

import asyncio
import time
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest

from jaxlm.inference.server.errors import ApiError
from jaxlm.inference.server.fields import Fields, parse
from jaxlm.inference.server.limits import Limits
from jaxlm.inference.server.metrics import Metrics
from jaxlm.inference.server.service import Service

BODY_SECONDS = 60.0  # in which a request's body must have come


@dataclass
class State:
    """A State holds what is served, the limits and the counters."""

    service: Service
    limits: Limits
    metrics: Metrics
    running: int = 0
    """Requests that are worked on or wait."""
    log_requests: bool = False

    @staticmethod
    def of(request: HttpRequest) -> "State":
        """Returns the state of the server that a request came to."""
        return request.app.state.jaxlm


def arrival(request: HttpRequest) -> float:
    """Returns when a request arrived, in seconds of the monotonic clock."""
    return request.scope.get("jaxlm.arrived", time.monotonic())


async def fields_of(request: HttpRequest) -> Fields:
    """Reads a request's body. Raises an ApiError where it is no JSON object, too large, or slow to come."""
    limits = State.of(request).limits
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # What a page of another site may send without being asked is of other types.
        raise ApiError(415, "content-type: must be application/json")
    return Fields(parse(await _body(request, limits.body_bytes), limits.json_depth))


async def _body(request: HttpRequest, most: int) -> bytes:
    too_large = ApiError(413, f"body: is larger than the {most} bytes that this server allows")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"body: did not come within {BODY_SECONDS:g} s") from None
    return bytes(data)
