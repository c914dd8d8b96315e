"""Errors are told as OpenAI's interface tells them: status, message, type, field and code."""

import logging
import re
import traceback
from typing import Any

from starlette.responses import JSONResponse

LOG = logging.getLogger("jaxlm.server")
TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error",
    429: "rate_limit_error", 503: "server_error", 504: "timeout_error",
}  # fmt: skip
# Our settings by the fields of a request that they come from.
FIELDS = {
    "tokens": "max_tokens", "samples": "n", "stop_ids": "stop_token_ids", "json_schema": "response_format",
    "regex": "structured_outputs",
}  # fmt: skip


class ApiError(Exception):
    """An ApiError is what a client did wrong, or what can't be done for it now."""

    def __init__(
        self, status: int, message: str, field: str | None = None, code: str | None = None, retry: int | None = None,
        page: bool = False,
    ) -> None:  # fmt: skip
        """`retry` says after how many seconds to try again; `page`, that a browser should ask for the key."""
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code
        self.retry, self.page = retry, page

    @property
    def body(self) -> dict[str, Any]:
        """Returns the error as clients read it."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}

    def response(self) -> JSONResponse:
        """Returns the whole answer of a request that fails."""
        headers = {} if self.retry is None else {"retry-after": str(self.retry)}
        if self.status == 401:
            headers["www-authenticate"] = 'Basic realm="jaxlm: the API key is the password"' if self.page else "Bearer"
        return JSONResponse(self.body, self.status, headers)


def failed(path: str, error: Exception, with_message: bool) -> ApiError:
    """Logs where an error of our own came from and returns what clients are told of it. Its message may hold what a
    request said, so it is logged by choice only."""
    where = "".join(traceback.format_tb(error.__traceback__))
    LOG.error("%s failed with %s\n%s", path, repr(error) if with_message else type(error).__name__, where)
    return ApiError(500, "the server failed; its log says why")


def wrong(field: str, message: str) -> ApiError:
    """Returns the error of one field of a request."""
    return ApiError(400, f"{field}: {message}", field)


def of_settings(error: ValueError) -> ApiError:
    """Returns an error of our own settings, `sampling.NAME: …`, by the names of a request's fields."""
    message = str(error)
    found = re.match(r"(?:sampling\.)?([a-z_]+)(?=[:,])", message)
    if found is None:
        return ApiError(400, message)
    field = FIELDS.get(found[1], found[1])
    return ApiError(400, field + message[found.end() :].replace("sampling.", ""), field)
