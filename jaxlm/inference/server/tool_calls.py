"""Calls of tools are found in a model's text while it comes, in the formats that published models write them in."""

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Format:
    """A Format says how a model writes calls.

    `begin` stands before calls and `end` after each, if anything does; `bare` calls may begin an answer without it.
    `digits` is the length of an id where a template demands one.
    """

    name: str
    begin: str
    end: str = ""
    bare: bool = False
    digits: int = 0


FORMATS = {
    "hermes": Format("hermes", "<tool_call>", "</tool_call>"),
    "llama": Format("llama", "<|python_tag|>", bare=True),
    "mistral": Format("mistral", "[TOOL_CALLS]", digits=9),
}
ARGUMENTS = ("arguments", "parameters")
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[ARGS\]\s*)?(?=\{)")
_BETWEEN = re.compile(r"[\s;,]*")


class Call(NamedTuple):
    """A Call names a function and holds its arguments as JSON text."""

    id: str
    name: str
    arguments: str


def format_of(template: str) -> Format | None:
    """Returns the format of the calls that a chat template writes of earlier turns; None: it reads no tools."""
    if not re.search(r"\btools\b", template):
        return None
    marked = next((f for f in FORMATS.values() if f.begin in template and not f.bare), None)
    if marked is not None:
        return marked
    return FORMATS["llama"] if '"parameters"' in template or FORMATS["llama"].begin in template else FORMATS["hermes"]


def required_schema(tools: Sequence[Mapping[str, Any]]) -> str:
    """Returns the JSON schema of a call of one of the tools."""
    calls: list[dict[str, Any]] = []
    definitions: dict[str, dict[str, Any]] = {}  # references begin at the root
    for tool in tools:
        function = tool["function"]
        parameters = function.get("parameters") or {"type": "object"}
        for place in ("$defs", "definitions"):
            given = parameters.get(place, {})
            if not isinstance(given, dict):
                raise ValueError(f"{place} of {function['name']} must be an object")
            for name, schema in given.items():
                if definitions.setdefault(place, {}).setdefault(name, schema) != schema:
                    raise ValueError(f"two tools mean different things by {place}/{name}; give them other names")
        properties = {"name": {"const": function["name"]}, "arguments": parameters}
        calls.append({"type": "object", "properties": properties, "required": ["name", "arguments"],
                      "additionalProperties": False})  # fmt: skip
    # No more than a space between the parts: a model that may write white space can go on with it for ever.
    space = {"x-guidance": {"whitespace_flexible": True, "whitespace_pattern": " ?"}}
    return json.dumps((calls[0] if len(calls) == 1 else {"anyOf": calls}) | definitions | space)


class Reader:
    """A Reader splits one answer's text into content and calls as it comes.

    What may yet become a call waits; what turns out to be none is content, so that no text is ever lost. With `only`
    the whole answer is a call.
    """

    def __init__(self, format: Format, names: Sequence[str], only: bool = False) -> None:
        self.format, self.names, self.only = format, set(names), only
        self.called = 0
        self._waiting = ""
        self._in_call = only
        self._begun = False
        self._said = False
        self._opened = ""  # text that begins calls, until there is one

    def read(self, text: str, last: bool = False, marked: bool = False) -> list[str | Call]:
        """Returns the contents and calls that are whole, given new text. `marked`: the model wrote the token that
        begins calls, which is a special one and no text."""
        self._waiting += text
        if marked:
            self._in_call = self._begun = True
        found: list[str | Call] = []
        while self._step(found, last):
            pass
        if last and self._waiting:
            found.append(self._opened + self._taken(len(self._waiting)))
        for part in found:
            self.called += isinstance(part, Call)
        return [part for part in found if part]

    def _step(self, found: list[str | Call], last: bool) -> bool:
        """Takes what can be taken from the text that waits; says whether there may be more."""
        if self._in_call:
            return self._call(found, last)
        begin = self.format.begin
        at = self._waiting.find(begin)
        if self.format.bare and not self._said and self._waiting.lstrip()[:1] in ("{", ""):
            if not self._waiting.strip():
                return False
            self._in_call = True
            return True
        if at >= 0:
            found.append(self._taken(at))
            self._waiting = self._waiting[len(begin) :]
            self._in_call = self._begun = True
            self._opened = begin
            return True
        kept = 0 if last else next((n for n in range(len(begin) - 1, 0, -1) if self._waiting.endswith(begin[:n])), 0)
        if len(self._waiting) > kept:
            found.append(self._taken(len(self._waiting) - kept))
        return False

    def _taken(self, size: int) -> str:
        text, self._waiting = self._waiting[:size], self._waiting[size:]
        self._said |= bool(text.strip())
        return text

    def _call(self, found: list[str | Call], last: bool) -> bool:
        """Takes a whole call from the text that waits, or what shows itself to be none."""
        text, end = self._waiting, self.format.end
        if end and not self.only:
            at = text.find(end)
            if at < 0:
                return False
            calls = self._parsed(text[:at])
            found += [self._opened + text[: at + len(end)]] if calls is None else calls[0]
            self._opened = ""
            self._waiting, self._in_call = text[at + len(end) :].lstrip("\n"), False
            return True
        between = _BETWEEN.match(text)
        text = text[between.end() if between else 0 :]
        if not text:
            if last:
                self._waiting = ""
            return False
        calls = self._parsed(text)
        if calls is not None:
            found += calls[0]
            self._waiting, self._opened = text[calls[1] :], ""
            return True
        if not self._could_be_call(text):
            found.append(self._opened)
            self._in_call, self._opened = False, ""
            self._said = True  # an answer whose beginning is no call has none without a mark
            return True
        return False

    def _could_be_call(self, text: str) -> bool:
        """Says whether more text may make a call of this one: its JSON is not whole yet."""
        start = _NAMED.match(text)
        body = text[start.end() :] if start and not self.only else text
        if body[:1] not in ("{", "["):
            return bool(self._begun and re.fullmatch(r"[\w.-]*\s*(\[A?R?G?S?\]?)?\s*", text))
        try:
            json.JSONDecoder().raw_decode(body)
        except ValueError:
            return True
        return False

    def _parsed(self, text: str) -> tuple[list[str | Call], int] | None:
        """Returns the calls at the beginning of a text and where they end; None: there is none."""
        start = _NAMED.match(text)
        at = start.end() if start and start[1] in self.names else len(text) - len(text.lstrip())
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
        except ValueError:
            return None
        if start and at == start.end():
            value = {"name": start[1], "arguments": value}
        calls = [self._of(one) for one in (value if isinstance(value, list) else [value])]
        whole = [call for call in calls if call is not None]
        return (list(whole), end) if whole and len(whole) == len(calls) else None

    def _of(self, value: Any) -> Call | None:
        if not isinstance(value, dict) or value.get("name") not in self.names:
            return None
        arguments: Any = next((value[name] for name in ARGUMENTS if name in value), {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                return None
        if not isinstance(arguments, dict):
            return None
        return Call(self._id(), value["name"], json.dumps(arguments, ensure_ascii=False))

    def _id(self) -> str:
        if digits := self.format.digits:
            letters = string.ascii_letters + string.digits
            return "".join(secrets.choice(letters) for _ in range(digits))
        return f"call_{secrets.token_hex(12)}"
