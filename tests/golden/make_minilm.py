"""Writes tests/golden/minilm.npz: 100 texts, their token ids and vectors, by transformers from all-MiniLM-L6-v2.

Run it where PyTorch and transformers are installed: `python tests/golden/make_minilm.py FOLDER_OF_THE_MODEL`. Of each
vector every sixth number is kept, another sixth for each text, so that all dimensions are seen.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

LONGEST = 256  # as sentence_bert_config.json says

WHO = ["A baker", "The old captain", "My neighbour's cat", "Nobody", "Dr. Amélie Šimková"]
DOES = ["reads the newspaper", "does not trust the weather forecast", "bought 3.5 kg of flour", "is asleep"]
WHERE = ["at home.", "in São Paulo, near the river", "on the night train from Wien to Zürich;", "today?"]
ODD = [
    "", " ", "a", "ALL CAPITALS AND Ünïcödé", "don't split-this_up, please!!! (really)", "https://example.org/?q=1&lang=en",
    "日本語のテキスト と English", "an emoji \U0001f642 and a tab\tand\na line break", "x" * 120, 
    "né­gli­gé \u200b zero width",
    "A man is eating food.", "A man is eating a piece of bread.", "long " * 400,
    "The quick brown fox jumps over the lazy dog. " * 12, "1,234.56 + 7e-3 = ?", "def main(args: list[str]) -> int:",
    "Привет, мир", "مرحبا بالعالم", "ﬁne ligatures and ½ fractions", "\u0301 a lone accent",
]  # fmt: skip
TEXTS = [f"{who} {does} {where}" for who in WHO for does in DOES for where in WHERE] + ODD


def main(folder: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids, vectors = [], []
    for text in TEXTS:
        given = tokenizer(text, truncation=True, max_length=LONGEST, return_tensors="pt")
        with torch.no_grad():
            mean = model(**given).last_hidden_state[0].mean(0)
        ids.append(given["input_ids"][0].numpy().astype(np.int32))
        vectors.append((mean / mean.norm()).numpy())
    assert len(TEXTS) == 100
    np.savez_compressed(
        Path(__file__).parent / "minilm.npz",
        texts=np.array(TEXTS),
        ids=np.concatenate(ids),
        lengths=np.array([len(i) for i in ids]),
        vectors=np.stack([v[i % 6 :: 6] for i, v in enumerate(vectors)]),
    )


if __name__ == "__main__":
    main(sys.argv[1])
