"""The fields of a request's body are read one by one, each with its type and range."""

import json
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxlm.inference.server.errors import ApiError, wrong

LOG = logging.getLogger("jaxlm.server")
# Fields that clients send for services that we are not; they change no answer.
WITHOUT_EFFECT = {
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "modalities", "verbosity", "prediction",
}  # fmt: skip
_STRING = re.compile(rb'"(?:[^"\\]++|\\.?)*+(?:"|$)', re.DOTALL)
_NOT_BRACKETS = bytes(b for b in range(256) if b not in b"[]{}")
_told: set[str] = set()


def parse(body: bytes, depth: int) -> dict[str, Any]:
    """Returns the object that a body holds. Raises an ApiError where it is none, or nested deeper than `depth`."""
    brackets = _STRING.sub(b"", body).translate(bytes.maketrans(b"{}", b"[]"), _NOT_BRACKETS)
    for _ in range(depth):
        if not brackets:
            break
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise ApiError(400, f"body: is nested deeper than {depth} levels, or its brackets don't match")
    try:
        value = json.loads(body, parse_constant=_refuse)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "body: holds half of a surrogate pair, which is no character") from None
    except ValueError as error:
        raise ApiError(400, f"body: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "body: must be a JSON object")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


class Fields:
    """Fields hold a body, and remember which of its fields were read."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body
        self._read: set[str] = set()

    def raw(self, name: str, default: Any = None) -> Any:
        """Returns a field as it is; null is the same as no field."""
        self._read.add(name)
        value = self.body.get(name)
        return default if value is None else value

    def text(self, name: str, default: str | None = None) -> str | None:
        """Returns a text."""
        value = self.raw(name, default)
        if value is not None and not isinstance(value, str):
            raise wrong(name, "must be a text")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Returns true or false."""
        value = self.raw(name, default)
        if not isinstance(value, bool):
            raise wrong(name, "must be true or false")
        return value

    def whole(self, name: str, default: Any = None, low: int = 0, high: int | None = None) -> Any:
        """Returns a whole number from `low` to `high`."""
        value = self.raw(name, default)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong(name, "must be a whole number")
        if value < low or (high is not None and value > high):
            most = "" if high is None else f" and at most {high}"
            raise wrong(name, f"{value} is out of range; it must be {low} or more{most}")
        return value

    def number(self, name: str, default: Any = None) -> Any:
        """Returns a finite number."""
        value = self.raw(name, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise wrong(name, "must be a number")
        if value is not None and not math.isfinite(value):
            raise wrong(name, "must be finite")
        return None if value is None else float(value)

    def object(self, name: str) -> dict[str, Any]:
        """Returns an object; empty where there is none."""
        value = self.raw(name, {})
        if not isinstance(value, dict):
            raise wrong(name, "must be an object")
        return value

    def list(self, name: str, most: int | None = None) -> list[Any]:
        """Returns a list; empty where there is none."""
        value = self.raw(name, [])
        if not isinstance(value, list):
            raise wrong(name, "must be a list")
        if most is not None and len(value) > most:
            raise wrong(name, f"has {len(value)} entries; this server allows {most}")
        return value

    def log_unknown(self) -> None:
        """Logs once for each field that nothing reads: newer clients send fields that older servers don't know."""
        for name in self.body.keys() - self._read - WITHOUT_EFFECT - _told:
            if len(_told) < 1000:  # strangers choose these names
                _told.add(name)
                LOG.warning("field %.80r of a request is not known here and has no effect", name)
