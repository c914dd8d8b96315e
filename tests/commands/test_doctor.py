"""Doctor finds what is missing and names the command that mends it."""

import importlib.metadata
import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from jaxlm.commands import doctor as module
from jaxlm.commands.doctor import doctor, nvidia_gpus, print_rows, tpu_chips
from jaxlm.nn.kernels import few_bit_matmul


def find(rows, name):
    return next(row for row in rows if row.name == name)


def test_this_machine_is_fit_and_the_table_shows_it(tmp_path):
    rows, fit = doctor(cache=tmp_path / "not" / "yet")
    assert fit, [row for row in rows if row.status == "bad"]
    assert find(rows, "jax").status == "ok" and " × " in find(rows, "devices").found
    assert find(rows, "compile and run").status == "ok"
    few_bits, code = find(rows, "int8 and int4"), few_bit_matmul.choose().method == "kernel"
    assert few_bits.status == ("ok" if code else "note")
    assert "compiled in" in few_bits.found if code else few_bits.remedy == 'pip install "jaxlm[cpu]"'
    assert find(rows, "cache folder").found.endswith("can be made") and not list(tmp_path.iterdir())
    out = io.StringIO()
    print_rows(rows, Console(file=out, width=100))
    assert "orbax-checkpoint" in out.getvalue() and "a matrix product in" in out.getvalue()


def test_a_missing_package_is_bad_and_has_its_command(monkeypatch):
    versions = module._version
    monkeypatch.setattr(module, "_version", lambda name: None if name in ("grain", "pyarrow") else versions(name))
    monkeypatch.setattr(module, "_requirement", lambda name: f"{name}>=0.2.14")
    rows, fit = doctor()
    assert not fit
    assert find(rows, "grain") == module.Row("grain", "bad", "missing", 'pip install "grain>=0.2.14"')
    assert find(rows, "extra: data").status == "note"
    declared = set(importlib.metadata.metadata("jaxlm").get_all("Provides-Extra")) - {"cuda", "tpu"}
    assert {row.name for row in rows if row.name.startswith("extra: ")} == {f"extra: {name}" for name in declared}
    out = io.StringIO()
    print_rows(rows, Console(file=out, width=40))
    assert 'note extra: data: pip install "jaxlm[data]"\n' in out.getvalue()  # whole, though the terminal is narrow


def test_a_package_that_is_too_old_or_broken_is_bad(monkeypatch):
    monkeypatch.setattr(module, "_requirement", lambda name: "optax>=99.1" if name == "optax" else name)
    monkeypatch.setitem(sys.modules, "tyro", None)
    rows, fit = doctor()
    assert not fit
    assert find(rows, "optax").found.endswith("is too old") and "optax>=99.1" in find(rows, "optax").remedy
    assert "but ModuleNotFoundError" in find(rows, "tyro").found and "--force-reinstall" in find(rows, "tyro").remedy


def test_products_of_few_bits_are_tried(monkeypatch):
    monkeypatch.setattr(few_bit_matmul, "choose", lambda: few_bit_matmul.FewBitMatmulChoice("kernel", "read as stored"))
    monkeypatch.setattr(few_bit_matmul, "int8", lambda x, codes, scale: (x @ codes) * scale[None] + 1)
    assert module._few_bits().status == "bad" and "wrong" in module._few_bits().found
    monkeypatch.setattr(few_bit_matmul, "int8", lambda x, codes, scale: (x @ codes) * scale[None])
    assert module._few_bits().status == "ok" and "read as stored; compiled in" in module._few_bits().found


@pytest.mark.parametrize(
    ("version", "requirement", "old"),
    [("0.9.2", "jax>=0.10", True), ("0.10.0", "jax>=0.10", False), ("1.0", "jax>=0.10", False), ("3", "x", False)],
)
def test_versions_compare_by_number(version, requirement, old):
    assert module._too_old(version, requirement) is old


def test_a_gpu_that_jax_does_not_use_is_noticed(tmp_path, monkeypatch):
    info = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information"
    info.parent.mkdir(parents=True)
    info.write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 1\n")
    assert nvidia_gpus(tmp_path) == "1 × NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(module, "nvidia_gpus", lambda: "1 × NVIDIA H100 80GB HBM3")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    rows, fit = doctor()
    row = find(rows, "accelerator")
    assert fit and row.status == "note" and row.remedy == 'pip install "jaxlm[cuda]"'
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert find(doctor()[0], "accelerator").remedy == "unset JAX_PLATFORMS (it is 'cpu')"


def test_gpus_are_found_by_the_tool_where_the_driver_shows_no_files(tmp_path):
    tool = tmp_path / "smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA L4 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA L4 (UUID: GPU-2)'\n")
    tool.chmod(0o755)
    assert nvidia_gpus(tmp_path, str(tool)) == "2 × NVIDIA L4"
    assert nvidia_gpus(tmp_path, str(tmp_path / "none")) is None


def test_tpu_chips_are_found_by_their_device_files(tmp_path):
    assert tpu_chips(tmp_path) is None
    (tmp_path / "dev/vfio").mkdir(parents=True)
    for i, vendor in enumerate(["0x1ae0", "0x1ae0", "0x8086"]):
        (tmp_path / f"sys/bus/pci/devices/{i}").mkdir(parents=True)
        (tmp_path / f"sys/bus/pci/devices/{i}/vendor").write_text(vendor + "\n")
    assert tpu_chips(tmp_path) == "2 TPU chips"
    for i in range(4):
        (tmp_path / f"dev/accel{i}").touch()
    assert tpu_chips(tmp_path) == "4 TPU chips"


def test_a_folder_that_cannot_be_written_is_bad(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    rows, fit = doctor(cache=file / "cache")
    assert not fit and find(rows, "cache folder").status == "bad"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert find(doctor()[0], "compile cache").found == f"{tmp_path} is writable"


def test_little_disk_is_noted():
    assert module._disk(lambda _: SimpleNamespace(free=1e9)).status == "note"
    assert module._disk(lambda _: SimpleNamespace(free=1e11)).status == "ok"
