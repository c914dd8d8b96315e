"""What a task's predictions get wrong is told by classes, confusions and the examples that the model was surest of."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.evaluation import mistakes, samples

SINGLE = SimpleNamespace(kind="single", labels=("a", "b", "c"))


def told(scores, c, true, predicted, losses=None, words=()):
    classes = samples.by_class(scores, c, true, predicted)
    places = [f"f.tsv, line {i + 1}" for i in range(len(true))]
    found = mistakes.mistakes(
        scores, c, true, predicted, classes, places, losses or {}, lambda i: (f"text {i}", words[i] if words else ())
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_classes_confusions_and_the_hardest_wrong_examples():
    losses = {"f.tsv, line 2": 0.5, "f.tsv, line 4": 3.0, "f.tsv, line 1": 9.0}
    found = told("classes", SINGLE, ["a", "a", "b", "c", "c"], ["a", "b", "b", "a", "a"], losses)
    assert (found["over"], found["wrong"]) == (5, 3)
    assert found["confusion"] == {"labels": ["a", "b", "c"], "counts": [[1, 1, 0], [0, 1, 0], [2, 0, 0]], "left_out": 0}
    assert found["classes"]["a"] == {"precision": pytest.approx(1 / 3), "recall": 0.5, "f1": 0.4, "support": 2}
    assert [(x["where"], x["true"], x["found"], x["loss"]) for x in found["hardest"]] == [
        ("f.tsv, line 4", "c", "a", 3.0), ("f.tsv, line 2", "a", "b", 0.5), ("f.tsv, line 5", "c", "a", None)
    ], "those with the greatest loss first, and those whose loss isn't known last"  # fmt: skip
    assert found["hardest"][0]["text"] == "text 3"


def test_of_many_labels_those_with_the_most_mistakes_are_kept():
    labels = [f"l{i}" for i in range(40)]
    true = [*labels, "l39", "l39", "l7"]
    predicted = [*labels, "l38", "l38", "l39"]
    found = mistakes.confusion(true, predicted, labels)
    assert len(found["labels"]) == mistakes.MOST_CONFUSED and found["left_out"] == 40 - mistakes.MOST_CONFUSED
    assert {"l7", "l38", "l39"} < set(found["labels"])
    i, j = found["labels"].index("l39"), found["labels"].index("l38")
    assert found["counts"][i][j] == 2 and found["counts"][j][i] == 0


def test_each_kind_of_answer_is_said_in_words():
    tags = SimpleNamespace(labels=("O", "B-LOC"))
    found = told("tags", tags, [["B-LOC", "O"]], [["O", "O"]], words=[("Oslo", "is")])
    assert (found["hardest"][0]["true"], found["hardest"][0]["found"]) == ("Oslo: B-LOC", "Oslo: O")
    assert found["confusion"]["counts"] == [[1, 0], [1, 0]]
    found = told("choices", SimpleNamespace(), [0, 2], [0, 1])
    assert (found["hardest"][0]["true"], found["hardest"][0]["found"]) == ("C", "B")
    assert found["confusion"]["labels"] == ["A", "B", "C"] and "classes" not in found
    found = told("spans", SimpleNamespace(), [("Oslo", "in Oslo"), ()], [[("the Oslo", 1.0)], [("Bergen", 2.0)]])
    assert found["wrong"] == 1, "an article is no mistake"
    assert (found["hardest"][0]["true"], found["hardest"][0]["found"]) == ("no answer", "Bergen")
    several = SimpleNamespace(kind="multi", labels=("a", "b"))
    found = told("classes", several, [["a", "b"], []], [["a"], []])
    assert (found["hardest"][0]["true"], found["hardest"][0]["found"]) == ("a, b", "a") and "confusion" not in found


def test_numbers_are_not_right_or_wrong():
    losses = {"f.tsv, line 1": 0.25, "f.tsv, line 2": np.float64(4.0)}
    found = told("classes", SimpleNamespace(kind="regression", labels=()), [1.0, 2.0], [1.5, 4.0], losses)
    assert found["wrong"] is None and [x["true"] for x in found["hardest"]] == ["2", "1"]
