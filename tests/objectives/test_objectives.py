"""Objectives: what is learned, what is never learned, and that every loss is a sum."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from jaxlm.core import config, spec
from jaxlm.data.tokenizer import Bytes
from jaxlm.models import MODELS, bert, llama
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.objectives import OBJECTIVES, causal, masked, next_sentence
from jaxlm.objectives.objective import RowShape

TOKENS = Bytes()
ROW = RowShape(24)
BOS, EOS, MASK = TOKENS.bos_id, TOKENS.eos_id, TOKENS.mask_id


def window(*texts: str, length: int = 24) -> dict[str, np.ndarray]:
    """A packed record `[length + 1]`: documents between BOS and EOS, then padding."""
    documents = [[BOS, *TOKENS.encode(text), EOS] for text in texts]
    n = sum(map(len, documents))
    assert n <= length + 1
    tokens = np.full(length + 1, TOKENS.pad_id, np.int32)
    segments, positions = np.zeros(length + 1, np.int32), np.zeros(length + 1, np.int32)
    tokens[:n] = np.concatenate(documents)
    segments[:n] = np.repeat(np.arange(1, len(documents) + 1), list(map(len, documents)))
    positions[:n] = np.concatenate([np.arange(len(d)) for d in documents])
    return {"tokens": tokens, "segments": segments, "positions": positions}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# -------------------------------------------------------------------------------------------------------------- causal


def test_causal_learns_every_token_but_the_first_of_each_document():
    """The end of a document is learned, its successor's beginning isn't: nothing could tell what comes next."""
    record = window("abc", "de")
    out = causal.example(causal.Config(), record, ROW, TOKENS, rng())
    learned = [(int(a), int(b)) for a, b, w in zip(out["tokens"], out["targets"], out["weights"], strict=True) if w]
    a, b, c, d, e = (ord(x) for x in "abcde")
    assert learned == [(BOS, a), (a, b), (b, c), (c, EOS), (BOS, d), (d, e), (e, EOS)]
    assert {k: v.shape for k, v in out.items()} == dict.fromkeys(out, (24,))
    assert out["positions"].tolist()[:9] == [0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_causal_learns_across_the_edge_of_a_window():
    """The token after the last input is a target: no token is lost between windows."""
    record = {k: np.full(9, v, np.int32) for k, v in (("tokens", 7), ("segments", 1), ("positions", 0))}
    assert causal.example(causal.Config(), record, ROW, TOKENS, rng())["weights"].tolist() == [1.0] * 8


# -------------------------------------------------------------------------------------------------------------- masked


def long_window(length: int = 4096) -> dict[str, np.ndarray]:
    text = "the quick brown fox jumps over the lazy dog " * 200
    return window(text[:1500], text[:2000], length=length)


def masked_example(c: masked.Config | None = None, record: dict | None = None, seed: int = 0) -> dict:
    return masked.example(c or masked.Config(), record or long_window(), ROW, TOKENS, rng(seed))


def chosen(out: dict) -> np.ndarray:
    return out["at"][out["weights"] > 0]


def test_masked_chooses_its_share_and_corrupts_80_10_10():
    record, mask, other, kept, n = long_window(), 0, 0, 0, 0
    before = record["tokens"][:-1]
    free = np.isin(before, [BOS, EOS, TOKENS.pad_id], invert=True)
    for seed in range(40):
        out = masked_example(record=record, seed=seed)
        at = chosen(out)
        assert len(np.unique(at)) == len(at) and (np.diff(at) > 0).all()
        assert len(at) == round(0.15 * free.sum())
        assert free[at].all(), "a special token was chosen"
        np.testing.assert_array_equal(out["targets"][: len(at)], before[at])
        untouched = np.setdiff1d(np.arange(len(before)), at)
        np.testing.assert_array_equal(out["tokens"][untouched], before[untouched])
        after = out["tokens"][at]
        mask += (after == MASK).sum()
        kept += (after == before[at]).sum()
        other += ((after != MASK) & (after != before[at])).sum()
        n += len(at)
    shares = np.array([mask, other, kept]) / n
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.01)


def test_masked_never_touches_the_record_it_was_given():
    record = long_window()
    before = record["tokens"].copy()
    masked_example(record=record)
    np.testing.assert_array_equal(record["tokens"], before)


def test_masking_is_drawn_anew_and_repeats_with_its_generator():
    a, b, again = (masked_example(seed=s) for s in (0, 1, 0))
    assert not np.array_equal(chosen(a), chosen(b))
    jax.tree.map(np.testing.assert_array_equal, a, again)


@pytest.mark.parametrize("length", [16, 24, 100, 4096])
def test_masked_positions_are_of_a_fixed_number(length):
    """Whatever a row holds, its arrays have one shape, which a context axis of up to 8 divides."""
    c = masked.Config()
    full = {k: np.ones(length + 1, np.int32) for k in ("tokens", "segments", "positions")}
    empty = {k: np.zeros(length + 1, np.int32) for k in ("tokens", "segments", "positions")}
    for record in (full, empty, window("x", length=length)):
        out = masked.example(c, record, ROW, TOKENS, rng())
        assert out["at"].shape == out["targets"].shape == out["weights"].shape == (masked.target_positions(c, length),)
    assert masked.target_positions(c, length) % 8 == 0 and masked.target_positions(c, length) >= 0.15 * length
    assert masked.example(c, empty, ROW, TOKENS, rng())["weights"].sum() == 0
    assert masked.example(c, window("x", length=length), ROW, TOKENS, rng())["weights"].sum() == 1  # at least one


def test_whole_words_are_chosen_or_left():
    record = window("aa bbb c dddd ee f", "gg hhh", length=40)
    words = [range(1, 3), range(3, 7), range(7, 9), range(9, 14), range(14, 17), range(17, 19)]
    words += [range(21, 23), range(23, 27)]  # white space begins a word; 19 and 20 are EOS and BOS
    c, seen = masked.Config(rate=0.3, whole_word=True), set()
    for seed in range(60):
        at = set(chosen(masked_example(c, record, seed)).tolist())
        assert len(at) <= round(0.3 * 24)
        whole = [i for i, w in enumerate(words) if at & set(w)]
        assert at == {p for i in whole for p in words[i]}, "a word was split"
        seen.update(whole)
    assert seen == set(range(len(words)))


@pytest.mark.parametrize(
    ("objective", "missing", "message"),
    [
        ("masked", {"mask_id": None}, "needs a mask token"),
        ("next_sentence", {"cls_id": None}, r"needs \[CLS\] and \[SEP\]"),
        ("next_sentence", {"sep_id": None}, r"needs \[CLS\] and \[SEP\]"),
        ("next_sentence", {"mask_id": None}, "needs a mask token"),
    ],
)
def test_a_tokenizer_without_what_is_needed_is_refused(objective, missing, message):
    ids = {"mask_id": 1, "cls_id": 2, "sep_id": 3} | missing
    module = OBJECTIVES[objective]
    with pytest.raises(ValueError, match=message):
        module.check(module.Config(), types.SimpleNamespace(**ids))
    module.check(module.Config(), TOKENS)


# ------------------------------------------------------------------------------------------------------- next sentence


def pair(first: str = "ab", second: str = "cde", is_next: int = 1) -> dict:
    a, b = (np.array(TOKENS.encode(text), np.int32) for text in (first, second))
    return {"first": a, "second": b, "is_next": np.int32(is_next)}


def test_next_sentence_layout():
    out = next_sentence.example(next_sentence.Config(masked_too=False), pair(), RowShape(12, "encoder"), TOKENS, rng())
    cls, sep, pad = TOKENS.cls_id, TOKENS.sep_id, TOKENS.pad_id
    a, b, c, d, e = (ord(x) for x in "abcde")
    assert out["tokens"].tolist() == [cls, a, b, sep, c, d, e, sep, pad, pad, pad, pad]
    assert out["types"].tolist() == [0] * 4 + [1] * 4 + [0] * 4
    assert out["segments"].tolist() == [1] * 8 + [0] * 4
    assert out["positions"].tolist() == list(range(12))
    assert (int(out["is_next"]), float(out["rows"])) == (1, 1.0)
    assert "at" not in out


def test_next_sentence_masks_text_alone():
    for seed in range(30):
        out = next_sentence.example(next_sentence.Config(), pair(is_next=0), RowShape(12, "encoder"), TOKENS, rng(seed))
        assert set(chosen(out)) <= {1, 2, 4, 5, 6}
        assert int(out["is_next"]) == 0


# --------------------------------------------------------------------------------------------------------- device half

SMALL = {
    "causal": llama.Config(vocab=264, layers=1, width=8, heads=2, kv_heads=1, head_width=4, ffn=8),
    "masked": bert.Config(vocab=264, layers=1, width=8, heads=2, ffn=8, positions=24, dropout=0.0),
    "next_sentence": bert.Config(vocab=264, layers=1, width=8, heads=2, ffn=8, positions=24, dropout=0.0),
}
SETTINGS = {
    "causal": causal.Config(label_smoothing=0.1, z_loss=1e-2),
    "masked": masked.Config(z_loss=1e-2),
    "next_sentence": next_sentence.Config(),
}


def rows(objective: str) -> list[dict]:
    """Rows with very different numbers of targets."""
    module = OBJECTIVES[objective]
    if module.records == "pairs":
        records = [
            pair("a", "b"),
            pair("abcdefgh", "ijklmnopq", 0),
            pair("xyz", "uvw" * 5),
            pair("a", "bc"),
        ]
    else:
        records = [window("a"), window("abcdefgh", "ijklmnopq"), window("xyz"), window("", "uvw" * 5)]
    return [module.example(SETTINGS[objective], r, ROW, TOKENS, rng(i)) for i, r in enumerate(records)]


def make(objective: str) -> tuple[Model, dict]:
    module, c = OBJECTIVES[objective], SMALL[objective]
    family = MODELS.of(c)
    specs = family.specs(c) | module.specs(SETTINGS[objective], c.width)
    layout = Layout(execution=config.Execution(dtype="float32", scan=True))
    generator = rng(5)
    weights = jax.tree.map(lambda s: generator.standard_normal(s.shape).astype(np.float32) / 2, specs,
                           is_leaf=spec.is_spec)  # fmt: skip
    return Model(family, c, specs, layout), weights


@pytest.mark.parametrize("objective", SMALL)
def test_losses_metrics_and_weights_of_rows_add_up(objective):
    """The loss of a batch is the sum over its rows, whatever else is in the batch."""
    module, (model, weights), examples = OBJECTIVES[objective], make(objective), rows(objective)
    f = jax.jit(lambda b: (module.loss(SETTINGS[objective], model, weights, b, None), module.totals(b)))
    stack = lambda part: {k: np.stack([e[k] for e in part]) for k in part[0]}  # noqa: E731
    whole = f(stack(examples))
    parts = [f(stack([e])) for e in examples]
    summed = jax.tree.map(lambda *x: sum(map(float, x)), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), whole, summed)
    assert set(whole[0]) == set(whole[1])
    assert all("loss" in part for part in whole[0].values())


@pytest.mark.parametrize("label", [0, 1])
def test_next_sentence_label_means_what_it_says(label):
    """With a head that says "yes" whatever it reads, pairs that do follow cost nothing and the others much. Label 0 is
    "is next" in Google's and Hugging Face's files, which the default reads; runs of version 0.1.0 had it at 1."""
    assert next_sentence.Config().next_label == 0
    model, weights = make("next_sentence")
    weights = weights | {
        "next_sentence": np.zeros((8, 2), np.float32),
        "next_sentence_bias": np.where(np.arange(2) == label, 20.0, 0.0).astype(np.float32),
    }
    c = dataclasses.replace(SETTINGS["next_sentence"], masked_too=False, next_label=label)
    for is_next, loss, hit in ((1, 0.0, 1.0), (0, 20.0, 0.0)):
        row = next_sentence.example(c, pair(is_next=is_next), RowShape(24, "encoder"), TOKENS, rng())
        out = next_sentence.loss(c, model, weights, {k: v[None] for k, v in row.items()}, None)["pairs"]
        np.testing.assert_allclose([out["loss"], out["accuracy"]], [loss, hit], atol=1e-4)


def test_masked_predicts_at_the_chosen_positions():
    """Equal to the plain way: all logits, then the chosen ones."""
    from jaxlm.nn.losses import logits

    model, weights = make("masked")
    row = {k: v[None] for k, v in rows("masked")[1].items()}
    c = masked.Config()
    got = masked.loss(c, model, weights, row, None)["masked"]
    z = jax.nn.log_softmax(logits(model.readout(weights, model.forward(weights, row).x_BTD), model.shard))[0]
    at, targets, w = (row[k][0] for k in ("at", "targets", "weights"))
    np.testing.assert_allclose(got["nll"], -(z[at, targets] * w).sum(), rtol=1e-5)
    np.testing.assert_allclose(got["accuracy"], ((z[at].argmax(-1) == targets) * w).sum())
