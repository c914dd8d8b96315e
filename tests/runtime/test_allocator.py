"""The allocator's settings: chosen once, for CPUs with glibc, and never against a user's own."""

import json
import os
import subprocess
import sys

import pytest

from jaxlm.runtime import allocator

PLAIN = {name: value for name, value in os.environ.items() if name not in (*allocator.VARIABLES, allocator.CHOICE)}


@pytest.fixture
def glibc(monkeypatch):
    monkeypatch.setattr(allocator, "_has_glibc", lambda: True)


def test_settings_are_missing_once_and_only_where_a_cpu_computes(glibc, monkeypatch):
    monkeypatch.setattr(allocator, "ACCELERATORS", ())
    more = allocator.missing({})
    assert more == allocator.VARIABLES
    assert not allocator.missing(more)  # so that a process starts itself anew once
    monkeypatch.setattr(allocator, "ACCELERATORS", ("/",))
    assert not allocator.missing({})
    assert allocator.missing({"JAX_PLATFORMS": "cpu"}) == more


def test_a_users_own_choice_stays(glibc, monkeypatch):
    monkeypatch.setattr(allocator, "ACCELERATORS", ())
    assert not allocator.missing({"MALLOC_MMAP_MAX_": "7"})
    assert not allocator.missing({allocator.CHOICE: "system"})
    assert allocator.describe({"MALLOC_MMAP_MAX_": "7"}) == "glibc with MALLOC_MMAP_MAX_=7"
    assert allocator.describe({allocator.CHOICE: "system"}) == "glibc as it is"
    assert "JAXLM_MALLOC=system leaves it" in allocator.describe({})


def test_other_systems_have_nothing_to_set(monkeypatch):
    monkeypatch.setattr(allocator, "_has_glibc", lambda: False)
    assert not allocator.missing({})
    assert "no glibc" in allocator.describe({})


@pytest.mark.skipif(not allocator._has_glibc(), reason="this system has no glibc, so no command starts itself anew")
@pytest.mark.parametrize(("more", "tuned"), [({}, True), ({allocator.CHOICE: "system"}, False)])
def test_a_command_that_computes_starts_itself_with_them(tmp_path, more, tuned):
    (tmp_path / "shown.py").write_text("import json, os, sys\njson.dump(dict(os.environ), open('seen.json', 'w'))\n")
    command = [sys.executable, "-m", "jaxlm", "generate", "nowhere", "--plugin", str(tmp_path / "shown.py")]
    done = subprocess.run([*command, "--prompt", "x"], cwd=tmp_path, capture_output=True, text=True,
                          env=PLAIN | {"JAX_PLATFORMS": "cpu"} | more)  # fmt: skip
    assert done.returncode == 2, done.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert {name for name in allocator.VARIABLES if name in seen} == (set(allocator.VARIABLES) if tuned else set())
