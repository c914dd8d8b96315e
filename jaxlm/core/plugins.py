"""Plugins are modules that register models, objectives, adapters, optimizers and schedules when they are imported.

They are named by whoever starts a program, by `--plugin` or the variable JAXLM_PLUGINS, and never by a file of a run.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxlm.core.errors import one_line

VARIABLE = "JAXLM_PLUGINS"
loaded: list[str] = []
"""The names of what was loaded, for processes that this one starts."""


def load(names: Sequence[str]) -> None:
    """Imports each module: a name, found in the working directory too, or the path of a Python file. The modules that
    JAXLM_PLUGINS names, with commas between, come first.

    ValueError: there is no such module, or it fails.
    """
    more = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    for name in dict.fromkeys([*more, *names]):
        _load(name)
        if name not in loaded:
            loaded.append(name)


def _load(name: str) -> None:
    path = Path(name).expanduser()
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise ValueError(f"plugin: no file {name}")
    module = path.stem if is_file else name
    folder = str(path.resolve().parent) if is_file else os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)  # it stays, for processes that load data import the module by its name
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise ValueError(
                f"plugin: no module {name}; install its package, run where it lies, or give the path of its file"
            ) from None
        raise ValueError(f"plugin: {name} needs a module that is missing: {error.name}; install it") from error
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"plugin: {name} fails: {type(error).__name__}: {one_line(error, 300)}") from error
    if is_file and Path(str(found.__file__)).resolve() != path.resolve():
        raise ValueError(f"plugin: {name} has the name of another module, {found.__file__}; rename the file")
