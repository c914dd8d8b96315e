"""An engine: the same answers as alone, whatever else is in the batch, and nothing left over afterwards."""

import asyncio
import dataclasses
import json
import random
import threading
from functools import cache

import jax
import numpy as np
import pytest

from jaxlm.core import config, spec
from jaxlm.data.tokenizer import Bytes
from jaxlm.inference import stream
from jaxlm.inference.engine import Engine, EngineFull, Request, Settings
from jaxlm.inference.engine import engine as engine_module
from jaxlm.inference.engine.answer import NO_TOKEN, NOT_FINITE, Answer
from jaxlm.inference.engine.pages import Pages
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.runtime.mesh import make_mesh
from jaxlm.weights.adapters import METHODS, per_row
from jaxlm.weights.adapters.adapted import Adapted

TOKENS = Bytes()
V = TOKENS.vocab_size
LLAMA = dict(vocab=V, layers=2, width=16, heads=2, kv_heads=1, head_width=8, ffn=24)
KINDS = {
    "llama": ("llama", LLAMA),
    "windowed": ("llama", LLAMA | dict(window=9, windowed=(True, False))),
    "gpt2": ("gpt2", dict(vocab=V, layers=1, width=16, heads=2, positions=64)),
    "t5": ("t5", dict(vocab=V, layers=1, width=16, heads=2, head_width=8, ffn=24)),
    "bart": ("bart", dict(vocab=V, layers=1, width=16, heads=2, ffn=24, positions=64)),
    "two kv heads": ("llama", LLAMA | dict(kv_heads=2)),
}
SMALL = Settings(length=64, rows=(1, 4), lengths=(32, 64), chunks=(16,), cache_tokens=4 * 64, page_tokens=4, source=16)
USUAL = ("llama", "windowed", "t5")
SETTINGS = (
    {},
    dict(stop=("a", "gh")),
    dict(min_tokens=4, repetition_penalty=1.3, frequency_penalty=0.7),
    dict(no_repeat_ngram=2, banned_ids=(97, 98)),
    dict(regex="[ab]{3,9}x"),
)


@cache
def model_of(kind: str, **mesh) -> tuple[Model, dict]:
    name, sizes = KINDS[kind]
    family = MODELS[name]
    c = family.Config(**sizes)
    layout = Layout.of(config.Mesh(**mesh), config.Execution(dtype="float32"))
    rng, specs = np.random.default_rng(1), family.specs(c)
    one = lambda s: (rng.standard_normal(s.shape) / 2 + (s.role == "norm")).astype(np.float32)  # noqa: E731
    return Model(family, c, specs, layout), jax.tree.map(one, specs, is_leaf=spec.is_spec)


_engines: dict = {}


def engine_of(kind: str, settings: Settings = SMALL, **more) -> Engine:
    """Returns an engine that all tests of its kind share, as compiling takes most of the time."""
    key = kind, settings, tuple(more)
    if key not in _engines:
        model, weights = model_of(kind)
        _engines[key] = Engine(model, TOKENS, weights, settings, eos=(TOKENS.eos_id,), **more)
        _engines[key].start()
    return _engines[key]


@pytest.fixture(autouse=True, scope="module")
def _closed():
    yield
    for one in _engines.values():
        one.close()
    _engines.clear()


def random_request(rng: random.Random, kind: str) -> Request:
    words = lambda n: tuple(rng.choice(b"abcdefgh ") for _ in range(n))  # noqa: E731
    s = Sampling(tokens=rng.randint(1, 24), **rng.choice(SETTINGS))
    if kind in ("t5", "bart"):
        return Request((TOKENS.bos_id,), s, source=words(rng.randint(1, 16)))
    start = rng.choice([(), tuple(b"the same beginning of a prompt"[: rng.randint(8, 30)])])
    return Request(start + words(rng.randint(1, 10)), s)


def collected(pieces) -> tuple[str, list[int], str]:
    text, tokens, reason = "", [], None
    for piece in pieces:
        assert reason is None, "a piece after the last"
        text, tokens, reason = text + piece.text, [*tokens, *piece.tokens], piece.reason
    return text, tokens, reason


def settled(one: Engine):
    assert one._idle.wait(30) or not one._open
    for _ in range(200):
        s = one.stats()
        if not s.running and not s.waiting and not one._rows.is_busy:
            return s
        threading.Event().wait(0.01)
    raise AssertionError(f"rows are left over: {s}")


