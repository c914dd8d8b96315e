"""The messages and tools of a chat request are checked, and brought into the form that chat templates read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.inference.server.errors import ApiError, wrong
from jaxlm.inference.server.fields import Fields
from jaxlm.inference.server.limits import Limits
from jaxlm.inference.server.service import Service

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXTS = ("name", "tool_call_id", "reasoning_content", "refusal")  # that a message may have beside its content
MOST_TOOLS = 256
VARIABLES = ("documents", "reasoning_effort")  # that a template may read, besides `chat_template_kwargs`
RESERVED = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")


@dataclass(frozen=True)
class Choice:
    """A Choice says which tools an answer may call, and whether it must call one."""

    tools: Sequence[Mapping[str, Any]] = ()
    must: bool = False
    may: bool = False

    @property
    def names(self) -> list[str]:
        """Returns the names of the functions that may be called."""
        return [tool["function"]["name"] for tool in self.tools]


def read_messages(f: Fields, limits: Limits) -> list[dict[str, Any]]:
    """Returns the messages as templates read them: contents are texts, arguments of calls are objects."""
    given = f.list("messages", limits.inputs)
    if not given:
        raise wrong("messages", "must have at least one message")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(given)]


def _message(where: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise wrong(where, "must be an object")
    if given.get("role") not in ROLES:
        raise wrong(f"{where}.role", f"must be one of {', '.join(ROLES)}")
    out = {"role": given["role"], "content": _content(f"{where}.content", given.get("content"))}
    for name in TEXTS:
        if (value := given.get(name)) is not None:
            if not isinstance(value, str):
                raise wrong(f"{where}.{name}", "must be a text")
            out[name] = value
    if calls := given.get("tool_calls"):
        if given["role"] != "assistant" or not isinstance(calls, list):
            raise wrong(f"{where}.tool_calls", "must be a list, in a message of the assistant")
        out["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    elif given.get("content") is None:
        raise wrong(f"{where}.content", "is missing")
    return out


def _content(where: str, content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise wrong(where, "must be a text or a list of parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            raise wrong(where, f"this model reads only parts of type text, not {str(kind)[:80]!r}")
    return "\n".join(part["text"] for part in content)


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong(where, "must be an object with a function, which has a name and arguments")
    arguments = function.get("arguments", "{}")
    try:
        value = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except ValueError:
        what = "is not whole JSON; leave calls out that were cut short"
        raise wrong(f"{where}.function.arguments", what) from None
    if not isinstance(value, dict):
        raise wrong(f"{where}.function.arguments", "must be the JSON text of an object")
    id = call.get("id")
    return {"id": id if isinstance(id, str) else "", "type": "function",
            "function": {"name": function["name"], "arguments": value}}  # fmt: skip


def read_choice(f: Fields, service: Service) -> Choice:
    """Returns the tools of a request with what it says of their choice. Raises an ApiError where the model's template
    has no place for tools."""
    tools, choice = f.list("tools", MOST_TOOLS), f.raw("tool_choice")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise wrong("tool_choice", "there are no tools to choose from")
        return Choice()
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            raise wrong(f"tools[{i}]", "must be of type function and have a function")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise wrong(f"tools[{i}].function.name", "must be a text")
        if not isinstance(function.get("parameters", {}), dict):
            raise wrong(f"tools[{i}].function.parameters", "must be a JSON schema, which is an object")
    if service.calls is None:
        raise wrong("tools", "the model's chat template reads no tools; serve it with one that does (--template)")
    if choice in (None, "auto", "none", "required"):
        return Choice(tools, must=choice == "required", may=choice != "none")
    named = choice.get("function") if isinstance(choice, dict) else None
    name = named.get("name") if isinstance(named, dict) else None
    chosen = [tool for tool in tools if tool["function"]["name"] == name]
    if not chosen:
        raise wrong("tool_choice", "must be none, auto, required, or name a function of tools")
    return Choice(chosen, must=True, may=True)


def read_variables(f: Fields) -> dict[str, Any]:
    """Returns what a template reads beside the messages, but for tools."""
    given = f.object("chat_template_kwargs")
    for name in given:
        if name in RESERVED:
            raise wrong("chat_template_kwargs", f"{name} has a field of its own")
    if f.raw("chat_template") is not None:
        raise ApiError(400, "chat_template: a request can't bring a template along; name one with --template",
                       "chat_template")  # fmt: skip
    named = {name: value for name in VARIABLES if (value := f.raw(name)) is not None}
    return named | given
