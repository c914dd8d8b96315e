"""`jaxlm serve` answers over HTTP as clients of OpenAI's interface expect."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from jaxlm.commands.arguments import Command, Done, Flag, Model, More, part, start_processes
from jaxlm.core import typed_arguments
from jaxlm.core.config import CacheKind
from jaxlm.core.errors import nearest
from jaxlm.core.ranges import Natural
from jaxlm.inference.server.limits import Limits

Several = UseAppendAction[tuple[str, ...]]
KEY = "JAXLM_API_KEY"
ENGINE = "--engine."
NEEDED = ("starlette", "uvicorn", "prometheus_client")


@dataclass(frozen=True)
class Serve(Limits, Command):
    """Serves a model over HTTP: completions, chats, vectors or labels, whatever it can, and a chat page at /.

    example: jaxlm serve runs/tuned --adapter poems=lora-poems --port 8000
    """

    takes_more = True

    model: Model = field(kw_only=True)
    adapter: Annotated[Several, arg(metavar="NAME=DIR")] = ()
    """PEFT's files that requests may name in the model's place; may be given several times."""
    name: str = ""
    """What requests call the model; empty: the name of its files."""
    host: str = "127.0.0.1"
    """The address to listen on; the default is reached from this machine alone."""
    port: Natural = 8000
    """The port; 0: any that is free."""
    api_key: Several = ()
    """A key that requests must have, seen by all who list processes: better give it by the variable JAXLM_API_KEY or
    by `api_key_file`."""
    api_key_file: Path | None = None
    """A file with a key a line."""
    allow_host: Several = ()
    """A name that requests may call a server on a local address by, as a proxy before it does."""
    allow_origin: Several = ()
    """Another site whose pages may ask, such as https://chat.example, or * for all."""
    template: Path | None = None
    """A chat template in Jinja; None: the model's own."""
    tool_calls: Literal["hermes", "llama", "mistral"] | None = None
    """The format in which the model writes calls of tools; None: that of its template."""
    cache: CacheKind | None = None
    """How keys and values of tokens that were read are stored, such as int8; None: as the run says, or as computed."""
    step: Natural | None = None
    """The checkpoint's; None: the newest."""
    no_page: Flag = False
    """Leaves the chat page out."""
    log_requests: Flag = False
    """Logs errors of the server with their messages, which may hold what requests said."""

    @classmethod
    def more(cls, place: str, rest: Sequence[str] = ()) -> More | None:
        from jaxlm.inference.engine import Settings

        kind = make_dataclass("Options", [("engine", Settings)], frozen=True)
        return More("options", kind, kind(Settings()))

    def run(self, rest: list[str]) -> Done:
        if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            raise ValueError(f"serve needs {' and '.join(missing)}, not installed here: pip install 'jaxlm[serve]'")
        adapters, keys = _named(self.adapter), self._keys()
        start_processes(self)
        from jaxlm.assembly import open_model, serving
        from jaxlm.inference.server.app import make_app
        from jaxlm.inference.server.guard import Access, local_hosts
        from jaxlm.inference.server.listen import address, bind, serve

        limits, settings = part(self, Limits), _engine(rest)
        hosts = local_hosts(self.host)
        if not hosts and not keys:
            print(f"whoever reaches {self.host} may use this server: give a key by {KEY}", file=sys.stderr)
        with bind(self.host, self.port) as bound:
            service = serving.open_service(
                open_model.with_cache(self.model, self.cache), settings, adapters=adapters, name=self.name,
                template=self.template, calls=self.tool_calls, step=self.step, progress=_compiled,
            )  # fmt: skip
            access = Access(keys, (*hosts, *(h.lower() for h in self.allow_host)) if hosts else (), self.allow_origin)
            page = not self.no_page and service.encode_chat is not None
            app = make_app(service, limits, access, page=page, log_requests=self.log_requests)
            url = address(bound)

            def ready() -> None:
                if (engine := service.engine) is not None:
                    s, kept = engine.stats(), engine.settings.page_tokens
                    print(f"keys and values of {s.cache_tokens:,} tokens, and of {s.pages * kept:,} in pages, each of "
                          f"{s.slot_bytes:,} bytes", file=sys.stderr)  # fmt: skip
                what = f"{url} (a chat page) and {url}/v1" if page else f"{url}/v1"
                print(f"serving {', '.join(service.names)} at {what}; Ctrl-C ends it", flush=True)

            serve(app, bound, limits, ready)
        print("ended")
        return Done({"url": url, "models": service.names})

    def _keys(self) -> tuple[str, ...]:
        keys = [*self.api_key, *filter(None, [os.environ.get(KEY)])]
        if self.api_key_file is not None:
            from jaxlm.data.text_input import read_text

            listed = [line.strip() for line in read_text(self.api_key_file).splitlines() if line.strip()]
            if not listed:
                raise ValueError(f"api_key_file: {self.api_key_file} holds no key; write one a line")
            keys += listed
        if any(not key.strip() for key in keys):
            raise ValueError("api_key: is empty; leave it out to serve without a key")
        return tuple(keys)


def _engine(rest: Sequence[str]) -> Any:
    """Returns the engine's settings of options such as `--engine.length`. ValueError: there is no such option."""
    from jaxlm.inference.engine import Settings

    for option in rest:
        if option.startswith("--") and not option.startswith(ENGINE):
            known = [f.name.replace("_", "-") for f in fields(Serve)] + [f"engine.{f.name}" for f in fields(Settings)]
            raise ValueError(f"unknown option {option.partition('=')[0]}{nearest(option.removeprefix('--'), known)}")
    try:
        return typed_arguments.parse(
            Settings, [f"--{a.removeprefix(ENGINE)}" if a.startswith(ENGINE) else a for a in rest]
        )
    except ValueError as error:
        raise ValueError(str(error).replace("--", ENGINE)) from None


def _named(adapters: Sequence[str]) -> dict[str, str]:
    out: dict[str, str] = {}
    for one in adapters:
        name, equals, folder = one.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"adapter: {one!r} is not NAME=DIR; give the name that requests use, and the directory")
        if name in out:
            raise ValueError(f"adapter: two are called {name}; give each a name of its own")
        out[name] = folder
    return out


def _compiled(done: int, total: int) -> None:
    end = "\n" if done == total else "\r" if sys.stderr.isatty() else ""
    if end:
        print(f"compiled {done} of {total} programs", end=end, file=sys.stderr, flush=True)
