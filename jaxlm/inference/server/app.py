"""The application: paths, their handlers, and what becomes of errors."""

import contextlib
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from jaxlm.inference.server import chat, completions, others
from jaxlm.inference.server.errors import ApiError
from jaxlm.inference.server.guard import Access, Guard
from jaxlm.inference.server.limits import Limits
from jaxlm.inference.server.metrics import Metrics
from jaxlm.inference.server.running import GONE
from jaxlm.inference.server.service import Service
from jaxlm.inference.server.state import State

PAGE = {
    "index.html": "text/html; charset=utf-8", "chat.css": "text/css; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8", "answer.js": "text/javascript; charset=utf-8",
    "markdown.js": "text/javascript; charset=utf-8", "icon.svg": "image/svg+xml",
}  # fmt: skip
POSTS: dict[str, Callable[[Request], Any]] = {
    "/v1/chat/completions": chat.answer, "/v1/completions": completions.answer, "/v1/embeddings": others.embeddings,
    "/v1/classify": others.classify, "/tokenize": others.tokenize, "/detokenize": others.detokenize,
}  # fmt: skip
GETS: dict[str, Callable[[Request], Any]] = {
    "/v1/models": others.models, "/v1/models/{name:path}": others.models, "/tokenizer_info": others.tokenizer_info,
    "/health": others.health, "/metrics": others.metrics,
}  # fmt: skip


def make_app(
    service: Service, limits: Limits | None = None, access: Access | None = None, *, page: bool = True,
    log_requests: bool = False,
) -> Starlette:  # fmt: skip
    """Returns the application that serves a model. It drains and closes the engine when it ends.

    `page` is whether the chat page stands at `/`; `log_requests`, whether errors of our own are logged with their
    messages, which may hold what a request said.
    """
    limits, access = limits or Limits(), access or Access()
    state = State(service, limits, Metrics(service), log_requests=log_requests)
    routes = [Route(path, handler, methods=["POST"]) for path, handler in POSTS.items()]
    routes += [Route(path, handler, methods=["GET"]) for path, handler in GETS.items()]
    if page:
        routes.append(Route("/", _page("index.html"), methods=["GET"]))
        routes += [Route(f"/page/{name}", _page(name), methods=["GET"]) for name in PAGE if name != "index.html"]
    middleware = [Middleware(Guard, state=state, access=access, asked=POSTS)]
    if access.origins:
        methods, shown = ["GET", "POST"], ["x-request-id", "retry-after"]
        cors: dict[str, Any] = dict(allow_methods=methods, allow_headers=["*"], expose_headers=shown)
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=list(access.origins), **cors))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            if service.engine is not None:
                await run_in_threadpool(service.engine.drain, limits.drain_seconds)
                await run_in_threadpool(service.engine.close)
            service.close()

    handlers = {ApiError: _told, HTTPException: _refused, ClientDisconnect: _gone}
    app = Starlette(routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers=handlers)
    app.state.jaxlm = state
    return app


def _page(name: str) -> Callable[[Request], Any]:
    """Returns a handler that gives one file of the page; no path of a request names a file."""
    data = (resources.files("jaxlm.inference.server") / "page" / name).read_bytes()

    async def give(request: Request) -> Response:
        return Response(data, media_type=PAGE[name], headers={"cache-control": "no-cache"})

    return give


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is nothing at this path", 405: "this path does not go with this method"}
    response = ApiError(error.status_code, what.get(error.status_code, error.detail)).response()
    response.headers.update(error.headers or {})
    return response


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)
