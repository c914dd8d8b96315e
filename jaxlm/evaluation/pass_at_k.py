"""Programs that a model writes, judged by tests: pass@k of problems in HumanEval's format (Chen et al. 2021)."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.labelled import tables
from jaxlm.evaluation import samples
from jaxlm.evaluation.bootstrap import Sample
from jaxlm.evaluation.sandbox import Sandbox

# What begins after a function's body (Chen et al. 2021, section 2).
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


class Problem(NamedTuple):
    name: str
    prompt: str
    """Without white space at its end, which a model's tokens begin with rather than follow."""
    test: str
    entry: str
    solution: str = ""

    def program(self, completion: str) -> str:
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry})\n"


def read(source: str) -> list[Problem]:
    found = []
    for i, row in enumerate(tables.read(source)):
        cells = [row.cells.get(name) for name in ("prompt", "test", "entry_point")]
        for name, cell in zip(("prompt", "test", "entry_point"), cells, strict=True):
            if not isinstance(cell, str) or not cell.strip():
                raise ValueError(f"{row.where}: no text {name!r}; --code takes problems in HumanEval's format")
        prompt, test, entry = map(str, cells)
        if not entry.isidentifier():
            raise ValueError(f"{row.where}: entry_point {entry!r} is no name of a function; correct the file")
        body = str(row.cells.get("canonical_solution") or "")
        solution = prompt[len(prompt.rstrip()) :] + body if body else ""
        found.append(Problem(str(row.cells.get("task_id", i)), prompt.rstrip(), test, entry, solution))
    if not found:
        raise ValueError(f"--code: {source} holds no problem")
    return found


def pass_at_k(n: int, right: int, k: int) -> float:
    """How likely one of k samples is right, of n of which `right` are: 1 - C(n - right, k) / C(n, k), unbiased."""
    if not 1 <= k <= n:
        raise ValueError(f"--k: pass@{k} needs at least {k} samples of each problem and there are {n}; raise --samples")
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - right + 1, n + 1)))


def judge(
    problems: Sequence[Problem], completions: Sequence[Sequence[str]], box: Sandbox, workers: int = 1,
    done: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Of each problem its name and, of each completion, whether it passed and why not. Runs what it is given."""

    def one(job: tuple[Problem, str]) -> dict[str, Any]:
        problem, completion = job
        found = box.run(problem.program(completion))
        done()
        return dict(completion=completion, passed=found.passed, why=found.why)

    jobs = [(p, c) for p, several in zip(problems, completions, strict=True) for c in several]
    with ThreadPoolExecutor(workers) as pool:
        found = iter(list(pool.map(one, jobs)))
    return [
        dict(task_id=p.name, samples=[next(found) for _ in several])
        for p, several in zip(problems, completions, strict=True)
    ]


def sample(problems: Sequence[Problem], judged: Sequence[dict[str, Any]], ks: Sequence[int]) -> Sample:
    """pass@k of each problem, whose means are the figures."""
    right = [[s["passed"] for s in problem["samples"]] for problem in judged]
    values = {f"pass@{k}": [pass_at_k(len(row), sum(row), k) for row in right] for k in ks}
    return samples.means(values, [tuple(p) for p in problems])