@pytest.mark.parametrize(
    ("kind", "count"),
    [*((kind, 20) for kind in USUAL), *(pytest.param(kind, 100, marks=pytest.mark.slow) for kind in KINDS)],
)
def test_many_requests_at_once_get_the_answers_that_each_gets_alone(kind, count):
    model, weights = model_of(kind)
    generate, rng, one = Generator(model, (TOKENS.eos_id,)), random.Random(kind), engine_of(kind)
    params = generate.prepare(weights)
    requests = [random_request(rng, kind) for _ in range(count)]
    under_way = [one.submit(r) for r in requests]
    for request, answering in zip(requests, under_way, strict=True):
        source = None if request.source is None else [request.source]
        alone = stream.answers(generate, TOKENS, params, [request.prompt], request.sampling, source)[0][0]
        text, tokens, reason = collected(answering)
        assert (text, reason) == (alone.text, alone.completion.reason), request
        assert tokens == alone.completion.tokens, request
    s = settled(one)
    assert s.pages_free + s.pages_cached == s.pages and not s.pages_used
    assert s.pages == 0 or s.prefix_hits > 0


def test_the_same_seed_draws_the_same_answer_alone_and_in_a_batch():
    one = engine_of("llama")
    s = Sampling(tokens=12, temperature=1.5, top_p=0.9, top_k=40, min_p=0.01, samples=3, seed=7, logprobs=1)

    def draw() -> list:
        out: dict = {}
        for piece in one.submit(Request(tuple(b"once upon"), s)):
            out.setdefault(piece.sample, []).extend(piece.tokens)
        return [out[i] for i in range(3)]

    alone = draw()
    others = [one.submit(random_request(random.Random(i), "llama")) for i in range(6)]
    assert draw() == alone
    assert len({tuple(tokens) for tokens in alone}) == 3
    assert [collected(o)[2] for o in others]
    assert [len(t) for t in alone] == [12, 12, 12]


def test_draws_follow_the_settings_of_their_own_row():
    one = engine_of("llama")
    hot = one.submit(Request(tuple(b"ab"), Sampling(tokens=20, temperature=50.0, seed=1)))
    cold = one.submit(Request(tuple(b"ab"), Sampling(tokens=20, temperature=50.0, top_k=1, seed=1)))
    greedy = one.submit(Request(tuple(b"ab"), Sampling(tokens=20)))
    hot, cold, greedy = collected(hot)[1], collected(cold)[1], collected(greedy)[1]
    assert cold == greedy
    assert hot != greedy


def test_log_probabilities_are_those_of_the_model_for_answers_and_prompts():
    model, weights = model_of("llama")
    generate, one = Generator(model, (TOKENS.eos_id,)), engine_of("llama")
    s, prompt = Sampling(tokens=6, logprobs=3, repetition_penalty=1.5), tuple(b"a prompt of some length")
    alone = generate(weights, [prompt], s)[0][0]
    answering = one.submit(Request(prompt, s, prompt_logprobs=2))
    pieces = list(answering)
    got = [p for piece in pieces for p in piece.logprobs]
    np.testing.assert_allclose(got, alone.logprobs, atol=1e-4)
    tops = [t for piece in pieces for t in piece.top]
    assert [list(t) for t in tops] == [list(t) for t in alone.top]
    scores = answering.prompt_scores
    assert scores.logprobs[0] is None and len(scores.logprobs) == len(prompt)
    for i in (1, 8, len(prompt) - 1):  # what the model says of the next token when it has read so many
        after = generate(weights, [prompt[:i]], Sampling(tokens=1, logprobs=V))[0][0].top[0]
        np.testing.assert_allclose(scores.logprobs[i], after[prompt[i]], atol=1e-4)
        assert list(scores.top[i]) == sorted(after, key=after.get)[::-1][:2]


def test_a_text_that_begins_as_another_did_is_read_from_its_pages():
    one = engine_of("llama")
    prompt = tuple(b"ZYXWVUTSRQPONMLKJIHGFEDCBA")
    first = one.submit(Request(prompt, Sampling(tokens=8)))
    answer = collected(first)
    settled(one)
    again = one.submit(Request(prompt + tuple(answer[1]) + tuple(b"??"), Sampling(tokens=2)))
    collected(again)
    assert first.cached == 0
    assert again.cached >= len(prompt) + 4
    other = one.submit(Request(prompt, Sampling(tokens=2), salt="another tenant"))
    collected(other)
    assert other.cached == 0


