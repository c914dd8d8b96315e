"""Chat templates are Jinja programs that come with a model, so they run sandboxed, in another process with limits.

This file is also the program of that process, which imports nothing of jaxlm.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

SECONDS = 10  # time limit of the process, besides a little for each conversation
MEMORY = 1 << 30  # bytes of address space
MAX_CHARACTERS = 1 << 20  # that a template may write


Conversation = tuple[Sequence[Mapping[str, Any]], bool]
"""A conversation is (messages, whether the text ends where the model's answer begins)."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos: str = "",
    eos: str = "",
    answer: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Returns one conversation as the model was trained to read it; see `render_all`.

    With `answer` the text ends where the model's answer begins.
    """
    return render_all(template, [(messages, answer)], bos=bos, eos=eos, variables=variables)[0]


def render_all(
    template: str,
    conversations: Sequence[Conversation],
    *,
    bos: str = "",
    eos: str = "",
    variables: Mapping[str, Any] | None = None,
) -> list[str]:
    """Returns the text of each conversation, all rendered by one process.

    The template reads `bos` and `eos` as `bos_token` and `eos_token`, and `variables` by their own names. Raises
    ValueError if it fails, writes too much, or exceeds the limits on time and memory.
    """
    shared = dict(bos_token=bos, eos_token=eos) | dict(variables or {})
    each = [dict(messages=list(messages), add_generation_prompt=answer) for messages, answer in conversations]
    seconds = SECONDS + len(each) // 100
    request = json.dumps(dict(template=template, shared=shared, each=each, seconds=seconds))
    try:
        # Isolated: neither the current folder nor the environment adds modules to what it imports.
        completed = subprocess.run(
            [sys.executable, "-I", __file__], input=request, capture_output=True, text=True, encoding="utf-8",
            timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ValueError(f"chat template: took more than {seconds} s; use another template") from None
    if completed.returncode or not completed.stdout:
        raise ValueError(f"chat template: took more than {seconds} s or {MEMORY >> 20} MiB; use another template")
    result = json.loads(completed.stdout)
    if "error" in result:
        raise ValueError(f"chat template: {result['error']}")
    return result["texts"]


def _limit_resources(seconds: int) -> None:
    try:
        import resource
    except ImportError:  # not a POSIX system: the parent's time limit remains
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _environment() -> Any:
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Renders what stands between `{% generation %}` and `{% endgeneration %}`, the marks of the model's text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
                sort_keys: bool = False) -> str:  # fmt: skip
        # Jinja's own filter escapes < and > for HTML, which models have not seen.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= dict(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    return environment


def _render(template: Any, variables: dict[str, Any]) -> str:
    parts, size = [], 0
    for part in template.generate(**variables):
        parts.append(part)
        size += len(part)
        if size > MAX_CHARACTERS:
            raise ValueError(f"writes more than {MAX_CHARACTERS:,} characters")
    return "".join(parts)


def _serve() -> None:
    """Reads one request from standard input and writes its answer to standard output."""
    request = json.load(sys.stdin)
    try:
        import jinja2  # noqa: F401
    except ImportError:
        print(json.dumps({"error": "needs jinja2, which is not installed; pip install 'jaxlm[generate]'"}))
        return
    _limit_resources(request["seconds"])
    try:
        template = _environment().from_string(request["template"])
        answer: dict[str, Any] = {"texts": [_render(template, request["shared"] | each) for each in request["each"]]}
    except Exception as error:  # whatever a hostile template can provoke becomes one line
        answer = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
    print(json.dumps(answer))


if __name__ == "__main__":
    _serve()
