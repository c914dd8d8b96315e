"""Compiled programs stay for the next start, in a folder of this machine and jaxlib that never grows too large."""

import os

import pytest

from jaxlm.runtime import compile_cache


@pytest.fixture
def nothing_chosen(monkeypatch, tmp_path):
    for name in (compile_cache.VARIABLE, compile_cache.SWITCH, compile_cache.SECONDS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "environ", dict(os.environ))


def test_programs_are_kept_where_nothing_else_is_chosen(nothing_chosen, tmp_path):
    compile_cache.use()
    assert os.environ[compile_cache.VARIABLE].startswith(f"{tmp_path}/jaxlm/compiled/jaxlib-")


@pytest.mark.parametrize(("name", "value"), [(compile_cache.VARIABLE, "/mine"), (compile_cache.SWITCH, "false")])
def test_a_users_choice_stays(nothing_chosen, tmp_path, name, value):
    os.environ[name] = value
    compile_cache.use()
    assert os.environ.get(compile_cache.VARIABLE) == (value if name == compile_cache.VARIABLE else None)
    assert not (tmp_path / "jaxlm").exists()


def test_a_home_that_cannot_be_written_to_keeps_nothing(nothing_chosen, tmp_path):
    (tmp_path / "file").write_text("")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "file")
    compile_cache.use()
    assert compile_cache.VARIABLE not in os.environ


def test_the_oldest_programs_go_where_they_take_too_much(tmp_path):
    for i in range(6):
        (tmp_path / f"p{i}").write_bytes(b"x" * 100)
        os.utime(tmp_path / f"p{i}", (i, i))
    compile_cache._forget_oldest(tmp_path, most=600)
    assert len(list(tmp_path.iterdir())) == 6
    compile_cache._forget_oldest(tmp_path, most=599)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p4", "p5"]
