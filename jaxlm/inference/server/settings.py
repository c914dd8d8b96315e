"""A request's fields become settings of generation."""

import dataclasses
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.inference.engine import Request
from jaxlm.inference.sampling import Sampling
from jaxlm.inference.server.errors import ApiError, wrong
from jaxlm.inference.server.fields import Fields
from jaxlm.inference.server.limits import Limits
from jaxlm.inference.server.service import Prompt, Service

MOST_STOPS, MOST_BIASES, MOST_TOP = 64, 4096, 20
SPACE = r"\n? {0,20}"  # between the parts of JSON
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_PATTERN = re.compile(r"[\\.+*?()|\[\]{}^$]")  # what a regular expression reads as more than itself
COMPLETION_TOKENS = 16  # of an answer to /v1/completions where a request doesn't say, as OpenAI has it


@dataclass(frozen=True)
class Settings:
    """Settings are what a request says of how its answers are made, the prompt aside."""

    sampling: Sampling
    most: int | None
    """The most new tokens; None: as many as fit."""
    bias: Mapping[int, float]
    adapter: str | None
    priority: int
    keep_stop: bool
    """Whether a stop text stands at the end of its answer."""
    with_ids: bool
    """Whether answers come with their token ids."""
    ignore_eos: bool
    """Whether an answer goes on after the model's own end tokens."""
    salt: str
    """Requests share what the cache has of their prompts with those of the same salt alone."""

    def request(
        self, prompt: Prompt, service: Service, limits: Limits, scores: int | None = None, row: int = 0
    ) -> Request:
        """Returns what the engine is asked for one prompt, whose answers are drawn as from `row` on. Raises an ApiError
        where it can't fit."""
        assert service.engine is not None
        ids, source = prompt
        read, limit = len(ids if source is None else source), service.engine.limit
        if limits.prompt_tokens is not None and read > limits.prompt_tokens:
            raise _too_long(f"the prompt has {read} tokens; this server allows {limits.prompt_tokens}")
        room = limit - len(ids)
        if room < 1:
            raise _too_long(f"the prompt has {len(ids)} tokens and leaves no room for an answer; the model has {limit}")
        most = self.most
        if most is None:
            most = min(room, limits.new_tokens or room)
        elif most > room:
            raise _too_long(f"the prompt has {len(ids)} tokens and max_tokens is {most}, together more than the "
                            f"model's {limit}; shorten the prompt, or set max_tokens lower")  # fmt: skip
        how = dataclasses.replace(self.sampling, tokens=max(1, most), min_tokens=min(self.sampling.min_tokens, most))
        ids_read = None if source is None else tuple(source)
        return Request(
            tuple(ids), how, ids_read, adapter=self.adapter, priority=self.priority, prompt_logprobs=scores,
            logit_bias=self.bias, row=row, ignore_eos=self.ignore_eos, salt=self.salt,
        )  # fmt: skip


def _too_long(message: str) -> ApiError:
    return ApiError(400, message, "prompt", "context_length_exceeded")


def model_of(f: Fields, service: Service) -> str:
    """Returns the name of the model that a request asks for: the first one where it names none."""
    name = f.text("model") or service.name
    if name not in service.names:
        raise ApiError(
            404, f"model: {name[:200]!r} is not served here; served: {', '.join(service.names)}", "model",
            "model_not_found",
        )  # fmt: skip
    return name


def read(f: Fields, service: Service, limits: Limits, *, chat: bool) -> Settings:
    """Reads the settings of a request. Raises an ApiError that names the field that is wrong."""
    own, name = service.sampling, model_of(f, service)
    changes: dict[str, Any] = {}
    for field in NUMBERS:
        if (number := f.number(field)) is not None:
            changes[field] = number
    if (k := f.whole("top_k", low=-1)) is not None:
        changes["top_k"] = max(k, 0)  # -1 is another way to say all
    changes["samples"] = f.whole("n", 1, low=1, high=limits.answers)
    changes["seed"] = f.whole("seed", secrets.randbits(31), low=-(1 << 63), high=(1 << 64) - 1) & 0x7FFFFFFF
    changes["min_tokens"] = f.whole("min_tokens", 0)
    changes["stop"] = _stops(f) or own.stop
    changes["stop_ids"] = (*own.stop_ids, *_ids(f, "stop_token_ids"))
    changes["logprobs"] = _logprobs(f, chat)
    changes |= _constraint(f)
    changes |= dict(beams=1, length=None, min_length=0)
    most = f.whole("max_tokens", low=1 if chat else 0)
    most = f.whole("max_completion_tokens", most, low=1) if chat else most
    if most is None and service.own_length:
        most = own.tokens if limits.new_tokens is None else min(own.tokens, limits.new_tokens)
    elif most is None and not chat:
        most = COMPLETION_TOKENS if limits.new_tokens is None else min(COMPLETION_TOKENS, limits.new_tokens)
    if most is not None and limits.new_tokens is not None and most > limits.new_tokens:
        raise wrong("max_tokens", f"{most} is more than the {limits.new_tokens} that this server allows")
    return Settings(
        dataclasses.replace(own, **changes), most, _bias(f, service), None if name == service.name else name,
        priority=f.whole("priority", 0, low=-(1 << 31), high=1 << 31),
        keep_stop=f.flag("include_stop_str_in_output"), with_ids=f.flag("return_token_ids"),
        ignore_eos=f.flag("ignore_eos"),
        salt=f.text("cache_salt") or "",
    )  # fmt: skip


