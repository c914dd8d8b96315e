"""Keys and values in a byte each: near what they stand for, small, and understood by all that reads on from a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.sized_models import SIZES
from support.tiny_models import published, random_weights

import jaxlm
from jaxlm.assembly import open_model
from jaxlm.core import config
from jaxlm.data.tokenizer import Bytes
from jaxlm.inference.engine import Engine, Request, Settings
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn.cache import empty_cache, encoded, in_few_bits, numbers
from jaxlm.nn.layout import Layout
from jaxlm.nn.row_rounding import FEW_BITS
from jaxlm.testing import FamilyLaws

TOKENS = Bytes()
LLAMA = dict(vocab=TOKENS.vocab_size, layers=2, width=16, heads=2, kv_heads=1, head_width=8, ffn=24)
KINDS = {
    "windowed": ("llama", LLAMA | dict(window=5, windowed=(True, False))),
    "t5": ("t5", dict(vocab=264, layers=1, width=16, heads=2, head_width=8, ffn=16)),
}
WORST = {"int8": 0.5 / 127, "fp8": 2.0**-4}  # of the largest magnitude of a head and token


class NearLaws(FamilyLaws):
    """Notes how far logits are apart, instead of refusing what rounding does to single ones."""

    def __init__(self, *what) -> None:
        super().__init__(*what)
        self.apart: list[float] = []

    def _same(self, got, expected, law: str) -> None:
        self.apart.append(float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))))


def model_of(kind: str, cache: config.CacheKind) -> Model:
    name, sizes = KINDS.get(kind) or SIZES[kind]
    family = MODELS[name]
    c = family.Config(**sizes)
    return Model(family, c, family.specs(c), Layout(execution=config.Execution(dtype="float32", cache=cache)))


@pytest.mark.parametrize(
    ("kind", "cache"),
    [("windowed", "int8"), ("t5", "fp8"), *(pytest.param("deepseek", c, marks=pytest.mark.slow) for c in FEW_BITS)],
)
def test_rows_are_read_on_as_at_once_but_for_rounding(kind, cache):
    model = model_of(kind, cache)
    stored = jax.eval_shape(lambda: model.init_cache(2, 8, jnp.float32)).layers[0]
    assert {x.dtype for name, x in stored.items() if not name.endswith("_scale")} == {jnp.dtype(FEW_BITS[cache])}
    laws = NearLaws(model.family, model.config)
    laws._model = model  # scans no layers, and changes nothing without a cache
    laws.check_cache()
    laws.check_cache_of_rows()
    assert len(laws.apart) == 5
    assert 0 < max(laws.apart) < {"int8": 0.05, "fp8": 0.2}[cache], "of the logits' size, as a root mean square"


@pytest.mark.parametrize("cache", FEW_BITS)
def test_each_head_and_token_has_its_own_scale(cache):
    x_BTKC = np.random.default_rng(0).standard_normal((2, 3, 2, 8)).astype(np.float32)
    x_BTKC[0, 1, 0] = 0
    x_BTKC[1, 2, 1, 3] = 1e4  # which spoils its own head of its own token alone
    made = encoded({"k": x_BTKC}, {"k": FEW_BITS[cache]})
    assert made["k"].nbytes == x_BTKC.size and made["k_scale"].shape == (2, 3, 2, 1)
    found = numbers({name: jnp.moveaxis(x, 1, 3) for name, x in made.items()})["k"]
    bound = WORST[cache] * np.abs(x_BTKC).max(-1, keepdims=True) * 1.0001
    assert (np.abs(found - x_BTKC) <= bound).all()
    assert not np.asarray(found)[0, 1, 0].any()
    assert np.abs(found - x_BTKC).max() > 0


def test_an_engine_reads_pages_of_few_bits_as_it_wrote_them():
    model = model_of("windowed", "int8")
    weights = jax.device_put(random_weights(model.specs))
    settings = Settings(length=32, rows=(1,), lengths=(32,), chunks=(16,), page_tokens=4, pages=8)
    plain = dataclasses.replace(model, shard=Layout(execution=config.Execution(dtype="float32")))
    engine = Engine(model, TOKENS, weights, settings, eos=(TOKENS.eos_id,))
    engine.start()
    assert engine.stats().slot_bytes == 2 * 2 * (8 + 4), "of two layers' keys and values of one head"
    try:
        prompt, s = tuple(b"ZYXWVUTSRQPONMLK"), Sampling(tokens=6, logprobs=1)
        first, again = (engine.submit(Request(prompt, s, ignore_eos=True)) for _ in range(2))
        one, two = ([(p.tokens, p.logprobs) for p in pieces] for pieces in (first, again))
    finally:
        engine.close()
    assert one == two and first.cached == 0 and again.cached >= 12
    [[alone]] = Generator(plain)(weights, [prompt], s)
    assert [t for tokens, _ in one for t in tokens][:1] == alone.tokens[:1]
    assert one[0][1][0] == pytest.approx(alone.logprobs[0], abs=0.05)


@pytest.mark.slow
def test_beams_share_what_was_read_in_few_bits():
    s, prompts = Sampling(tokens=4, beams=2), [tuple(b"abcd"), tuple(b"zy")]
    small, plain = (model_of("windowed", c) for c in ("int8", "dtype"))
    weights = jax.device_put(random_weights(small.specs))
    scores = [[each.score for [each] in Generator(m)(weights, prompts, s)] for m in (small, plain)]
    assert scores[0] == pytest.approx(scores[1], abs=0.05) and scores[0] != scores[1]


def test_a_place_is_opened_with_its_cache_in_few_bits_where_it_has_one(tmp_path):
    place = published(tmp_path / "llama")
    for asked, used in (("int8", "int8"), (None, "dtype")):
        assert jaxlm.open(place, cache=asked).pretrained.model.shard.execution.cache == used
    tokens = empty_cache([dict(tokens=jnp.zeros((1, 4), jnp.int32))], 1, 4)
    with pytest.raises(ValueError, match="cache: tokens of this model are no keys or values, so int8 stores nothing"):
        in_few_bits(tokens, "int8")
    with pytest.raises(ValueError, match=r"cache: .*bert is an encoder, which keeps no keys and values; leave it out"):
        open_model.with_cache(published(tmp_path / "bert", "bert"), "int8")
