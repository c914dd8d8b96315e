"""Safetensors: any slice of any tensor without the rest, whole files or none, and damaged or hostile ones refused."""

import json
import os
import pickle
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxlm.formats import safetensors
from jaxlm.formats.safetensors import CODES, DTYPES, open_files, write

ENTRY = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}


def numbers(*shape: int, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


def raw(path: Path, header: dict | bytes, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path.parent


def sharded(folder: Path, **weight_map: str) -> Path:
    """`a` and `b` in two shards with an index, changed as given."""
    folder.mkdir(exist_ok=True)
    save_file({"a": numbers(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": numbers(3)}, folder / "model-00002-of-00002.safetensors")
    where = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"} | weight_map
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_there_and_back(tmp_path, code):
    dtype = DTYPES[code]
    array = np.frombuffer(bytes(range(48)), np.uint8).copy()
    array = (array % 2).astype(bool) if code == "BOOL" else array.view(dtype)
    write(tmp_path, {"x": (dtype, array.shape)}, lambda name: array)
    found = open_files(tmp_path).read("x")
    assert found.dtype == dtype and found.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_files_of_the_library_are_read_and_ours_are_read_by_it(tmp_path, dtype):
    tensors = {"a": numbers(3, 4, dtype=dtype), "b": numbers(), "c": numbers(0, 2), "long": numbers(5, dtype=np.int64)}
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs/model.safetensors")
    files = open_files(tmp_path / "theirs")
    write(tmp_path / "ours", {n: (e.dtype, e.shape) for n, e in files.entries.items()}, files.read)
    with safe_open(tmp_path / "ours/model.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt"}
        for name, array in tensors.items():
            found = opened.get_tensor(name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape) and found.tobytes() == array.tobytes()


@pytest.mark.parametrize("block", [8, 64, 1 << 20])
def test_any_slice_of_any_shape(tmp_path, block, monkeypatch):
    monkeypatch.setattr(safetensors, "BLOCK", block)
    array = numbers(6, 4, 5)
    save_file({"before": numbers(7), "x": array}, tmp_path / "model.safetensors")
    files = open_files(tmp_path)
    for shape in [(6, 4, 5), (24, 5), (120,), (3, 2, 4, 5)]:
        view = array.reshape(shape)
        for seed in range(20):
            cuts = [sorted(np.random.default_rng((seed, i)).choice(n + 1, 2)) for i, n in enumerate(shape)]
            index = tuple(slice(int(a), int(b)) for a, b in cuts)
            np.testing.assert_array_equal(files.read("x", index, shape), view[index])


def test_a_slice_reads_its_own_bytes_alone(tmp_path, monkeypatch):
    save_file({"x": numbers(1000, 50)}, tmp_path / "model.safetensors")
    files, asked = open_files(tmp_path), []
    original = safetensors._read
    monkeypatch.setattr(safetensors, "_read", lambda f, start, out: asked.append(out.nbytes) or original(f, start, out))
    files.read("x", (slice(10, 20), slice(0, 50)))
    assert sum(asked) == 10 * 50 * 4
    monkeypatch.setattr(safetensors, "BLOCK", 4000)
    files.read("x", (slice(0, 1000), slice(0, 5)))
    assert max(asked[1:]) <= 4000


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    data = {"z": {**ENTRY, "data_offsets": [0, 4]}, "a": {**ENTRY, "data_offsets": [4, 8]}}
    assert list(open_files(raw(tmp_path / "model.safetensors", data, b"12345678")).entries) == ["z", "a"]


def test_shards_by_their_index(tmp_path):
    files = open_files(sharded(tmp_path))
    assert set(files.entries) == {"a", "b"}
    np.testing.assert_array_equal(files.read("b"), numbers(3))


def test_a_file_cut_after_it_was_opened(tmp_path):
    save_file({"x": numbers(100)}, tmp_path / "model.safetensors")
    files = open_files(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(ValueError, match=r"model\.safetensors: ended while"):
        files.read("x")


# ------------------------------------------------------------------------------------------------------ what is refused

DAMAGED = {
    "empty": (None, b"", "header too small"),
    "header beyond the file": (None, struct.pack("<Q", 1000) + b"{}", "invalid header length"),
    "enormous header": (None, b"\xff" * 8 + b"{}", "header too large"),
    "not JSON": (b"{", b"", "invalid JSON"),
    "cut short": ({"a": ENTRY}, b"123", "not fully covered"),
    "too long": ({"a": ENTRY}, b"12345", "not fully covered"),
    "overlapping": ({"a": ENTRY, "b": ENTRY | {"data_offsets": [2, 6]}}, b"123456", "invalid offset for tensor `b`"),
    "with a hole": ({"a": ENTRY, "b": ENTRY | {"data_offsets": [6, 10]}}, b"1234567890", "invalid offset"),
    "dtype x shape is not its bytes": ({"a": ENTRY | {"shape": [3]}}, b"1234", "invalid shape"),
    "negative size": ({"a": ENTRY | {"shape": [-2]}}, b"1234", "invalid value"),
    "size beyond any integer": ({"a": ENTRY | {"shape": [2**62, 2**62]}}, b"1234", "overflow"),
    "unknown dtype": ({"a": ENTRY | {"dtype": "F1"}}, b"1234", "unknown variant `F1`"),
    "dtype that is not read": ({"a": ENTRY | {"dtype": "F4", "shape": [8]}}, b"1234", "a is of dtype F4, which is not"),
    "name twice": (f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(ENTRY)}}}'.encode(), b"1234", "names a twice"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files(tmp_path, damage):
    header, data, why = DAMAGED[damage]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data) if header is None else raw(path, header, data)
    with pytest.raises(ValueError) as error:
        open_files(tmp_path)
    message = str(error.value)
    assert message.startswith(str(path)) and why in message and "\n" not in message


@pytest.mark.parametrize(
    "shard",
    ["/etc/passwd", "/etc/x.safetensors", "../x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "x.bin", ".."],
)
def test_an_index_that_names_files_elsewhere(tmp_path, shard):
    save_file({"a": numbers(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"index\.json: names .*, which is not a \.safetensors file beside it"):
        open_files(sharded(tmp_path / "model", a=shard))


def test_a_shard_that_links_out_of_its_directory(tmp_path):
    save_file({"a": numbers(2)}, tmp_path / "secret.safetensors")
    folder = sharded(tmp_path / "model", a="link.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(ValueError, match=r"link\.safetensors: is a link out of its directory.* Copy the file"):
        open_files(folder)


def test_the_hubs_cache_and_a_linked_directory_are_fine(tmp_path):
    folder = tmp_path / "models--x/snapshots/12ab"
    folder.parent.mkdir(parents=True)
    sharded(folder)
    blobs = tmp_path / "models--x/blobs"
    blobs.mkdir()
    for file in list(folder.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    assert set(open_files(folder).entries) == {"a", "b"}
    (tmp_path / "linked").symlink_to(sharded(tmp_path / "plain"))
    assert set(open_files(tmp_path / "linked").entries) == {"a", "b"}


def test_an_index_that_disagrees_with_its_shards(tmp_path):
    folder = sharded(tmp_path, c="model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: lacks c, which model"):
        open_files(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors: missing, although .* lists it; fetch"):
        open_files(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"weight_map": {"a": 1}}', "[" * 100_000, "\udcff"])
def test_an_index_that_is_none(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: (can't be read|is not|has no weight_map)"):
        open_files(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "weights.pt", "x.pkl"])
def test_pickles_are_never_opened(tmp_path, name):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=rf"holds only {name}, a pickle.*never opened.*safe_serialization=True"):
        open_files(tmp_path)
    assert not (tmp_path / "ran").exists()
    save_file({"a": numbers(2)}, tmp_path / "model.safetensors")
    assert set(open_files(tmp_path).entries) == {"a"}


def test_nothing_to_open(tmp_path):
    with pytest.raises(ValueError, match="gone: does not exist"):
        open_files(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"holds no model\.safetensors$"):
        open_files(tmp_path)
    save_file({"a": numbers(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"holds no model\.safetensors, only adapter_model\.safetensors$"):
        open_files(tmp_path)
    assert set(open_files(tmp_path, "adapter_model").entries) == {"a"}
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: is a file, not a directory"):
        open_files(tmp_path / "adapter_model.safetensors")
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors but no model\.safetensors\.index\.json"):
        open_files(tmp_path)


# ------------------------------------------------------------------------------------------------------------- writing


def test_shards_of_a_size_with_an_index(tmp_path):
    tensors = {name: numbers(size) for name, size in {"a": 10, "b": 10, "c": 100, "d": 5, "e": 5}.items()}
    infos = {n: (a.dtype, a.shape) for n, a in tensors.items()}
    files = write(tmp_path, infos, tensors.__getitem__, max_bytes=80)
    assert [f.name for f in files] == [
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    assert {p.name for p in tmp_path.iterdir()} == {f.name for f in files}
    index = json.loads(files[-1].read_text())
    assert index["metadata"] == {"total_size": 4 * 130}
    assert [index["weight_map"][n][6:11] for n in "abcde"] == ["00001", "00001", "00002", "00003", "00003"]
    opened = open_files(tmp_path)
    for name, array in tensors.items():
        np.testing.assert_array_equal(opened.read(name), array)


def test_one_tensor_at_a_time(tmp_path):
    alive = []

    class Counted(np.ndarray):
        def __del__(self):
            alive.remove(id(self))

    def read(name: str) -> np.ndarray:
        assert not alive, "the last tensor must be gone before the next is made"
        array = numbers(8).view(Counted)
        alive.append(id(array))
        return array

    write(tmp_path, dict.fromkeys("abc", (np.float32, (8,))), read, max_bytes=64)


def test_an_export_that_dies_leaves_nothing(tmp_path):
    def read(name: str) -> np.ndarray:
        if name == "c":
            raise KeyboardInterrupt
        assert not list(tmp_path.glob("model*")), "no file has its name before all are whole"
        return numbers(8)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, dict.fromkeys("abc", (np.float32, (8,))), read, max_bytes=32)
    assert not list(tmp_path.iterdir())


def test_another_models_files_are_never_mixed_in(tmp_path):
    sharded(tmp_path)
    with pytest.raises(ValueError, match=r"holds model-00001-of-00002\.safetensors already; choose another"):
        write(tmp_path, {"a": (np.float32, (8,))}, lambda name: numbers(8))


def test_numbers_are_aligned(tmp_path):
    kinds = {"a": np.uint8, "b": np.float32, "c": ml_dtypes.bfloat16, "d": np.float64}
    write(tmp_path, {n: (t, (3,)) for n, t in kinds.items()}, lambda n: numbers(3, dtype=kinds[n]))
    assert all(e.start % e.dtype.itemsize == 0 for e in open_files(tmp_path).entries.values())
    assert len(CODES) == len(DTYPES)