def _stops(f: Fields) -> tuple[str, ...]:
    value = f.raw("stop", [])
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise wrong("stop", "must be a text or a list of texts that aren't empty")
    if len(stops) > MOST_STOPS:
        raise wrong("stop", f"has {len(stops)} texts; this server allows {MOST_STOPS}")
    return tuple(stops)


def _ids(f: Fields, name: str) -> list[int]:
    ids = f.list(name, MOST_STOPS)
    if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
        raise wrong(name, "must be a list of token ids")
    return ids


def _logprobs(f: Fields, chat: bool) -> int | None:
    if not chat:
        return f.whole("logprobs", low=0, high=MOST_TOP)
    top = f.whole("top_logprobs", low=0, high=MOST_TOP)
    if not f.flag("logprobs"):
        if top:
            raise wrong("top_logprobs", "needs logprobs: true")
        return None
    return top or 0


def _bias(f: Fields, service: Service) -> dict[int, float]:
    given = f.object("logit_bias")
    if len(given) > MOST_BIASES:
        raise wrong("logit_bias", f"has {len(given)} entries; this server allows {MOST_BIASES}")
    out = {}
    for key, value in given.items():
        if not key.isdecimal() or not key.isascii() or len(key) > 9 or int(key) >= service.tokens.vocab_size:
            raise wrong("logit_bias", f"{key[:80]!r} is no token id; the vocabulary has {service.tokens.vocab_size}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise wrong("logit_bias", "values must be numbers from -100 to 100")
        out[int(key)] = float(value)
    return out


def _constraint(f: Fields) -> dict[str, Any]:
    """Returns what an answer must match: a JSON schema or a regular expression."""
    form, other = f.object("response_format"), f.object("structured_outputs")
    kind = form.get("type", "text")
    if other and kind != "text":
        raise wrong("structured_outputs", "leave it out, or response_format")
    if kind == "json_object":
        return {"json_schema": _schema("response_format", {"type": "object"})}
    if kind == "json_schema":
        described = form.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        return {"json_schema": _schema("response_format", schema)}
    if kind != "text":
        raise wrong("response_format", "type must be text, json_object or json_schema")
    if "json" in other:
        return {"json_schema": _schema("structured_outputs", other["json"])}
    if "choice" in other:
        choices = other["choice"]
        if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
            raise wrong("structured_outputs", "choice must be a list of texts")
        literal = [_PATTERN.sub(r"\\\g<0>", choice) for choice in choices]
        return {"regex": "|".join(f"({text})" for text in literal)}
    if "regex" in other:
        if not isinstance(other["regex"], str):
            raise wrong("structured_outputs", "regex must be a text")
        return {"regex": other["regex"]}
    if other:
        raise wrong("structured_outputs", "must have one of json, regex and choice")
    return {}


def _schema(field: str, schema: Any) -> str:
    if isinstance(schema, str):
        return schema
    if not isinstance(schema, dict | bool):
        raise wrong(field, "json_schema needs a schema, which is an object")
    if not isinstance(schema, dict):
        return json.dumps(schema)
    # A model that may write white space can go on with it for ever. A schema may say itself how it is to be read.
    space = {"whitespace_flexible": True, "whitespace_pattern": SPACE}
    return json.dumps({"x-guidance": space} | schema)


def token_lists(value: Any, most: int) -> list[Any]:
    """Returns the prompts of a field: one text, a list of texts, one list of token ids or a list of such lists."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise wrong("prompt", "must be a text, token ids, or a list of one of these that isn't empty")
    several: Sequence[Any] = [value] if isinstance(value[0], int) else value
    if len(several) > most:
        raise wrong("prompt", f"there are {len(several)} of them; this server allows {most}")
    return list(several)


def checked_ids(value: Any, vocab: int, field: str) -> list[int]:
    """Returns token ids. Raises an ApiError where something else is among them."""
    if not isinstance(value, list) or not value:
        raise wrong(field, "must be a text, token ids, or a list of one of these that isn't empty")
    for id in value:
        if isinstance(id, bool) or not isinstance(id, int):
            raise wrong(field, "mixes texts, numbers and lists")
        if not 0 <= id < vocab:
            raise wrong(field, f"{id} is no token id; the vocabulary has {vocab}")
    return value
