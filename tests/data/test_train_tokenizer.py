"""A vocabulary learned from text: the same from the same text, whatever its order."""

import random

import pytest

from jaxlm.data import train_tokenizer

TEXTS = [
    f"def {name}({name}_w: float, height: float = 2.0) -> float:\n"
    f'    """The area."""\n    if {name}_w < 0:\n        raise ValueError(f"width={{{name}_w!r}}")\n\n'
    f"    return {name}_w * height\n\n\nclass Shape:\n"
    "    def __init__(self, sides):\n        self.sides = [side for side in sides if side]\n\n"
    for name in ("alpha", "beta", "gamma", "delta", "eps")
]


def test_training_depends_on_the_texts_and_the_seed_alone(tmp_path):
    def train(texts, seed=0, max_bytes=1000):
        return train_tokenizer.train_sentencepiece(
            texts, tmp_path / "x.model", vocab_size=330, seed=seed, max_bytes=max_bytes
        ).model

    texts = [text[i : i + 100] for text in TEXTS for i in range(0, 400, 100)]
    first = train(texts)
    assert train(texts) == train(texts[::-1]) == first
    assert train(texts, seed=1) != first
    assert train(texts, max_bytes=1 << 20) != first


def test_the_sample_is_the_same_for_any_order_of_the_texts():
    rng = random.Random(0)
    texts = [f"{i} " + "x" * rng.choice([1, 10, 500]) for i in range(300)]
    want = train_tokenizer._sample(texts, 0, 5000)
    assert 3000 < sum(map(len, want)) <= 5000
    for _ in range(20):
        rng.shuffle(texts)
        assert train_tokenizer._sample(texts, 0, 5000) == want
    assert train_tokenizer._sample(texts, 1, 5000) != want


def test_training_is_quiet_and_faults_are_clear(tmp_path, capfd):
    train_tokenizer.train_sentencepiece(TEXTS, tmp_path / "x.model", vocab_size=330)
    assert capfd.readouterr() == ("", "")
    for texts, size, words in (
        ([], 300, "no text"),
        (TEXTS, 50, "vocabulary of 50 does not"),
        (["ab"], 9000, "too high"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            train_tokenizer.train_sentencepiece(texts, tmp_path / "y.model", vocab_size=size)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "y.model").exists()
    with pytest.raises(ValueError, match=r"must end in \.model"):
        train_tokenizer.train_sentencepiece(TEXTS, tmp_path / "y.txt")
