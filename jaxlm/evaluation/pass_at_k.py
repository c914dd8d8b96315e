"""Tests judge the programs that a model writes: pass@k of problems in HumanEval's format (Chen et al. 2021)."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.labelled import tables
from jaxlm.evaluation import samples
from jaxlm.evaluation.bootstrap import Sample
from jaxlm.evaluation.sandbox import Sandbox

# These texts begin what follows a function's body (Chen et al. 2021, section 2).
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


class Problem(NamedTuple):
    """A problem is a prompt to complete, a test, and the name (`entry`) of the function that the test checks.

    The prompt has no white space at its end: a model's tokens begin with it rather than follow it.
    """

    name: str
    prompt: str
    test: str
    entry: str
    solution: str = ""

    def program(self, completion: str) -> str:
        """Returns the completed program with its test, to be run."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry})\n"


def read(source: str) -> list[Problem]:
    """Reads problems from a table (a path, or what else `tables.read` takes) with HumanEval's column names.

    Raises a ValueError that names the row where a column is missing or empty.
    """
    problems = []
    for i, row in enumerate(tables.read(source)):
        cells = [row.cells.get(name) for name in ("prompt", "test", "entry_point")]
        for name, cell in zip(("prompt", "test", "entry_point"), cells, strict=True):
            if not isinstance(cell, str) or not cell.strip():
                raise ValueError(f"{row.where}: no text {name!r}; `code` takes problems in HumanEval's format")
        prompt, test, entry = map(str, cells)
        if not entry.isidentifier():
            raise ValueError(f"{row.where}: entry_point {entry!r} is no name of a function; correct the file")
        body = str(row.cells.get("canonical_solution") or "")
        solution = prompt[len(prompt.rstrip()) :] + body if body else ""
        problems.append(Problem(str(row.cells.get("task_id", i)), prompt.rstrip(), test, entry, solution))
    if not problems:
        raise ValueError(f"code: {source} holds no problem")
    return problems


def pass_at_k(n: int, right: int, k: int) -> float:
    """Returns the unbiased estimate of the chance that one of k samples is right: 1 - C(n - right, k) / C(n, k).

    `right` of the n samples are right. Raises a ValueError where k > n (Chen et al. 2021).
    """
    if not 1 <= k <= n:
        raise ValueError(f"k: pass@{k} needs at least {k} samples of each problem and there are {n}; raise `samples`")
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - right + 1, n + 1)))


def judge(
    problems: Sequence[Problem], completions: Sequence[Sequence[str]], box: Sandbox, workers: int = 1,
    done: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Runs every completion in the sandbox; returns, by problem, whether each one passed and why not.

    `done` is called after each run.
    """

    def run(job: tuple[Problem, str]) -> dict[str, Any]:
        problem, completion = job
        verdict = box.run(problem.program(completion))
        done()
        return dict(completion=completion, passed=verdict.passed, why=verdict.why)

    jobs = [(p, c) for p, several in zip(problems, completions, strict=True) for c in several]
    with ThreadPoolExecutor(workers) as pool:
        results = iter(list(pool.map(run, jobs)))
    return [
        dict(task_id=p.name, samples=[next(results) for _ in several])
        for p, several in zip(problems, completions, strict=True)
    ]


def sample(problems: Sequence[Problem], judged: Sequence[dict[str, Any]], ks: Sequence[int]) -> Sample:
    """Returns the sample whose figures are the means of each problem's pass@k."""
    right = [[s["passed"] for s in problem["samples"]] for problem in judged]
    values = {f"pass@{k}": [pass_at_k(len(passed), sum(passed), k) for passed in right] for k in ks}
    return samples.means(values, [tuple(p) for p in problems])
