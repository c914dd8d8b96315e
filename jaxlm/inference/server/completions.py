"""`/v1/completions` continues texts or lists of token ids, and says how likely they are."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from jaxlm.data.tokenizer import carries_space
from jaxlm.inference.engine import Piece, PromptScores
from jaxlm.inference.server import settings, wire
from jaxlm.inference.server.errors import ApiError, wrong
from jaxlm.inference.server.running import Events, Work, submit, to_json, whole
from jaxlm.inference.server.service import Prompt, Service
from jaxlm.inference.server.state import State, arrival, fields_of


@dataclass(frozen=True)
class Options:
    """Options say how answers are told."""

    echo: bool
    answers: bool
    """False: only the prompts are told, for no new token is wanted."""
    logprobs: int | None
    stream: bool
    usage: bool
    texts: tuple[str | None, ...]
    """The prompts as texts, where they were given so."""


@dataclass
class Choice:
    """A Choice becomes the text of one answer and what is told of its tokens."""

    state: State
    how: settings.Settings
    options: Options
    prompt: list[int]
    text: str | None
    reason: str | None = None
    stop: str | int | None = None
    ids: list[int] = field(default_factory=list)
    _lists: wire.CompletionLogprobs | None = None

    def begin(self, scores: PromptScores | None) -> tuple[str, dict[str, Any] | None]:
        """Returns the text and the lists that stand before the answer: the prompt's, where it is told too."""
        tokens = self.state.service.tokens
        text = ""
        if self.options.echo:
            text = tokens.decode(self.prompt) if self.text is None else self.text
        if self.options.logprobs is None:
            return text, None
        # The first word of a text has a space in its token, and none in the text.
        spaced = self.options.echo and text[:1] != " " and carries_space(tokens)
        self._lists = wire.CompletionLogprobs(tokens, -1 if spaced else 0)
        if not self.options.echo:
            return text, None
        assert scores is not None
        lists = self._lists.lists(self.prompt, scores.logprobs, scores.top)
        lists["text_offset"] = [max(0, at) for at in lists["text_offset"]]
        self._lists.at = len(text)
        return text, lists

    def read(self, piece: Piece) -> tuple[str, dict[str, Any] | None]:
        """Returns the text and the lists that a piece adds."""
        self.reason = piece.reason or self.reason
        if not self.options.answers:
            return "", None
        text = piece.text
        if piece.reason is not None:
            self.stop = piece.stop
            if self.how.keep_stop and isinstance(piece.stop, str):
                text += piece.stop
        self.ids += piece.tokens
        if self._lists is None or not piece.tokens:
            return text, None
        return text, self._lists.lists(piece.tokens, piece.logprobs, piece.top or [{}] * len(piece.tokens))


async def answer(request: HttpRequest) -> Response:
    """Answers a request."""
    arrived, state, f = arrival(request), State.of(request), await fields_of(request)
    service, limits = state.service, state.limits
    if service.engine is None or service.encode_prompt is None:
        raise ApiError(400, f"model: {service.name} is {service.kind} and writes no text", "model")
    how = settings.read(f, service, limits, chat=False)
    echo, given = f.flag("echo"), f.raw("prompt")
    if f.raw("suffix"):
        raise wrong("suffix", "this model fills no gaps; leave it out")
    if f.whole("best_of", how.sampling.samples) != how.sampling.samples:
        raise wrong("best_of", "must be the same as n, or left out")
    if echo and service.encodes_apart:
        raise wrong("echo", "an encoder-decoder does not go on from its prompt; leave it out")
    several = settings.token_lists(given, limits.inputs)
    prompts = await run_in_threadpool(_prompts, service, several, f.flag("add_special_tokens", True),
                                      f.flag("parse_special"))  # fmt: skip
    stream = f.flag("stream")
    if f.object("stream_options") and not stream:
        raise wrong("stream_options", "needs stream: true")
    texts = tuple(one if isinstance(one, str) else None for one in several)
    usage = bool(f.object("stream_options").get("include_usage"))
    options = Options(echo, how.most != 0, how.sampling.logprobs, stream, usage, texts)
    f.log_unknown()
    scores = how.sampling.logprobs if echo else None
    n, name = how.sampling.samples, f.text("model") or service.name
    asked = [how.request(prompt, service, limits, scores, row=i * n) for i, prompt in enumerate(prompts)]
    work = await submit(service, asked, arrived)
    choices = [
        Choice(state, how, options, list(prompts[i][0]), texts[i]) for i in range(len(prompts)) for _ in range(n)
    ]
    if stream:
        return Events(lambda send: _stream(send, state, work, choices, n, name))
    return await whole(request, _whole(state, work, choices, n, name))


def _prompts(service: Service, several: list[Any], add: bool, special: bool) -> list[Prompt]:
    assert service.encode_prompt is not None
    out: list[Prompt] = []
    for one in several:
        if isinstance(one, str):
            out.append(service.encode_prompt(one, add, special))
        else:
            ids = settings.checked_ids(one, service.tokens.vocab_size, "prompt")
            out.append(service.encode_prompt("", False, False) if service.encodes_apart else (ids, None))
            if service.encodes_apart:
                out[-1] = (out[-1][0], ids)
    return out


async def _whole(state: State, work: Work, choices: list[Choice], n: int, name: str) -> Response:
    texts = [""] * len(choices)
    lists: list[list[dict[str, Any]]] = [[] for _ in choices]
    begun: set[int] = set()
    async for i, piece in work.pieces(state.metrics, state.limits.seconds):
        at = i * n + piece.sample
        more = [choices[at].begin(work.answers[i].prompt_scores)] if at not in begun else []
        begun.add(at)
        for text, values in [*more, choices[at].read(piece)]:
            texts[at] += text
            lists[at] += [] if values is None else [values]
    out = []
    for at, choice in enumerate(choices):
        one = dict(index=at, text=texts[at], logprobs=wire.joined(lists[at]), finish_reason=choice.reason)
        if choice.how.with_ids:
            one |= dict(token_ids=choice.ids, prompt_token_ids=choice.prompt)
        out.append(one)
    if not choices[0].options.answers:
        work.new_tokens = 0
    body = wire.head("text_completion", "cmpl", name)
    return JSONResponse(body | {"choices": out, "usage": work.usage()})


async def _stream(
    send: Callable[[str], Awaitable[None]], state: State, work: Work, choices: list[Choice], n: int, name: str
) -> None:
    head, usage = wire.head("text_completion", "cmpl", name), choices[0].options.usage
    begun: set[int] = set()
    pieces = work.pieces(state.metrics, state.limits.seconds)
    try:
        async for i, piece in pieces:
            at = i * n + piece.sample
            more = [choices[at].begin(work.answers[i].prompt_scores)] if at not in begun else []
            begun.add(at)
            for text, lists in [*more, choices[at].read(piece)]:
                if text or lists is not None:
                    await send(to_json(head | _chunk(at, text, lists, None, usage)))
            if piece.reason is not None:
                await send(to_json(head | _chunk(at, "", None, choices[at].reason, usage)))
    finally:
        await pieces.aclose()
        work.abort()
    if not choices[0].options.answers:
        work.new_tokens = 0
    if usage:
        await send(to_json(head | {"choices": [], "usage": work.usage()}))


def _chunk(at: int, text: str, lists: Any, reason: str | None, usage: bool) -> dict[str, Any]:
    choice = dict(index=at, text=text, logprobs=lists, finish_reason=reason)
    return {"choices": [choice]} | ({"usage": None} if usage else {})
