"""The launch scripts set up once, say in one line what is wrong, and hand everything else to jaxlm or pytest."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    [*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch"), *(ROOT / "tests/system").glob("*.sh"),
     ROOT / ".ci" / "run"]
)  # fmt: skip
BASH = shutil.which("bash") or "bash"
TOOLS = ("bash", "cat", "chmod", "cksum", "dirname", "env", "getconf", "grep", "mkdir", "mktemp", "rm", "tail")

# Stands in for uv: writes down every call, and makes an environment whose programs tell what they were given.
FAKE_UV = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
[ "$1" = venv ] || exit 0
venv="${!#}"
mkdir -p "$venv/bin"
for program in jaxlm python; do
  printf '#!/usr/bin/env bash\\necho "%s" "$@"\\nenv\\n' "$program" >"$venv/bin/$program"
  chmod +x "$venv/bin/$program"
done
"""


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def fake_python(version: str) -> str:
    return f"#!/usr/bin/env bash\necho {version}\n"


@pytest.fixture
def path(tmp_path):
    """A folder to be the whole PATH: the tools the scripts need, no Python and no uv."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        target = shutil.which(tool)
        assert target, f"{tool} is not on PATH"
        (folder / tool).symlink_to(target)
    return folder


@pytest.fixture
def checkout(tmp_path):
    """What the set-up reads of this repository, in a folder with a space in its name and no .venv."""
    root = tmp_path / "a checkout"
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, root / name)
    return root


def launch(script: Path, path: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    # From another folder, as the scripts must not depend on where they are called.
    environ = {"PATH": str(path), "HOME": str(path.parent), **environ}
    return subprocess.run([BASH, str(script), *args], cwd=path, env=environ, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_parse(script):
    done = subprocess.run([BASH, "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_ci_runs_by_its_own_name():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("version", ["3.9.18", "3.10.14", "3.14.0"])
def test_an_unfit_python_is_one_line_and_status_2(checkout, path, version):
    program(path, "python3", fake_python(version))
    done = launch(checkout / "launch" / "quickstart.sh", path)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: jaxlm needs Python 3\.11.*\(python3 is {re.escape(version)}\).*\n", done.stderr)
    assert not (checkout / ".venv").exists()


def test_no_python_is_one_line_and_status_2(checkout, path):
    done = launch(checkout / "launch" / "test.sh", path)
    assert done.returncode == 2
    assert re.fullmatch(r"error: jaxlm needs Python 3\.11, 3\.12 or 3\.13: install one.*\n", done.stderr)


def test_a_fitting_python_is_found_behind_an_unfit_one(checkout, path, tmp_path):
    program(path, "python3", fake_python("3.9.18"))
    program(path, "python3.12", fake_python("3.12.4"))
    program(path, "uv", FAKE_UV)
    done = launch(checkout / "launch" / "quickstart.sh", path, CALLS=str(tmp_path / "calls"))
    assert done.returncode == 0, done.stderr
    assert "with Python 3.12.4" in done.stderr


def test_a_named_python_that_does_not_fit_is_refused_though_another_would_do(checkout, path, tmp_path):
    program(path, "python3", fake_python("3.12.4"))
    old = program(tmp_path, "old python", fake_python("3.8.1"))
    done = launch(checkout / "launch" / "quickstart.sh", path, PYTHON=str(old))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "old python is 3.8.1" in done.stderr
    done = launch(checkout / "launch" / "quickstart.sh", path, PYTHON=str(tmp_path / "absent"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "absent does not run" in done.stderr


def test_a_dead_index_is_one_line_that_names_the_log(checkout, path):
    # A real pip against a port where nothing listens; settings of this machine that reach other packages are left out.
    (path / "python3").symlink_to(sys.executable)
    done = launch(
        checkout / "launch" / "quickstart.sh",
        path,
        PYTHON=sys.executable,
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL="http://127.0.0.1:9",
        PIP_RETRIES="0",
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("Installing ")]
    assert len(errors) == 1 and errors[0].startswith("error: no package index answers")
    log = Path(errors[0].rpartition("log: ")[2])
    assert "absl-py" in log.read_text()


def test_the_second_run_installs_nothing(checkout, path, tmp_path):
    program(path, "python3", fake_python("3.12.4"))
    program(path, "uv", FAKE_UV)
    calls = tmp_path / "calls"

    def run(script: str, root: Path, **environ: str) -> list[str]:
        calls.write_text("")
        done = launch(root / "launch" / script, path, CALLS=str(calls), **environ)
        assert done.returncode == 0, done.stderr
        return calls.read_text().splitlines()

    first = run("quickstart.sh", checkout)
    assert [line.split()[0] for line in first] == ["venv", "pip", "pip"]
    assert "--require-hashes -r requirements.lock" in first[1] and "-e ." in first[2]
    assert run("quickstart.sh", checkout) == []
    assert run("test.sh", checkout) == []

    # A new lock, another Python and another folder each ask for it again; the last two from an empty environment.
    with (checkout / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    again = run("quickstart.sh", checkout)
    assert len(again) == 3 and "--clear" not in again[0]
    other = program(tmp_path, "python-other", fake_python("3.13.0"))
    assert "--clear" in run("quickstart.sh", checkout, PYTHON=str(other))[0]
    moved = checkout.rename(tmp_path / "moved")
    assert "--clear" in run("quickstart.sh", moved)[0]


def test_quickstart_hands_its_arguments_on_with_the_allocator_set(checkout, path, tmp_path):
    program(path, "python3", fake_python("3.12.4"))
    program(path, "uv", FAKE_UV)
    # The user's own setting wins.
    done = launch(
        checkout / "launch" / "quickstart.sh",
        path,
        "--optim.lr",
        "3e-4",
        CALLS=str(tmp_path / "calls"),
        MALLOC_TRIM_THRESHOLD_="5",
    )
    command, *environ = done.stdout.splitlines()
    assert command == "jaxlm train configs/quickstart.py --optim.lr 3e-4"
    assert f"PWD={checkout}" in environ
    assert "MALLOC_TRIM_THRESHOLD_=5" in environ
    if subprocess.run(["getconf", "GNU_LIBC_VERSION"], capture_output=True).returncode == 0:
        assert {"GLIBC_TUNABLES=glibc.malloc.hugetlb=1", "MALLOC_MMAP_MAX_=0"} <= set(environ)


def test_the_test_script_adds_slow_tests_and_clears_its_compilation_cache(checkout, path, tmp_path):
    program(path, "python3", fake_python("3.12.4"))
    program(path, "uv", FAKE_UV)
    done = launch(checkout / "launch" / "test.sh", path, "--slow", "tests/x.py", CALLS=str(tmp_path / "calls"))
    command, *environ = done.stdout.splitlines()
    assert command == "python -m pytest -n 2 -m  tests/x.py"
    cache = [line.partition("=")[2] for line in environ if line.startswith("JAX_COMPILATION_CACHE_DIR=")]
    assert len(cache) == 1 and not Path(cache[0]).exists()


def test_the_tpu_script_copies_the_commit_and_keeps_words_apart(checkout, tmp_path):
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(checkout), *words], check=True)
    calls = tmp_path / "calls"
    (tmp_path / "fake").mkdir()
    program(tmp_path / "fake", "gcloud", f'#!/usr/bin/env bash\nprintf "<%s>" "$@" >>"{calls}"; echo >>"{calls}"\n')
    words = [BASH, str(checkout / "launch" / "tpu_pod.sh"), "my-tpu", "zone-a", "train", "c.py", "--name", "two words"]
    done = subprocess.run(words, env={**os.environ, "PATH": f"{tmp_path / 'fake'}:{os.environ['PATH']}"}, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    copy, run = calls.read_text().split("\n", 1)
    assert copy.endswith("<my-tpu:jaxlm.tar.gz><--zone=zone-a><--worker=all>")
    assert run.startswith("<compute><tpus><tpu-vm><ssh><my-tpu><--zone=zone-a><--worker=all><--command=")
    assert r"exec .venv/bin/jaxlm train c.py --name two\ words" in run


def test_local_processes_are_told_their_numbers_and_the_worst_status_counts(tmp_path):
    fake = program(tmp_path, "fake", '#!/usr/bin/env bash\necho "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at '
                   '$JAX_COORDINATOR_ADDRESS: $*"; exit $((JAX_PROCESS_ID * 3))\n')  # fmt: skip
    done = subprocess.run([BASH, str(ROOT / "launch" / "local.sh"), "3", "train", "x"], text=True, capture_output=True,
                          env=os.environ | {"JAXLM": str(fake), "JAX_COORDINATOR_PORT": "1234"})  # fmt: skip
    assert done.returncode == 6, done.stderr
    for i in range(3):
        assert f"{i}: {i} of 3 at 127.0.0.1:1234: train x" in done.stdout


def locked() -> dict[str, list[Requirement]]:
    """The lock's requirements by name; one name can be pinned twice, for different Pythons."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and line[0] not in " #":
            requirement = Requirement(line.removesuffix("\\"))
            found.setdefault(requirement.name.lower().replace("_", "-"), []).append(requirement)
    return found


def test_the_lock_pins_by_hash_and_names_no_host():
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"https?:|^-", text, flags=re.MULTILINE)
    entries = re.findall(r"^\S+==\S+.*\n(?:    --hash=sha256:[0-9a-f]{64}.*\n)*", text, flags=re.MULTILINE)
    assert len(entries) == sum(map(len, locked().values()))
    assert all("--hash=" in entry for entry in entries)


def test_the_lock_satisfies_every_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["report"], *extras["data"], *extras["test"]]
    pins = locked()
    for requirement in map(Requirement, declared):
        name = requirement.name.lower().replace("_", "-")
        if name == project["name"]:
            continue
        assert name in pins, f"{requirement} is not in requirements.lock"
        for pin in pins[name]:
            (specifier,) = pin.specifier
            assert requirement.specifier.contains(specifier.version, prereleases=True), f"{pin} against {requirement}"


def test_the_lock_holds_no_other_framework_and_no_accelerator_packages():
    assert not {name for name in locked() if re.match(r"torch|tensorflow(-cpu|-intel)?$|nvidia|jax-cuda|libtpu", name)}
