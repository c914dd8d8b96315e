"""The scripts of `launch/`: which Python they take, and that what `test.sh` sets is what JAX reads (of a misspelt name
JAX says nothing)."""

import re
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
TOOLS = ("bash", "cat", "cksum", "cp", "dirname", "grep", "mkdir", "rm", "sort", "tail")
PYTHON = """#!/usr/bin/env bash
echo "${{0##*/}} $*" >>"{log}"
for last in "$@"; do :; done
case "$1 $2" in
  "-c "*) echo "{version}" ;;
  "-m venv") mkdir -p "$last/bin" && cp "$0" "$last/bin/python" ;;
esac
"""
UV = """#!/usr/bin/env bash
echo "uv $*" >>"{log}"
for last in "$@"; do :; done
case "$1" in
  python) [ "$last" = {minor} ] && echo "{python}" ;;
  venv) mkdir -p "$last/bin" && cp "{python}" "$last/bin/python" ;;
esac
"""
SHIM = "#!/usr/bin/env bash\necho 'pyenv: command not found' >&2\nexit 127\n"


def test_the_cache_of_the_tests_is_set_by_names_that_jax_knows():
    named = re.findall(r"^export (JAX_[A-Z_]+)=", (LAUNCH / "test.sh").read_text(), re.MULTILINE)
    assert len(named) == 3
    assert not {n for n in named if n.lower() not in jax.config.values}


class Machine:
    """A checkout and a PATH of stand-ins: interpreters that only say their version and note what is asked of them."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.home, self.checkout, self.log = (folder / n for n in ("bin", "home", "checkout", "log"))
        for path in (self.bin, self.home, self.checkout / "launch"):
            path.mkdir(parents=True)
        for tool in ("env", *TOOLS):
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)
        shutil.copy(LAUNCH / "setup.sh", self.checkout / "launch")
        for name in ("pyproject.toml", "requirements.lock"):
            (self.checkout / name).write_text(name)

    def script(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def python(self, path: Path, version: str) -> Path:
        return self.script(path, PYTHON.format(log=self.log, version=version))

    def set_up(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs setup.sh as the scripts beside it do; the log begins anew."""
        self.log.write_text("")
        return subprocess.run(
            ["bash", "-c", 'set -euo pipefail; source launch/setup.sh; "$VENV/bin/python" -c ""'], cwd=self.checkout,
            env={"PATH": str(self.bin), "HOME": str(self.home)} | environment, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip

    def chosen(self, **environment: str) -> str:
        """The version of the Python that .venv has in the end."""
        done = self.set_up(**environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_newest_python_on_path_is_taken(machine: Machine) -> None:
    machine.python(machine.bin / "python3", "3.11.7")
    assert machine.chosen() == "3.11.7"
    shutil.rmtree(machine.checkout / ".venv")
    for version in ("3.11.7", "3.13.1", "3.12.4"):
        machine.python(machine.bin / f"python{version[:4]}", version)
    assert machine.chosen() == "3.13.1"


def test_a_shim_that_does_not_run_is_passed_over(machine: Machine) -> None:
    machine.script(machine.bin / "python3.13", SHIM)
    machine.python(machine.bin / "python3", "3.11.7")
    machine.python(machine.bin / "python3.12", "3.12.4")
    assert machine.chosen() == "3.12.4"


@pytest.mark.parametrize("root", ["home/.pyenv", "else where/pyenv"])
def test_what_pyenv_has_installed_is_found_behind_its_shim(machine: Machine, tmp_path: Path, root: str) -> None:
    machine.script(machine.bin / "python3.13", SHIM)
    machine.python(machine.bin / "python3", "3.11.7")
    for version in ("3.12.20", "3.13.2", "3.13.10", "3.13.9", "3.14.0"):
        machine.python(tmp_path / root / "versions" / version / "bin" / "python", version)
    (tmp_path / root / "versions" / "3.13.11").mkdir()  # an installation that was cut off
    environment = {} if root.startswith("home") else {"PYENV_ROOT": str(tmp_path / root)}
    assert machine.chosen(**environment) == "3.13.10"


def test_what_uv_has_installed_is_found_and_nothing_downloaded(machine: Machine, tmp_path: Path) -> None:
    machine.python(machine.bin / "python3.11", "3.11.7")
    python = machine.python(tmp_path / "uv" / "python", "3.12.8")
    machine.script(machine.bin / "uv", UV.format(log=machine.log, minor="3.12", python=python))
    assert machine.chosen() == "3.12.8"
    asked = [line for line in machine.log.read_text().splitlines() if line.startswith(("uv python", "uv venv"))]
    assert len(asked) == 4 and all("--no-python-downloads" in line for line in asked)


def test_a_python_that_is_named_is_the_only_candidate(machine: Machine, tmp_path: Path) -> None:
    machine.python(machine.bin / "python3.13", "3.13.1")
    assert machine.chosen(PYTHON=str(machine.python(tmp_path / "mine", "3.11.2"))) == "3.11.2"
    for name, path in {"is 3.10.4": machine.python(tmp_path / "old", "3.10.4"),
                       "does not run": machine.script(tmp_path / "shim", SHIM)}.items():  # fmt: skip
        done = machine.set_up(PYTHON=str(path))
        assert done.returncode == 2
        assert done.stderr == (
            f"error: jaxlm needs Python 3.11, 3.12 or 3.13 ({path} {name}): install one or set PYTHON=/path/to/python\n"
        )


def test_no_fitting_python_is_an_error(machine: Machine) -> None:
    machine.python(machine.bin / "python3", "3.10.1")
    machine.script(machine.bin / "python3.12", SHIM)
    done = machine.set_up()
    assert done.returncode == 2 and "(python3 is 3.10.1): install one" in done.stderr


def test_a_second_run_installs_nothing_though_a_newer_python_came(machine: Machine) -> None:
    machine.python(machine.bin / "python3", "3.11.7")
    assert machine.chosen() == "3.11.7"
    assert "-m pip install" in machine.log.read_text()
    newer = machine.python(machine.bin / "python3.13", "3.13.1")
    assert machine.chosen() == "3.11.7"
    assert machine.log.read_text() == "python -c \n"  # the test's own question
    assert machine.chosen(PYTHON=str(newer)) == "3.13.1"
    assert f"{machine.checkout}/.venv" in machine.log.read_text()
    # What was pinned anew is installed anew, into the newest Python.
    (machine.checkout / "requirements.lock").write_text("changed")
    assert machine.chosen() == "3.13.1"
    assert "-m pip install" in machine.log.read_text()
