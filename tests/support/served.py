"""Servers for tests: in a thread of this process, on a free port, over an engine that answers what a test says."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import requests
import uvicorn
from support.fake_engine import FakeEngine

from jaxlm.data.chat_template import Renderer
from jaxlm.data.render_chat import encode_sealed, renderer
from jaxlm.data.tokenizer import Bytes
from jaxlm.inference.engine import Request
from jaxlm.inference.server.app import make_app
from jaxlm.inference.server.guard import Access
from jaxlm.inference.server.limits import Limits
from jaxlm.inference.server.listen import address, bind, settings
from jaxlm.inference.server.service import Service
from jaxlm.inference.server.tool_calls import format_of

TOKENS = Bytes()
# It writes calls as Hermes does.
TEMPLATE = (
    "<s>{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}</s>{% endfor %}"
    "{% if mood %}({{ mood }}){% endif %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@dataclass
class Served:
    """A running server: its address, and the engine that it asks."""

    url: str
    engine: Any
    app: Any
    server: uvicorn.Server

    @property
    def asked(self) -> Request:
        """The last request that the engine got."""
        return self.engine.requests[-1]

    @property
    def prompt(self) -> str:
        """What that request's prompt reads as, special tokens as names."""
        return "".join(TOKENS.piece(i) if i >= 256 else chr(i) for i in self.asked.prompt)


def fake_service(engine: FakeEngine, by: Renderer, template: str, changes: dict[str, Any]) -> Service:
    """Returns what is served where an engine answers without a model."""

    def chat(messages: Any, variables: Any, answer: bool) -> Any:
        return encode_sealed(TOKENS, by, messages, variables, answer), None

    def prompt(text: str, add: bool, special: bool) -> Any:
        ids = TOKENS.encode_special(text) if special else TOKENS.encode(text)
        return [TOKENS.bos_id, *ids] if add else ids, None

    made = Service("tiny", TOKENS, 1, engine, ("sonnets",), encode_chat=chat, encode_prompt=prompt, template=template,
                   calls=format_of(template))  # fmt: skip
    return replace(made, **changes)


class Http(requests.Session):
    """Asks a server by paths."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    def request(self, method: str, path: str, *args: Any, **more: Any) -> requests.Response:
        return super().request(method, self.url + path, *args, timeout=20, **more)


@contextlib.contextmanager
def running(
    service: Service, limits: Limits | None = None, access: Access | None = None, **more: Any
) -> Iterator[Served]:  # fmt: skip
    """Runs a server while the block lasts."""
    app, bound = make_app(service, limits, access, **more), bind("127.0.0.1", 0)
    server = uvicorn.Server(settings(app, limits or Limits()))
    thread = threading.Thread(target=server.run, args=([bound],))
    url = address(bound)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            threading.Event().wait(0.005)
        yield Served(url, service.engine, app, server)
    finally:
        server.should_exit = True
        thread.join(20)
        bound.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def fake(
    say: Callable[[Request, int], str] | str = "hello", limits: Limits | None = None, access: Access | None = None,
    template: str = TEMPLATE, changes: dict[str, Any] | None = None, app: dict[str, Any] | None = None, **more: Any,
) -> Iterator[Served]:  # fmt: skip
    """Runs a server over an engine that says `say`; `more` are the engine's settings."""
    engine = FakeEngine((lambda request, sample: say) if isinstance(say, str) else say, **more)
    by = renderer(TOKENS, template)
    try:
        with running(fake_service(engine, by, template, changes or {}), limits, access, **(app or {})) as served:
            yield served
    finally:
        by.close()
