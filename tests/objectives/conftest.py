"""What the tests of objectives share: real tokenizers, real caches, small models, and the law that losses are sums."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers

from jaxlm.core import config, spec
from jaxlm.data import token_cache, tokenizer, train_tokenizer
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.objectives.objective import Objective

TEXTS = tuple(
    f"def area_{i}(width, height={i * 7 % 11}):\n    # naïve «größe» Δ={i}\n    return width * height + {i}\n" * 2
    + f"Two children number {i} are climbing on the frame of a swing set in the park, and the dog waits.\n"
    for i in range(40)
)


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.SentencePiece:
    return train_tokenizer.train_sentencepiece(TEXTS, tmp_path_factory.mktemp("sp") / "x.model", vocab_size=400)


@pytest.fixture(scope="session")
def t5_like() -> tokenizer.HuggingFace:
    """As T5's: </s> and <pad> but no BOS, a dummy prefix, sentinels whose ids fall."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    inner.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(100))])
    return tokenizer.HuggingFace(inner.to_str())


@pytest.fixture(scope="session")
def byte_level() -> tokenizer.HuggingFace:
    """As GPT-2's: <|endoftext|> alone, which then is BOS and EOS."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    return tokenizer.HuggingFace(inner.to_str())


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[[Sequence[str], Any], token_cache.Cache]:
    """A cache of these texts, in this order."""

    def make(texts: Sequence[str], tokens: Any) -> token_cache.Cache:
        folder = tmp_path / f"corpus{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for i, text in enumerate(texts):
            (folder / f"{i:04}.txt").write_bytes(text.encode())
        return token_cache.open_cache(token_cache.prepare(str(folder), tokens, tmp_path / "caches", workers=1)["train"])

    return make


@pytest.fixture(scope="session")
def model() -> Callable[[Any], tuple[Model, Any]]:
    """A model with random weights, biases and norms too, in float32."""

    def make(c: Any) -> tuple[Model, Any]:
        family = MODELS.of(c)
        specs = family.specs(c)
        layout = Layout(execution=config.Execution(dtype="float32", scan=True))
        generator = np.random.default_rng(5)
        weights = jax.tree.map(lambda s: generator.standard_normal(s.shape).astype(np.float32) / 2, specs,
                               is_leaf=spec.is_spec)  # fmt: skip
        return Model(family, c, specs, layout), weights

    return make


def stacked(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {k: np.stack([row[k] for row in rows]) for k in rows[0]}


@pytest.fixture(scope="session")
def summed() -> Callable[..., tuple[dict, dict]]:
    """(sums, totals) of rows as one batch, having proved that splits of them add up to the same gradient and sums.

    With `size` a batch is filled up with empty rows to so many: what is compiled for the largest serves them all. Sums
    of each row are also those of a batch that holds nothing else.
    """
    compiled: dict[tuple, tuple] = {}

    def programs(trained: Objective, c: Any, model: Model) -> tuple[Any, Any]:
        def objective(weights: Any, batch: dict, totals: dict) -> tuple[jax.Array, dict]:
            sums = trained.loss(c, model, weights, batch, None)
            return sum(sums[n]["loss"] / totals[n] for n in sums), sums

        forward = jax.jit(lambda weights, batch: trained.loss(c, model, weights, batch, None))
        made = compiled.setdefault((c, id(model)), (model, jax.jit(jax.grad(objective, has_aux=True)), forward))
        return made[1:]

    def run(
        trained: Objective, c: Any, model: Model, weights: Any, rows: Sequence[dict], size: int = 0
    ) -> tuple[dict, dict]:
        step, forward = programs(trained, c, model)
        blank = {k: np.zeros_like(v) for k, v in rows[0].items()}
        filled = lambda rows, n: stacked([*rows, *[blank] * (n - len(rows))])  # noqa: E731
        n = max(size, len(rows))
        totals = jax.tree.map(np.asarray, trained.totals(stacked(rows)))
        whole = step(weights, filled(rows, n), totals)
        parts = [step(weights, filled([row], n), totals) for row in rows]
        added = jax.tree.map(lambda *x: sum(np.asarray(y, np.float64) for y in x), *parts)
        scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(whole[0]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale), whole[0], added[0])
        alone = jax.tree.map(lambda *x: sum(map(float, x)), *[forward(weights, stacked([row])) for row in rows])
        for sums in (added[1], alone):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), whole[1], sums)
        return jax.device_get(whole[1]), jax.device_get(totals)

    return run
