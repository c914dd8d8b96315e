"""pass@k by hand, real problems with their solutions, and the command from prompts to results."""

import itertools
import json
import os
from pathlib import Path

import pytest
from support.tiny_models import published

from jaxlm.commands import cli
from jaxlm.evaluation import pass_at_k, sandbox

ROWS = [
    dict(task_id="a/0", prompt='def add(a, b):\n    """Sum."""\n', canonical_solution="    return a + b\n",
         test="def check(f):\n    assert f(1, 2) == 3\n    assert f(-1, 1) == 0\n", entry_point="add"),
    dict(task_id="a/1", prompt="from typing import List\n\ndef last(xs: List[int]) -> int:\n",
         canonical_solution="    return xs[-1]\n", test="def check(f):\n    assert f([1, 2]) == 2\n",
         entry_point="last"),
]  # fmt: skip
# The published problems (HumanEval.jsonl), where one has them.
HUMANEVAL = os.environ.get("JAXLM_TEST_HUMANEVAL")


@pytest.fixture(scope="module")
def box():
    try:
        return sandbox.opened(seconds=20)[0]
    except ValueError as error:
        pytest.skip(f"programs can't be shut in here: {error}")


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_pass_at_k_counts_the_subsets_with_a_right_one():
    for n, right in ((5, 2), (4, 0), (4, 4), (6, 1)):
        for k in range(1, n + 1):
            draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
            assert pass_at_k.pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    with pytest.raises(ValueError, match=r"pass@10 needs at least 10 samples .* raise `samples`"):
        pass_at_k.pass_at_k(4, 1, 10)


def test_solutions_pass_and_wrong_answers_do_not(box, file):
    problems = pass_at_k.read(str(file))
    assert problems[0].prompt.endswith('"""') and problems[0].solution == "\n    return a + b\n"
    wrong = ["\n    return a - b\n", "\n    while True: pass\n"]
    box = pass_at_k.Sandbox(seconds=3)
    judged = pass_at_k.judge(problems, [[problems[0].solution, *wrong], [problems[1].solution] * 3], box, 2)
    assert [[s["passed"] for s in row["samples"]] for row in judged] == [[True, False, False], [True] * 3]
    assert judged[0]["samples"][1]["why"] == "AssertionError: "
    assert judged[0]["samples"][2]["why"] == "not done after 3 s"
    sample = pass_at_k.sample(problems, judged, [1, 2])
    found = {k: float(v[0]) for k, v in sample.figures(sample.counts_NM.sum(0)[None]).items()}
    assert found == pytest.approx({"pass@1": (1 / 3 + 1) / 2, "pass@2": (2 / 3 + 1) / 2})


@pytest.mark.slow
def test_every_published_solution_passes_and_no_empty_answer(box):
    if not HUMANEVAL:
        pytest.skip("the published problems are not here; name their HumanEval.jsonl in JAXLM_TEST_HUMANEVAL")
    problems = pass_at_k.read(HUMANEVAL)
    judged = pass_at_k.judge(problems, [[p.solution, "\n    pass\n"] for p in problems], box, 2)
    assert all([s["passed"] for s in row["samples"]] == [True, False] for row in judged)


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    for change, what in (
        (dict(test=None), r"p.jsonl:1: no text 'test'"), (dict(entry_point="f(); x"), "is no name of a function"),
    ):  # fmt: skip
        path.write_text(json.dumps(ROWS[0] | change))
        with pytest.raises(ValueError, match=what):
            pass_at_k.read(str(path))
    path.write_text("")
    with pytest.raises(ValueError, match="holds no problem"):
        pass_at_k.read(str(path))


def test_the_command_line(box, file, tmp_path, capsys, monkeypatch):
    model = published(tmp_path / "m", positions=256)
    args = ["eval", str(model), "--code", str(file), "--out", str(tmp_path / "out"), "--tokens", "8"]
    assert cli.main(args) == 2 and "say so with --run-generated-code" in capsys.readouterr().err
    args.append("--run-generated-code")
    assert cli.main([*args, "--samples", "3"]) == 2 and "--temperature: at 0" in capsys.readouterr().err
    assert cli.main([*args, "--k", "2"]) == 2 and "raise --samples" in capsys.readouterr().err
    assert cli.main([*args, "--k", "x"]) == 2 and "--k: 'x'" in capsys.readouterr().err
    assert (
        cli.main([*args, "--seconds", "0"]) == 2
        and "--seconds: 0.0 is out of range; it must be above 0" in capsys.readouterr().err
    )
    more = ["--samples", "3", "--temperature", "0.8", "--k", "1,3", "--resamples", "200", "--json"]
    assert cli.main([*args, *more, "--against", str(model)]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    held = json.loads((tmp_path / "out/results.json").read_text())
    assert held["figures"] == record["figures"] == {"pass@1": 0.0, "pass@3": 0.0}
    assert held["differences"]["problems"]["pass@1"]["p"] is None and held["sandbox"] == "whole"
    rows = [json.loads(line) for line in (tmp_path / "out/code.jsonl").read_text().splitlines()]
    assert [r["task_id"] for r in rows] == ["a/0", "a/1"] and all(len(r["samples"]) == 3 for r in rows)
    assert len({s["completion"] for s in rows[0]["samples"]}) == 3
