"""Options of the compiler: accepted by it, refused in one line, given to the train step."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxlm.runtime import compiler_options, mesh
from jaxlm.runtime.compiler_options import PRESETS, options

CPU = jax.devices()[0]
ROOT = Path(__file__).parents[2]


def test_options_reach_the_compiler_and_the_later_wins():
    found = options(["xla_cpu_enable_fast_math=true", "--xla_cpu_enable_fast_math=false"], CPU)
    assert found == {"xla_cpu_enable_fast_math": False}
    assert compiler_options.format_options(found) == "xla_cpu_enable_fast_math=false"
    assert options([], CPU) == {}


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("no_such_thing_at_all=1", "knows no 'no_such_thing_at_all'; see its own list of flags"),
        ("xla_cpu_enable_fast_math=perhaps", "'perhaps' is no value for xla_cpu_enable_fast_math"),
        ("tpu_sparse_cores", "neither NAME=VALUE nor a preset; did you mean 'tpu_sparse_core'"),
        ("tpu_reduce_scatter", "tpu_reduce_scatter is for every tpu, and this run is on cpu cpu; leave it out"),
        ("tpu_sparse_core", "tpu_sparse_core is for TPU v6 lite, TPU v6e, TPU7x, and this run is on cpu"),
    ],
)
def test_what_the_compiler_refuses_is_one_line(flag, words):
    with pytest.raises(ValueError, match=rf"^execution\.flags: .*{words}") as error:
        options([flag], CPU)
    assert "\n" not in str(error.value)


def test_what_a_compiler_refuses_for_another_reason_is_one_line(monkeypatch):
    """As TPUs' compilers refuse what they know and won't do for a chip."""

    class Refusing:
        def lower(self, *_):
            return self

        def compile(self, **_):
            raise jax.errors.JaxRuntimeError("FAILED_PRECONDITION: not supported\nfor this chip")

    monkeypatch.setattr(jax, "jit", lambda *_, **__: Refusing())
    with pytest.raises(
        ValueError, match=r"^execution.flags: the compiler for cpu refuses a=1: FAILED_PREC.*$"
    ) as error:
        options(["a=1"], CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_their_devices_and_no_others(name, monkeypatch):
    monkeypatch.setattr(compiler_options, "check_accepted", lambda options, device: None)  # those compilers aren't here
    preset = PRESETS[name]
    kind = preset.kinds[0] if preset.kinds else "any"
    assert options([name], SimpleNamespace(platform=preset.platform, device_kind=kind)) == preset.options
    other = SimpleNamespace(platform={"gpu": "tpu", "tpu": "gpu"}[preset.platform], device_kind=kind)
    with pytest.raises(ValueError, match="leave it out"):
        options([name], other)
    assert preset.why and name.startswith(preset.platform)
    if preset.kinds:
        with pytest.raises(ValueError, match="leave it out"):
            options([name], SimpleNamespace(platform=preset.platform, device_kind="TPU v2"))


def test_the_train_step_is_compiled_with_them(monkeypatch):
    from jaxlm.assembly import program
    from jaxlm.core import config_io
    from jaxlm.data import tokenizer

    run = config_io.override(config_io.load(ROOT / "configs" / "tiny_llama.py"), ["--mesh.data", "8"])
    run = dataclasses.replace(
        run, execution=dataclasses.replace(run.execution, flags=("xla_cpu_enable_fast_math=true",))
    )
    p = program.program(run, tokenizer.load("bytes"))
    assert p.compiler_options == {"xla_cpu_enable_fast_math": True}
    assert p.notes["flags"] == "xla_cpu_enable_fast_math=true"
    given = {}
    monkeypatch.setattr(jax, "jit", lambda f, **kwargs: given.update(kwargs))
    p.train_step()
    assert given["compiler_options"] == p.compiler_options


@pytest.mark.slow
def test_a_run_records_them(tmp_path):
    words = ["train", "tiny_llama", "--out", str(tmp_path), "--train.steps", "1", "--train.prompts", "--optim.warmup",
             "0", "--execution.flags", "xla_cpu_enable_fast_math=false"]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "jaxlm", *words], cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""})
    assert done.returncode == 0
    environment = json.loads((tmp_path / "tiny_llama" / "environment.json").read_text())
    assert environment["compiler_options"] == {"xla_cpu_enable_fast_math": False}


def test_a_machine_that_is_not_here_takes_its_own_options():
    with mesh.on_devices([mesh.Described("tpu", "TPU v6e")]):
        assert options(["tpu_sparse_core"], mesh.local_device()) == PRESETS["tpu_sparse_core"].options
    refused = pytest.raises(ValueError, match=r"tpu_sparse_core is for TPU v6 .*, and this run is on gpu NVIDIA H100")
    with mesh.on_devices([mesh.Described("gpu", "NVIDIA H100")]), refused:
        options(["tpu_sparse_core"], mesh.local_device())
    assert mesh.local_device() == CPU