def test_rows_wait_where_longer_ones_need_the_cache_and_go_on_as_if_nothing_was():
    tight = dataclasses.replace(SMALL, cache_tokens=4 * 32)  # four rows of 32, or two of 64 which nothing rounds to
    one = engine_of("llama", tight)
    requests = [Request(tuple(b"prompt %d" % i), Sampling(tokens=40, banned_ids=(TOKENS.eos_id,))) for i in range(4)]
    got = [collected(a) for a in [one.submit(r) for r in requests]]
    wide = engine_of("llama")
    assert got == [collected(wide.submit(r)) for r in requests]
    assert settled(one).preemptions > 0


def test_prompts_that_are_read_both_ways_stay_so_when_rows_had_to_wait():
    model, weights = model_of("llama")
    tight = dataclasses.replace(SMALL, cache_tokens=4 * 32)
    one = engine_of("llama", tight, both_ways=True)
    generate = Generator(model, (TOKENS.eos_id,), both_ways=True)
    s = Sampling(tokens=40, banned_ids=(TOKENS.eos_id,))
    prompts = [tuple(b"prompt %d of some length" % i) for i in range(4)]
    got = [collected(a)[1] for a in [one.submit(Request(p, s)) for p in prompts]]
    assert got == [generate(weights, [p], s)[0][0].tokens for p in prompts]
    assert got != [Generator(model, (TOKENS.eos_id,))(weights, [p], s)[0][0].tokens for p in prompts]
    assert settled(one).preemptions > 0 and not one.stats().pages


def test_guesses_that_are_judged_leave_greedy_answers_as_they_are():
    guessing = engine_of("llama", dataclasses.replace(SMALL, lookup=3))
    requests = [Request(tuple(b"abcabcabcab"), Sampling(tokens=n, stop=("zz",))) for n in (30, 31, 2, 17)]
    requests += [random_request(random.Random(i), "llama") for i in range(6)]
    one = engine_of("llama")
    for each in (requests[:1], requests[:4], requests):
        got = [collected(a) for a in [guessing.submit(r) for r in each]]
        assert got == [collected(one.submit(r)) for r in each]
    s = settled(guessing)
    assert s.guessed_right > 0 and s.guessed > s.guessed_right


def test_lower_priorities_go_first():
    one = engine_of("llama")
    s = Sampling(tokens=30, banned_ids=(TOKENS.eos_id,))
    filling = [one.submit(Request(tuple(b"fill"), s)) for _ in range(4)]
    late = one.submit(Request(tuple(b"late"), Sampling(tokens=1), priority=1))
    urgent = one.submit(Request(tuple(b"urgent"), Sampling(tokens=1), priority=-1))
    for a in (*filling, late, urgent):
        collected(a)
    assert urgent.times.first < late.times.first


def test_an_aborted_answer_ends_and_leaves_its_place():
    one = engine_of("llama")
    before = settled(one)
    s = Sampling(tokens=50, banned_ids=(TOKENS.eos_id,))
    several = [one.submit(Request(tuple(b"abort me"), s)) for _ in range(9)]
    pieces = iter(several[0])
    next(pieces)
    for a in several:
        a.abort()
    reasons = [collected(several[0])[2], *(collected(a)[2] for a in several[1:])]
    assert reasons == ["abort"] * 9
    after = settled(one)
    assert after.aborted - before.aborted == 9
    assert not after.pages_used
    assert collected(one.submit(Request(tuple(b"x"), Sampling(tokens=3))))[2] == "length"


def test_a_coroutine_reads_answers_and_others_go_on_meanwhile():
    one = engine_of("llama")
    request = Request(tuple(b"async"), Sampling(tokens=9, banned_ids=(TOKENS.eos_id,)))

    async def read():
        return [p async for p in one.submit(request)]

    async def both():
        return await asyncio.gather(read(), read())

    first, second = asyncio.run(both())
    assert collected(first) == collected(second) == collected(one.submit(request))


def test_answers_match_a_schema():
    one = engine_of("llama")
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
              "additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}  # fmt: skip
    s = Sampling(tokens=40, json_schema=json.dumps(schema))
    for prompt in (b"{", b"a number"):
        text, _, reason = collected(one.submit(Request(tuple(prompt), s)))
        assert (json.loads(text)["n"] in (1, 2), reason) == (True, "stop")


