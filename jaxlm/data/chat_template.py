"""Chat templates are Jinja programs that come with a model, so they run sandboxed, in other processes with limits.

This file is also the program of those processes, which import nothing of jaxlm.
"""

import itertools
import json
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

SECONDS = 10  # of processor time for each conversation
MEMORY = 1 << 30  # bytes of address space of a process
MAX_CHARACTERS = 1 << 20  # that a template may write at a time
BATCH, BATCH_CHARACTERS = 1000, 8 << 20  # conversations, and characters of them, that a process renders


class Request(NamedTuple):
    """A request asks for several texts of one conversation, each of its first messages."""

    messages: Sequence[Mapping[str, Any]]
    cuts: Sequence[tuple[int, bool]]
    """(How many messages, whether the text ends where the model's answer begins) of each text."""
    variables: Mapping[str, Any] = {}
    """What the template reads by name beside the messages, such as `tools`."""
    where: str = ""
    """File and line, for error messages."""


class Text(NamedTuple):
    """A text is what a template wrote, with the characters (first, after the last) of what its marks say is learned."""

    text: str
    learned: list[tuple[int, int]]


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
    request = Request(messages, [(len(messages), answer)], variables or {})
    return next(render_all(template, [request], bos=bos, eos=eos))[0].text


def render_all(template: str, requests: Sequence[Request], *, bos: str = "", eos: str = "") -> Iterator[list[Text]]:
    """Yields the texts of each request; a process renders a batch of them.

    The template reads `bos` and `eos` as `bos_token` and `eos_token`. Raises ValueError, which names the conversation,
    if the template fails on it, writes too much, or exceeds the limits on time and memory.
    """
    shared = dict(template=template, bos=bos, eos=eos, seconds=SECONDS)
    waiting: list[tuple[str, str]] = []
    size = 0
    for request in requests:
        each = json.dumps(dict(messages=list(request.messages), cuts=request.cuts, variables=request.variables))
        if waiting and (len(waiting) == BATCH or size + len(each) > BATCH_CHARACTERS):
            yield from _render_batch(shared, waiting)
            waiting, size = [], 0
        waiting.append((request.where, each))
        size += len(each)
    if waiting:
        yield from _render_batch(shared, waiting)


def _render_batch(shared: Mapping[str, Any], requests: Sequence[tuple[str, str]]) -> Iterator[list[Text]]:
    lines = "\n".join([json.dumps(shared), *(each for _, each in requests), ""])
    # The child limits its own time of the processor; this is for a machine that gives it too little of that.
    patience = 6 * SECONDS + len(requests)
    try:
        # Isolated: neither the current folder nor the environment adds modules to what it imports.
        command = [sys.executable, "-I", __file__]
        output = subprocess.run(command, input=lines.encode(), capture_output=True, timeout=patience).stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
    answers = output.split(b"\n")[:-1]  # what stands behind the last line's end is cut off
    for (where, _), answer in itertools.zip_longest(requests, answers, fillvalue=None):  # type: ignore[misc]
        place = f"{where}: " if where else ""
        if answer is None:
            limits = f"{SECONDS} s or {MEMORY >> 20} MiB"
            raise ValueError(f"{place}chat template: took more than {limits}; use another template")
        yield _texts(answer, place)


def _texts(answer: bytes, place: str = "") -> list[Text]:
    result = json.loads(answer)
    if "error" in result:
        raise ValueError(f"{place}chat template: {result['error']}")
    return [Text(text, [(a, z) for a, z in learned]) for text, learned in result["texts"]]


class Renderer:
    """A Renderer runs one template in a process that stays, so that a request costs no start of an interpreter.

    It may be called from several threads. A request that fails ends the process, and the next one starts another.
    """

    def __init__(self, template: str, *, bos: str = "", eos: str = "") -> None:
        self.template = template
        self._shared = dict(template=template, bos=bos, eos=eos, seconds=SECONDS)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, request: Request) -> list[Text]:
        """Returns the texts of a request; raises ValueError as `render_all` does."""
        each = json.dumps(dict(messages=list(request.messages), cuts=request.cuts, variables=request.variables))
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None
            patience = threading.Timer(6 * SECONDS, process.kill)
            patience.start()
            try:
                process.stdin.write(each.encode() + b"\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            finally:
                patience.cancel()
            if not answer.endswith(b"\n"):
                self._end()
                raise ValueError(f"chat template: took more than {SECONDS} s or {MEMORY >> 20} MiB")
            try:
                return _texts(answer)
            except ValueError:
                self._end()
                raise

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._end()

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(self._shared).encode() + b"\n")
        self._process = process
        return process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None


# ---------------------------------------------------------------------------------------------------- the other process


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not a POSIX system: the parent's time limit remains
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _limit_seconds(seconds: float) -> None:
    """Lets the system end this process after so much more processor time; no code of Python's must run for that."""
    import signal

    if sys.platform != "win32":  # there the parent's time limit remains
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _environment(begin: str, end: str) -> Any:
    """Returns an environment whose templates write `begin` and `end` around what they mark as the model's text."""
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks what stands between `{% generation %}` and `{% endgeneration %}` in a template."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{begin}{caller()}{end}"

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


def _unmarked(text: str, begin: str, end: str) -> tuple[str, list[tuple[int, int]]]:
    """Returns a text without marks, and the characters that stood between them."""
    plain, learned, opened = "", [], 0
    for part in re.split(f"({begin}|{end})", text):
        if part == begin:
            opened = len(plain)
        elif part == end:
            learned.append((opened, len(plain)))
        else:
            plain += part
    return plain, learned


def _serve() -> None:
    """Reads requests from standard input, a line each, and writes a line of their texts to standard output for each."""
    shared = json.loads(sys.stdin.buffer.readline())
    try:
        import jinja2  # noqa: F401
    except ImportError:
        print(json.dumps({"error": "needs jinja2, which is not installed; pip install 'jaxlm[generate]'"}))
        return
    token = secrets.token_hex(16)  # which nobody can write into a message
    begin, end = f"<{token}>", f"</{token}>"
    environment: Any = _environment(begin, end)
    template = None
    _limit_memory()
    for line in sys.stdin.buffer:
        _limit_seconds(shared["seconds"])
        try:
            template = template or environment.from_string(shared["template"])
            each = json.loads(line)
            named = dict(bos_token=shared["bos"], eos_token=shared["eos"]) | each["variables"]
            texts = [
                _render(template, named | dict(messages=each["messages"][:n], add_generation_prompt=answer))
                for n, answer in each["cuts"]
            ]
            result: dict[str, Any] = {"texts": [_unmarked(text, begin, end) for text in texts]}
        except Exception as error:  # whatever a hostile template can provoke becomes one line
            result = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
        print(json.dumps(result), flush=True)
        if "error" in result:
            return


if __name__ == "__main__":
    _serve()
