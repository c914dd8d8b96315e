"""The smaller answers: vectors, labels, names of models, tokens of texts, health and counters."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from jaxlm.inference.server import settings, wire
from jaxlm.inference.server.errors import ApiError, wrong
from jaxlm.inference.server.messages import read_choice, read_messages, read_variables
from jaxlm.inference.server.running import whole
from jaxlm.inference.server.service import Service
from jaxlm.inference.server.state import State, fields_of


async def embeddings(request: HttpRequest) -> Response:
    """Answers with a vector of each text, as numbers or as base64 of little-endian float32."""
    state, f = State.of(request), await fields_of(request)
    service, limits = state.service, state.limits
    name = settings.model_of(f, service)
    if service.embed is None:
        raise ApiError(400, f"model: {service.name} is {service.kind} and makes no vectors of texts; serve an encoder",
                       "model")  # fmt: skip
    form = f.text("encoding_format", "float")
    if form not in ("float", "base64"):
        raise wrong("encoding_format", "must be float or base64")
    width = f.whole("dimensions", low=1)
    given = _inputs(f.raw("input"), service, limits.inputs)
    f.log_unknown()

    async def made() -> Response:
        assert service.embed is not None
        try:
            vectors, read = await run_in_threadpool(service.embed, given)
        except ValueError as error:
            raise ApiError(400, f"input: {error}", "input") from None
        if width is not None and width != vectors.shape[1]:
            raise wrong("dimensions", f"this model's vectors have {vectors.shape[1]}")
        data = [dict(object="embedding", index=i, embedding=_encoded(v, form)) for i, v in enumerate(vectors)]
        usage = dict(prompt_tokens=read, total_tokens=read)
        return JSONResponse(dict(object="list", data=data, model=name, usage=usage))

    return await whole(request, made())


def _inputs(value: Any, service: Service, most: int) -> list[Any]:
    several: Sequence[Any] = [value] if isinstance(value, str) or (value and isinstance(value, list) and
                                                                   isinstance(value[0], int)) else value  # fmt: skip
    if not isinstance(several, list) or not several:
        raise wrong("input", "must be a text, token ids, or a list of one of these that isn't empty")
    if len(several) > most:
        raise wrong("input", f"there are {len(several)} of them; this server allows {most}")
    for one in several:
        if not isinstance(one, str):
            settings.checked_ids(one, service.tokens.vocab_size, "input")
        elif not one.strip():
            raise wrong("input", "a text is empty")
    return list(several)


def _encoded(vector: np.ndarray, form: str) -> Any:
    if form == "float":
        return [float(x) for x in vector]
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()


async def classify(request: HttpRequest) -> Response:
    """Answers with what a fine-tuned head says of each input: a text, or an object of an input's parts."""
    state, f = State.of(request), await fields_of(request)
    service, name = state.service, settings.model_of(f, state.service)
    if service.classify is None:
        raise ApiError(400, f"model: {service.name} is {service.kind} and labels nothing; serve a model that was "
                       "fine-tuned for a labelled task", "model")  # fmt: skip
    given = f.raw("input")
    several = given if isinstance(given, list) else [given]
    if not several or not all(isinstance(one, str | dict) for one in several):
        raise wrong("input", "must be a text or an object of an input's parts, or a list of these that isn't empty")
    if len(several) > state.limits.inputs:
        raise wrong("input", f"there are {len(several)} of them; this server allows {state.limits.inputs}")
    f.log_unknown()

    async def made() -> Response:
        assert service.classify is not None
        try:
            told = await run_in_threadpool(service.classify, several)
        except ValueError as error:
            raise ApiError(400, f"input: {error}", "input") from None
        data = [{"index": i} | one for i, one in enumerate(told)]
        return JSONResponse(wire.head("list", "classify", name) | {"data": data})

    return await whole(request, made())


async def models(request: HttpRequest) -> Response:
    """Answers with the names that requests may use: the model's, and those of its adapters."""
    service = State.of(request).service
    longest = None if service.engine is None else service.engine.limit
    data = [
        dict(id=name, object="model", created=service.created, owned_by="jaxlm", max_model_len=longest,
             root=service.name, parent=None if name == service.name else service.name)
        for name in service.names
    ]  # fmt: skip
    if (name := request.path_params.get("name")) is None:
        return JSONResponse({"object": "list", "data": data})
    found = [card for card in data if card["id"] == name]
    if not found:
        raise ApiError(404, f"model: {name[:200]!r} is not served here", "model", "model_not_found")
    return JSONResponse(found[0])


async def tokenize(request: HttpRequest) -> Response:
    """Answers with the token ids of a text, or of a conversation."""
    state, f = State.of(request), await fields_of(request)
    service = state.service
    settings.model_of(f, service)
    text = f.text("prompt")
    # `prompt` belongs to whoever asks, so special tokens in it are read as such unless this is turned off.
    add, special = f.flag("add_special_tokens", True), f.flag("parse_special", True)
    pieces = f.flag("return_token_strs")
    if text is None and f.raw("messages") is not None:
        if service.encode_chat is None:
            raise wrong("messages", "the model has no chat template")
        messages, choice, variables = read_messages(f, state.limits), read_choice(f, service), read_variables(f)
        variables |= {"tools": f.raw("tools")} if choice.tools else {}
        begins = f.flag("add_generation_prompt", True)
        try:
            ids, source = await run_in_threadpool(service.encode_chat, messages, variables, begins)
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", "messages") from None
        ids = ids if source is None else source
    elif text is not None:
        ids = await run_in_threadpool(_ids, service, text, add, special)
    else:
        raise wrong("prompt", "is missing; give it, or messages")
    f.log_unknown()
    longest = None if service.engine is None else service.engine.limit
    body: dict[str, Any] = dict(tokens=ids, count=len(ids), max_model_len=longest)
    return JSONResponse(body | ({"token_strs": [service.tokens.piece(id) for id in ids]} if pieces else {}))


def _ids(service: Service, text: str, add: bool, special: bool) -> list[int]:
    if add and service.encode_prompt is not None:
        ids, source = service.encode_prompt(text, True, special)
        return ids if source is None else source
    before, after = service.tokens.boundary_ids if add else ([], [])
    return [*before, *(service.tokens.encode_special(text) if special else service.tokens.encode(text)), *after]


async def detokenize(request: HttpRequest) -> Response:
    """Answers with the text of token ids."""
    state, f = State.of(request), await fields_of(request)
    service = state.service
    settings.model_of(f, service)
    ids = f.list("tokens")
    if ids:
        settings.checked_ids(ids, service.tokens.vocab_size, "tokens")
    f.log_unknown()
    return JSONResponse({"prompt": service.tokens.decode(ids)})


async def tokenizer_info(request: HttpRequest) -> Response:
    """Answers with the special tokens and the chat template, by which clients encode as the server does."""
    service = State.of(request).service
    kinds = ("bos", "eos", "pad", "unk")
    ids = (service.tokens.bos_id, service.tokens.eos_id, service.tokens.pad_id, service.tokens.unk_id)
    pieces = [None if id is None else service.tokens.piece(id) for id in ids]
    named = {f"{kind}_token": piece for kind, piece in zip(kinds, pieces, strict=True)}
    return JSONResponse(named | {"chat_template": service.template})


async def health(request: HttpRequest) -> Response:
    """Answers whether the server works; it needs no key."""
    engine = State.of(request).service.engine
    return Response(status_code=503 if engine is not None and engine.is_broken else 200)


async def metrics(request: HttpRequest) -> Response:
    """Answers with all counters in Prometheus' text format."""
    return Response(State.of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