def test_adapters_share_a_batch():
    model, weights = model_of("llama")
    rng = np.random.default_rng(3)
    each = []
    for _ in range(2):
        adapted = Adapted(METHODS["lora"].Config(rank=2), model.family, model.config)
        made = adapted.specs()["adapter"]
        draw = lambda s: rng.standard_normal(s.shape).astype(np.float32)  # noqa: E731
        each.append((adapted, jax.tree.map(draw, made, is_leaf=spec.is_spec)))
    mixed, own = per_row.mix(each, [0, 1], each[0][0].disabled)
    masks = {name: np.asarray(own["rows"][i]) for i, name in enumerate(("one", "two"))}
    with Engine_(dataclasses.replace(model, adapter=mixed), weights | {"adapter": own}, masks) as served:
        s = Sampling(tokens=10, banned_ids=(TOKENS.eos_id,))
        names = ["one", None, "two", "one", "two", None]
        under_way = [served.submit(Request(tuple(b"shared prompt"), s, adapter=n)) for n in names]
        got = dict(zip(names, [collected(a)[1] for a in under_way], strict=True))
        with pytest.raises(ValueError, match="adapter: three is not among this engine's; there are: one, two"):
            served.submit(Request((1,), s, adapter="three"))
    for i, name in enumerate(("one", "two")):
        alone = Generator(dataclasses.replace(model, adapter=each[i][0]), (TOKENS.eos_id,))
        wanted = alone(weights | {"adapter": each[i][1]}, [tuple(b"shared prompt")], s)[0][0].tokens
        assert got[name] == wanted
    assert got[None] == Generator(model, (TOKENS.eos_id,))(weights, [tuple(b"shared prompt")], s)[0][0].tokens
    assert len({tuple(t) for t in got.values()}) == 3


class Engine_:
    """An engine of its own that is closed in the end."""

    def __init__(self, model, weights, adapters=None, settings=SMALL, mesh=None, **more):
        self.engine = Engine(
            model, TOKENS, weights, settings, eos=(TOKENS.eos_id,), adapters=adapters, mesh=mesh, **more
        )

    def __enter__(self) -> Engine:
        self.engine.start()
        return self.engine

    def __exit__(self, *_):
        self.engine.close()


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(fsdp=4, tensor=2)])
def test_on_a_mesh_answers_are_those_of_one_device(sizes):
    c = config.Mesh(**sizes)
    kind = "two kv heads"
    model, weights = model_of(kind, **sizes)
    mesh = make_mesh(c)
    weights = jax.device_put(weights, model.shard.shardings(model.specs, mesh))
    few = dataclasses.replace(SMALL, rows=(4,), lengths=(64,), chunks=(16,))
    requests = [random_request(random.Random(i), kind) for i in range(6)]
    with Engine_(model, weights, settings=few, mesh=mesh) as meshed:
        got = [collected(a) for a in [meshed.submit(r) for r in requests]]
    one = engine_of(kind, few)
    assert got == [collected(one.submit(r)) for r in requests]


def test_what_cannot_be_met_is_refused_by_name():
    one = engine_of("llama")

    def ask(prompt=(1, 2), s=None, **more):
        return one.submit(Request(prompt, s or Sampling(tokens=4), **more))

    for message, call in {
        "prompt: is empty": lambda: ask(()),
        f"prompt: {V} is not a token": lambda: ask((V,)),
        "prompt: 62 tokens and an answer of 4 are more than the 64 that fit": lambda: ask((1,) * 62),
        "sampling.beams: an engine has no beam search": lambda: ask(s=Sampling(beams=2)),
        "sampling.logprobs: 21 are more than 20": lambda: ask(s=Sampling(logprobs=21)),
        "sampling.regex": lambda: ask(s=Sampling(regex="(")),
        "source: an encoder-decoder needs one": lambda: ask(source=(1,)),
        "logit_bias: -1 is not a token": lambda: ask(logit_bias={-1: 2.0}),
        "logit_bias: a value is not finite": lambda: ask(logit_bias={1: float("nan")}),
    }.items():
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            call()
    with pytest.raises(EngineFull, match="answers wait already"):
        ask(s=Sampling(tokens=4, samples=SMALL.queue + 1, temperature=1.0))
    assert settled(one).waiting == 0


@pytest.mark.parametrize(
    "settings",
    [
        dict(regex="[ab]{3,9}x", banned_ids=(97, 98)),  # the grammar and the rest leave nothing in common
        dict(allowed_ids=(97,), banned_ids=(97,), min_tokens=3),
    ],
)
def test_an_answer_that_no_token_may_follow_ends_alone(settings):
    one = engine_of("llama")
    other = one.submit(Request(tuple(b"go on"), Sampling(tokens=20, banned_ids=(TOKENS.eos_id,))))
    *_, last = one.submit(Request(tuple(b"x"), Sampling(tokens=9, **settings)))
    assert (last.reason, last.error, last.tokens) == ("error", NO_TOKEN, ())
    assert collected(other)[2] == "length"
    assert not one.is_broken


