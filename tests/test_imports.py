"""Importing jaxlm is light, and changes nothing in the process that imports it."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import jaxlm

ROOT = Path(jaxlm.__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "jaxlm").rglob("*.py")
)
LIGHT = (
    "core.config",
    "core.config_io",
    "core.errors",
    "core.tree",
    "commands.cli",
    "runtime.launchers",
    "runtime.processes",
)
WITHOUT_JAX = [name for name in MODULES
               if name.removeprefix("jaxlm.") in LIGHT or name.startswith("jaxlm.data")]  # fmt: skip


def run_python(code: str, *args: str):
    """What `code` prints as JSON when it runs in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Each is imported from nothing: a module that only works behind another one fails.
IMPORT_EACH = """
import importlib, json, sys
found, clean = {}, set(sys.modules)
for name in sys.argv[1:]:
    importlib.import_module(name)
    found[name] = sorted({"jax", "jaxlib"} & set(sys.modules))
    for loaded in set(sys.modules) - clean:
        if loaded.partition(".")[0] == "jaxlm" or found[name]:
            del sys.modules[loaded]
print(json.dumps(found))
"""


def test_configs_data_and_the_command_line_import_no_jax():
    assert len(WITHOUT_JAX) > len(LIGHT)
    assert run_python(IMPORT_EACH, *WITHOUT_JAX) == {name: [] for name in WITHOUT_JAX}


# jax sets two variables of its own when it is imported: that is not our doing, so it comes first.
IMPORT_ALL = """
import importlib, json, logging, os, signal, sys, warnings
import jax
import numpy as np
from jax._src import xla_bridge

def settings():
    return {
        **{f"${name}": value for name, value in os.environ.items()},
        **{f"jax.config.{name}": repr(value) for name, value in jax.config.values.items()},
        "devices taken": xla_bridge.backends_are_initialized(),
        "float errors": np.geterr(),
        "folder": os.getcwd(),
        "log level": logging.getLogger().level,
        "signals": [repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
    }

before = settings()
for name in sys.argv[1:]:
    importlib.import_module(name)
after = settings()
print(json.dumps({
    "changed": sorted(key for key in before | after if before.get(key) != after.get(key)),
    "foreign": sorted({"torch", "tensorflow"} & set(sys.modules)),
}))
"""


def test_importing_every_module_changes_no_setting_and_takes_no_device():
    found = run_python(IMPORT_ALL, *MODULES)
    assert found["changed"] == []
    assert found["foreign"] == []


# What each of these loads besides the standard library: a heavy package would be waited for at every start.
LOADED = """
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    import jaxlm
    if sys.argv[1:] != ["import"]:
        from jaxlm.commands import cli
        cli.main(sys.argv[1:])
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names))))
"""


@pytest.mark.parametrize(
    ("arguments", "without"),
    [
        (["import"], {"jax", "numpy", "tyro", "yaml"}),
        (["--help"], {"jax", "numpy", "tyro", "yaml"}),
        (["--version"], {"jax", "numpy", "tyro", "yaml"}),
        (["trian"], {"jax", "numpy", "tyro", "yaml"}),
        (["train", "--help"], {"jax", "numpy"}),
        (["eval", "--help"], {"jax", "numpy"}),
        (["grow", "--help"], {"jax", "numpy"}),
        (["shrink", "--help"], {"jax", "numpy"}),
        (["merge", "--help"], {"jax", "numpy"}),
        (["eval", "m", "--bachtes", "3"], {"jax", "numpy"}),
        (["train", "no_such_config"], {"jax", "numpy"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_start_loads_nothing_heavy(arguments, without):
    loaded = set(run_python(LOADED, *arguments))
    assert "jaxlm" in loaded
    assert not loaded & without


def test_help_takes_less_than_a_second_of_cpu():
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "jaxlm", "--help"], cwd=ROOT, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 1.0


def test_the_changelog_opens_with_this_version():
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0].split()[1] == jaxlm.__version__
