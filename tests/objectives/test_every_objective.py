"""What holds for every objective of the table: rows of one shape, losses that are sums, weights that are learned."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jaxlm.assembly import corpus
from jaxlm.assembly.run_objective import BoundObjective, bind, row_shape
from jaxlm.core import config
from jaxlm.data.tokenizer import Bytes
from jaxlm.models import MODELS, bert, llama, t5
from jaxlm.objectives import OBJECTIVES
from jaxlm.testing import check_objective

T, WIDTH = 32, 16
SMALL = {
    "decoder": llama.Config(vocab=384, layers=1, width=WIDTH, heads=2, kv_heads=1, head_width=8, ffn=16),
    "encoder": bert.Config(vocab=384, layers=1, width=WIDTH, heads=2, ffn=16, positions=T, dropout=0.0),
    "encoder_decoder": t5.Config(vocab=384, layers=1, width=WIDTH, heads=2, head_width=8, ffn=16),
}
ANIMALS = ("dog", "cat", "owl", "fox", "hen", "bee")
TEXTS = [dict(text=f"the {a} sees {b} and {a}s " * 3, source=f"a {a}", target=f"{b}!") for a in ANIMALS for b in "xyz"]
LABELLED = [dict(text=f"a {a}", label=a[0] in "doc") for a in ANIMALS]
CHATS = [dict(question=f"a {a}?", answer="yes " * i) for i, a in enumerate(ANIMALS, 1)]
PREFERENCES = [dict(prompt=f"{a}?", chosen=f"a {a}", rejected="no") for a in ANIMALS]
QUESTIONS = [dict(question="who?", context=f"it is {a}", answers=[dict(text=a, answer_start=6)]) for a in ANIMALS]
CHOICES = [dict(context=a, choices=["is", "was"], answer=i % 2) for i, a in enumerate(ANIMALS)]
RELATED = [dict(text=f"<e1>{a}</e1> or <e2>me</e2>", label=str(i % 2)) for i, a in enumerate(ANIMALS)]
LINES = {
    "sft": CHATS, "preference": PREFERENCES, "classify": LABELLED, "answer": QUESTIONS, "choice": CHOICES,
    "relate": RELATED,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {"infill": dict(sentinels=("<cls>", "<sep>", "<mask>"))}


def bound(name: str, file: Path) -> BoundObjective:
    """The objective with settings for these texts, and without dropout."""
    objective = OBJECTIVES[name]
    settings = objective.infer_from_data(objective.Config(**SETTINGS.get(name, {})), [str(file)])
    if "dropout" in {f.name for f in dataclasses.fields(settings)}:
        settings = dataclasses.replace(settings, dropout=0.0)
    out = bind(settings, Bytes(), row_shape(T, SMALL[objective.models[0]]))
    out.check()
    return out


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_keeps_every_law(name: str, tmp_path: Path) -> None:
    """On records of a small file, as a run makes them of it."""
    file = tmp_path / ("words.txt" if name == "tag" else "lines.jsonl")
    if name == "tag":
        file.write_text("".join(f"a O\n{animal} B-X\n\n" for animal in ANIMALS))
    else:
        file.write_text("".join(json.dumps(line) + "\n" for line in LINES.get(name, TEXTS)))
    task = bound(name, file)
    data = config.Data(train=(str(file),), valid=(str(file),), cache=str(tmp_path / "cache"), tokenize_workers=1)
    records = corpus.as_records(task, corpus.corpus(data, task).train[0], document_mask=True, seed=0)
    c = SMALL[task.objective.models[0]]
    check_objective(task.objective, task.settings, records, MODELS.of(c), c, seq_len=T)
