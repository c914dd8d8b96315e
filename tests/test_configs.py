"""What configs say of themselves is what the benchmark of all tasks runs."""

import importlib.util
import sys
from pathlib import Path

import pytest

from jaxlm.commands import arguments, cli
from jaxlm.core import config_io

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tasks():
    file = ROOT / "benchmarks" / "tasks.py"
    if not file.is_file():
        pytest.skip("benchmarks are not part of this copy")
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location("tasks", file)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules["tasks"] = module  # dataclasses look there
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    sys.path.remove(str(file.parent))
    return module


def test_the_few_minutes_on_a_cpu_of_each_config_are_those_that_are_measured(tasks):
    for name, task in tasks.TASKS.items():
        file = ROOT / "configs" / f"{task.config}.py"
        about = " ".join(file.read_text("utf-8").split('"""')[1].split())
        assert "on a CPU" in about and task.quick in about, f"{file.name} does not say what {name} runs"


def test_the_commands_of_the_tasks_can_be_read(tasks):
    for task in tasks.TASKS.values():
        train, evaluate = (command.split()[1:] for command in task.commands())
        _, rest = arguments.parse(cli.command(train[0]), train[1:])
        start = rest.index("--start") if "--start" in rest else len(rest)
        whole = config_io.load(ROOT / "configs" / f"{task.config}.py")
        run = config_io.override(whole, rest[:start] + rest[start + 2 :])
        assert run.train.steps < whole.train.steps and run.name == Path(evaluate[1]).name
        assert not arguments.parse(cli.command(evaluate[0]), evaluate[1:])[1]