def test_as_many_answers_wait_as_may_whoever_asks_for_counters():
    model, weights = model_of("llama")
    few = dataclasses.replace(SMALL, rows=(1,), lengths=(32,), length=32, chunks=(16,), queue=3)
    with Engine_(model, weights, settings=few) as one:
        held = threading.Event()
        one._send(held.wait)  # the engine's thread stands still
        waiting = [one.submit(Request((1, 2), Sampling(tokens=2))) for _ in range(3)]
        assert one.stats().waiting == 3
        with pytest.raises(EngineFull, match="3 answers wait already"):
            one.submit(Request((1, 2), Sampling(tokens=2)))
        held.set()
        assert [collected(a)[2] for a in waiting] == ["length"] * 3


def test_requests_of_one_seed_draw_apart_where_they_say_so():
    one = engine_of("llama")
    s = Sampling(tokens=10, temperature=2.0, seed=3)
    ask = lambda row: collected(one.submit(Request(tuple(b"same"), s, row=row)))[1]  # noqa: E731
    assert ask(0) == ask(0) != ask(1)


def test_a_request_that_comes_while_an_engine_is_drained_is_answered_or_refused(monkeypatch):
    model, weights = model_of("llama")
    few = dataclasses.replace(SMALL, rows=(1,), lengths=(32,), length=32, chunks=(16,))
    with Engine_(model, weights, settings=few) as one:

        def drained_meanwhile(*given):
            one.drain(0)
            threading.Event().wait(0.2)
            return Answer(*given)

        monkeypatch.setattr(engine_module, "Answer", drained_meanwhile)
        found = []

        def ask():
            try:
                found.append(collected(one.submit(Request((1, 2), Sampling(tokens=2))))[2])
            except RuntimeError as error:
                found.append(str(error))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(20)
        assert found in (["length"], ["the engine does not run"])


def test_a_drained_engine_ends_what_it_has_and_refuses_more():
    model, weights = model_of("llama")
    few = dataclasses.replace(SMALL, rows=(1,), lengths=(64,), chunks=(16,), pages=0)
    with Engine_(model, weights, settings=few) as one:
        last = one.submit(Request((1, 2), Sampling(tokens=30, banned_ids=(TOKENS.eos_id,))))
        assert one.drain(30)
        with pytest.raises(RuntimeError, match="the engine does not run"):
            one.submit(Request((1, 2), Sampling(tokens=3)))
        assert collected(last)[2] == "length"


def test_logits_that_are_not_finite_end_an_answer_with_an_error():
    model, weights = model_of("llama")
    few = dataclasses.replace(SMALL, rows=(1,), lengths=(32,), length=32, chunks=(16,))
    broken = weights | {"embed": weights["embed"].copy()}
    broken["embed"][7] = np.nan
    with Engine_(model, broken, settings=few) as one:
        *_, last = one.submit(Request((1, 7, 2), Sampling(tokens=3)))
        assert (last.reason, last.error) == ("error", NOT_FINITE)
        assert collected(one.submit(Request((1, 2), Sampling(tokens=3))))[2] == "length"
        assert one.stats().failed == 1


def test_pages_are_free_cached_or_used_and_the_longest_unused_goes_first():
    book = Pages(3, 2)
    a, b = book.names([1, 2, 3, 4]), book.names([1, 2, 5, 6, 7])
    assert a[0] == b[0] and a[1] != b[1] and len(b) == 2
    assert book.names([1, 2], "x") != book.names([1, 2])
    first = book.add(a)
    (shared, new) = book.add(b)
    assert not shared and {*first, new} == {1, 2, 3}
    assert (book.free, book.cached, book.used) == (0, 0, 3)
    assert book.add(book.names([9, 9])) == []  # nothing is left
    book.release(a)
    assert (book.free, book.cached, book.used) == (0, 1, 2)
    assert book.find(a) == first
    book.release(a)
    book.release(b)
    assert (book.free, book.cached, book.used) == (0, 3, 0)
    book.add(book.names([9, 9]))
    assert len(book.find(a)) == 1  # of the text that was used longest ago the last page went
