"""`/v1/chat/completions` answers conversations, as a whole or piece by piece."""

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from jaxlm.inference.engine import Piece
from jaxlm.inference.server import settings, wire
from jaxlm.inference.server.errors import ApiError, wrong
from jaxlm.inference.server.fields import Fields
from jaxlm.inference.server.messages import Choice, read_choice, read_messages, read_variables
from jaxlm.inference.server.running import Events, Work, submit, to_json, whole
from jaxlm.inference.server.state import State, arrival, fields_of
from jaxlm.inference.server.tool_calls import Call, Reader, required_schema


class Options(NamedTuple):
    """Options say how an answer is told."""

    stream: bool
    usage: bool
    """Whether a stream ends with the counts of tokens."""
    running_usage: bool
    """Whether every chunk has them."""


class Told(NamedTuple):
    """A Told is what a piece of an answer adds to its message."""

    parts: list[str | Call]
    logprobs: list[dict[str, Any]] | None
    ids: list[int]
    reason: str | None


class Answer:
    """An Answer makes messages of the pieces of one answer; `sample` is its number."""

    def __init__(self, state: State, choice: Choice, how: settings.Settings, constrained: bool) -> None:
        calls = state.service.calls
        self.tokens, self.how = state.service.tokens, how
        self.mark = None if calls is None else self.tokens.id_of(calls.begin)
        if self.mark is not None and self.tokens.bytes_per_token[self.mark]:
            self.mark = None  # its text comes with the other text
        reads = choice.may and calls is not None and (choice.must or not constrained)
        self.reader = Reader(calls, choice.names, choice.must) if reads and calls is not None else None

    def read(self, piece: Piece) -> Told:
        """Returns what a piece adds."""
        text, last = piece.text, piece.reason is not None
        if last and self.how.keep_stop and isinstance(piece.stop, str):
            text += piece.stop
        parts: list[str | Call] = [text] if text else []
        if self.reader is not None:
            parts = self.reader.read(text, last, marked=self.mark is not None and self.mark in piece.tokens)
        reason: str | None = piece.reason
        if reason == "stop" and self.reader is not None and self.reader.called:
            reason = "tool_calls"
        logprobs = wire.chat_logprobs(self.tokens, piece) if self.how.sampling.logprobs is not None else None
        return Told(parts, logprobs, list(piece.tokens), reason)


async def answer(request: HttpRequest) -> Response:
    """Answers a request."""
    arrived, state, f = arrival(request), State.of(request), await fields_of(request)
    service, limits = state.service, state.limits
    if service.engine is None or service.encode_chat is None:
        why = "has no chat template; name one with --template" if service.engine else "writes no text"
        raise ApiError(400, f"model: {service.name} is {service.kind} and {why}", "model")
    how = settings.read(f, service, limits, chat=True)
    messages, choice, variables = read_messages(f, limits), read_choice(f, service), read_variables(f)
    constrained = how.sampling.json_schema is not None or how.sampling.regex is not None
    if choice.must:
        if constrained:
            raise wrong("response_format", "leave it out where a tool must be called, or tool_choice")
        try:
            schema = required_schema(choice.tools)
        except ValueError as error:
            raise wrong("tools", str(error)) from None
        how = dataclasses.replace(how, sampling=dataclasses.replace(how.sampling, json_schema=schema))
    if choice.tools:
        variables["tools"] = f.raw("tools")
    options, begins = _options(f), f.flag("add_generation_prompt", True)
    f.log_unknown()
    try:
        prompt = await run_in_threadpool(service.encode_chat, messages, variables, begins)
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", "messages") from None
    asked = how.request(prompt, service, limits)
    work = await submit(service, [asked], arrived)
    name = f.text("model") or service.name
    answers = [Answer(state, choice, how, constrained) for _ in range(asked.sampling.samples)]
    if options.stream:
        return Events(lambda send: _stream(send, state, work, answers, options, name))
    return await whole(request, _whole(state, work, answers, name))


def _options(f: Fields) -> Options:
    stream, given = f.flag("stream"), f.object("stream_options")
    if given and not stream:
        raise wrong("stream_options", "needs stream: true")
    values = []
    for name in ("include_usage", "continuous_usage_stats"):
        if not isinstance(given.get(name, False), bool):
            raise wrong(f"stream_options.{name}", "must be true or false")
        values.append(bool(given.get(name)))
    return Options(stream, *values)


async def _whole(state: State, work: Work, answers: list[Answer], name: str) -> Response:
    messages: list[dict[str, Any]] = [{"content": "", "calls": [], "logprobs": [], "ids": []} for _ in answers]
    reasons: list[str | None] = [None] * len(answers)
    async for _, piece in work.pieces(state.metrics, state.limits.seconds):
        told, message = answers[piece.sample].read(piece), messages[piece.sample]
        for part in told.parts:
            if isinstance(part, Call):
                message["calls"].append(wire.call_fields(part))
            else:
                message["content"] += part
        message["logprobs"] += told.logprobs or []
        message["ids"] += told.ids
        reasons[piece.sample] = told.reason or reasons[piece.sample]
    choices = []
    for i, (m, reason) in enumerate(zip(messages, reasons, strict=True)):
        said: dict[str, Any] = {"role": "assistant", "content": m["content"], "refusal": None}
        if m["calls"]:
            said |= {"content": m["content"].strip() or None, "tool_calls": m["calls"]}
        logprobs = {"content": m["logprobs"]} if answers[i].how.sampling.logprobs is not None else None
        choices.append(dict(index=i, message=said, logprobs=logprobs, finish_reason=reason))
        if answers[i].how.with_ids:
            choices[-1]["token_ids"] = m["ids"]
    body = wire.head("chat.completion", "chatcmpl", name) | {"choices": choices, "usage": work.usage()}
    if answers[0].how.with_ids:
        body["prompt_token_ids"] = list(work.requests[0].prompt)
    return JSONResponse(body)


async def _stream(
    send: Callable[[str], Awaitable[None]], state: State, work: Work, answers: list[Answer], options: Options, name: str
) -> None:
    head = wire.head("chat.completion.chunk", "chatcmpl", name)
    usage = {"usage": None} if options.usage else {}

    async def chunk(i: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> None:
        choice = dict(index=i, delta=delta, logprobs=None, finish_reason=reason) | more
        counts = {"usage": work.usage()} if options.running_usage else usage
        await send(to_json(head | {"choices": [choice]} | counts))

    called = [0] * len(answers)
    pieces = work.pieces(state.metrics, state.limits.seconds)
    try:
        for i in range(len(answers)):
            await chunk(i, {"role": "assistant", "content": ""})
        async for _, piece in pieces:
            i, told = piece.sample, answers[piece.sample].read(piece)
            more: dict[str, Any] = {} if told.logprobs is None else {"logprobs": {"content": told.logprobs}}
            if answers[i].how.with_ids:
                more["token_ids"] = told.ids
            parts: list[str | Call] = told.parts or ([""] if told.logprobs else [])
            for part in parts:
                delta: dict[str, Any] = {"content": part}
                if isinstance(part, Call):
                    delta = {"tool_calls": [{"index": called[i]} | wire.call_fields(part)]}
                    called[i] += 1
                await chunk(i, delta, **more)
                more = {}
            if told.reason is not None:
                await chunk(i, {}, told.reason)
    finally:
        await pieces.aclose()
        work.abort()
    if options.usage:
        await send(to_json(head | {"choices": [], "usage": work.usage()}))
