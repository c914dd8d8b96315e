"""Writes the table of models in docs/how-to/models-and-files.md from the golden files.

`test_published.py` checks that it is current; `python tests/golden/make_table.py` writes it anew.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "how-to" / "models-and-files.md"
BEGIN, END = "<!-- models: made by tests/golden/make_table.py -->\n", "<!-- end of models -->\n"
# What users call the models whose config.json says so.
KNOWN = {
    "gpt2": "GPT-2",
    "llama": "Llama 1, 2, 3, 3.1, 3.2, 3.3; SmolLM 1, 2",
    "mistral": "Mistral",
    "smollm3": "SmolLM 3",
    "qwen2": "Qwen 2, 2.5",
    "qwen3": "Qwen 3",
    "phi3": "Phi 3, 3.5, 4",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "olmo2": "OLMo 2",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen 3 MoE",
    "deepseek_v2": "DeepSeek V2",
    "deepseek_v3": "DeepSeek V3, R1",
    "gpt_oss": "GPT-OSS",
    "bert": "BERT, MiniLM",
    "roberta": "RoBERTa",
    "xlm-roberta": "XLM-R",
    "distilbert": "DistilBERT",
    "mpnet": "MPNet",
    "modernbert": "ModernBERT",
    "t5": "T5, T5 v1.1, FLAN-T5",
    "mt5": "mT5",
    "bart": "BART",
    "mbart": "mBART",
}


def rows() -> dict[str, list[str]]:
    """Names of the variants of each `model_type`."""
    from support.hf_rows import ROWS

    found: dict[str, list[str]] = {}
    for name in ROWS:
        with np.load(TESTS / "golden" / "hf" / f"{name}.npz") as golden:
            found.setdefault(json.loads(str(golden["config"]))["model_type"], []).append(name)
    return found


def without_figures() -> list[str]:
    """The lines of the table up to the measured column."""
    from jaxlm.formats import gguf_names
    from jaxlm.models import MODELS

    told = {kind for a in gguf_names.ARCHITECTURES.values() for kind in a.model_types}
    lines = []
    for kind, names in rows().items():
        family = next(name for name, f in MODELS.items() if kind in f.MODEL_TYPES)
        gguf = "yes" if kind in told else "–"
        lines.append(f"| {KNOWN[kind]} | `{kind}` | `{family}` | {gguf} | {len(names)} |")
    return lines


def table() -> str:
    """With the largest difference of a logit from transformers', over a type's variants."""
    from models.test_published import answer, directory, open_model, real
    from support.hf_rows import ROWS

    largest = []
    for names in rows().values():
        found = []
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                directory(name, Path(folder) / "theirs")
                model, weights = open_model(Path(folder) / "theirs")
            expected, where = np.load(TESTS / "golden" / "hf" / f"{name}.npz")["expected"], real(ROWS[name].inputs)
            found.append(float(np.abs(answer(model, weights, ROWS[name])[where] - expected[where]).max()))
        largest.append(max(found))
    head = "| models | `model_type` | family | GGUF | variants compared | largest difference |\n"
    lines = [f"{line} {x:.1e} |\n" for line, x in zip(without_figures(), largest, strict=True)]
    return f"{head}{'|---' * 6}|\n{''.join(lines)}"


def main() -> None:
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1], "utf-8")


if __name__ == "__main__":
    main()
