"""Requests run in the engine while somebody waits for them: a client that goes away ends its requests, and so does
time."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxlm.inference.engine import Answering, EngineFull, Piece, Request
from jaxlm.inference.server.errors import ApiError, failed, of_settings
from jaxlm.inference.server.metrics import Metrics
from jaxlm.inference.server.service import Service

T = TypeVar("T")
RETRY_SECONDS = 1
GONE = 499  # the status of a request whose client went away, for logs


class Work:
    """A Work is what one HTTP request asks of the engine: some requests there, whose pieces come as one stream."""

    def __init__(self, answers: Sequence[Answering], requests: Sequence[Request], arrived: float) -> None:
        self.answers, self.requests, self.arrived = list(answers), list(requests), arrived
        self.new_tokens = 0

    def abort(self) -> None:
        """Ends whatever still runs."""
        for answer in self.answers:
            answer.abort()

    @property
    def prompt_tokens(self) -> int:
        """Returns how many tokens were read, each prompt once."""
        return sum(len(r.prompt if r.source is None else r.source) for r in self.requests)

    def usage(self) -> dict[str, Any]:
        """Returns the counts of tokens as clients read them."""
        read, new = self.prompt_tokens, self.new_tokens
        cached = sum(answer.cached for answer in self.answers)
        return dict(prompt_tokens=read, completion_tokens=new, total_tokens=read + new,
                    prompt_tokens_details={"cached_tokens": cached})  # fmt: skip

    async def pieces(self, metrics: Metrics, seconds: float) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yields the number of a request and a piece of an answer to it, of all requests as they come.

        Raises an ApiError after so many seconds since the arrival. Whatever ends the loop early aborts the requests.
        """
        queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

        async def forward(i: int, answer: Answering) -> None:
            try:
                async for piece in answer:
                    queue.put_nowait((i, piece))
                queue.put_nowait((i, None))
            except Exception as error:  # told to the client where it is read
                queue.put_nowait((i, error))

        tasks = [asyncio.create_task(forward(i, answer)) for i, answer in enumerate(self.answers)]
        observed = [metrics.observe(r, self.arrived) for r in self.requests]
        try:
            running = len(tasks)
            while running:
                left = self.arrived + seconds - time.monotonic()
                try:
                    if left <= 0:
                        raise TimeoutError
                    i, piece = await asyncio.wait_for(queue.get(), left)
                except TimeoutError:
                    raise ApiError(504, f"the request took longer than the {seconds:g} s that this server allows",
                                   code="timeout") from None  # fmt: skip
                if isinstance(piece, BaseException):
                    raise piece
                if piece is None:
                    running -= 1
                    continue
                if piece.reason == "error":
                    raise ApiError(500, f"the answer can't go on: {piece.error}", code="answer_failed")
                self.new_tokens += len(piece.tokens)
                observed[i].piece(piece)
                yield i, piece
        finally:
            self.abort()
            for task in tasks:
                task.cancel()
            for one, answer in zip(observed, self.answers, strict=True):
                one.ended(answer)


async def submit(service: Service, requests: Sequence[Request], arrived: float) -> Work:
    """Gives requests to the engine. Raises an ApiError where it refuses one; then none of them goes on."""
    assert service.engine is not None
    answers: list[Answering] = []
    try:
        for request in requests:
            # What an answer must match may take a while to be read, so this is no work for the event loop.
            answers.append(await run_in_threadpool(service.engine.submit, request))
    except BaseException as error:
        for answer in answers:
            answer.abort()
        if isinstance(error, ValueError):
            raise of_settings(error) from None
        if isinstance(error, EngineFull):
            raise ApiError(429, "too many requests wait already; try again later", code="queue_full",
                           retry=RETRY_SECONDS) from None  # fmt: skip
        raise
    return Work(answers, requests, arrived)


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_gone(request: HttpRequest, result: Awaitable[T]) -> T | None:
    """Returns a result, or None where the client went away first; then the work on it is cancelled."""
    work, gone = asyncio.ensure_future(result), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        for task in (work, gone):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(work, gone, return_exceptions=True)


async def whole(request: HttpRequest, result: Awaitable[Response]) -> Response:
    """Returns a response that is made as a whole."""
    response = await until_gone(request, result)
    return Response(status_code=GONE) if response is None else response


class Events(Response):
    """Events are a response of server-sent events, made while they are sent.

    `make(send)` sends them; it is cancelled as soon as the client goes away.
    """

    def __init__(self, make: Callable[[Callable[[str], Awaitable[None]]], Awaitable[None]]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self.make = make

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def event(data: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        async def run() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await self.make(event)
            except ApiError as error:
                await event(to_json(error.body))
            except Exception as error:
                await event(to_json(failed(scope["path"], error, scope["app"].state.jaxlm.log_requests).body))
            await event("[DONE]")
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        work, gone = asyncio.create_task(run()), asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


def to_json(value: Any) -> str:
    """Returns a value as one line of JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
