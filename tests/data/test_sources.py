"""Sources: every kind yields the same keyed documents in the same order, and faults name the file and the remedy."""

import argparse
import gzip
import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from jaxlm.data import sources
from jaxlm.data.sources import shard, text_files

RECORDS = [{"text": f"text {i} é 中文\nsecond line", "title": f"title {i}", "n": i} for i in range(25)]
TEXTS = [record["text"] for record in RECORDS]


def _texts(source, **more) -> list[str]:
    return [document.text for document in sources.documents(str(source), **more)]


def _lines(records) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _message(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_every_text_file_below_it(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in {
        "z.txt": "last",
        "b/a.py": "x = 1\r\n",
        "a.md": "first",
        "b/c.bin": "no",
        ".git/x.txt": "no",
    }.items():
        (tmp_path / name).write_bytes(text.encode())
    found = list(sources.documents(str(tmp_path)))
    assert [(d.key, d.text) for d in found] == [("a.md", "first"), ("b/a.py", "x = 1\r\n"), ("z.txt", "last")]


def test_file_and_glob(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"file {i}")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "3.txt").write_text("file 3")
    assert _texts(tmp_path / "1.txt") == ["file 1"]
    assert _texts(tmp_path / "*.txt") == ["file 0", "file 1", "file 2"]
    found = list(sources.documents(str(tmp_path / "**" / "*.txt")))
    assert sorted(d.key for d in found) == ["0.txt", "1.txt", "2.txt", "deep/3.txt"]


def test_small_files_share_shards_and_shards_are_stable(tmp_path):
    for i in range(200):
        (tmp_path / f"{i:03}.txt").write_text("x" * (50 + i))
    cut = sources.shards(str(tmp_path))
    assert cut == sources.shards(str(tmp_path)) == pickle.loads(pickle.dumps(cut))
    assert 50 <= len(cut) <= text_files.GROUPS and len({shard.name for shard in cut}) == len(cut)
    assert max(s.size for s in cut) < 3 * sum(s.size for s in cut) / len(cut)
    assert [d.key for s in cut for d in sources.read(s)] == [f"{i:03}.txt" for i in range(200)]


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)])
def test_jsonl_plain_and_compressed(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(_lines(RECORDS)))
    assert _texts(path) == TEXTS
    assert _texts(path, field="title") == [record["title"] for record in RECORDS]
    path.write_bytes(pack(_lines(RECORDS[:10])) + pack(_lines(RECORDS[10:])))  # two frames, one after the other
    assert _texts(path) == TEXTS
    broken = _lines(RECORDS[:3]) + b'{"text": \n' + _lines(RECORDS[3:])
    path.write_bytes(pack(broken))
    assert f"{path}:4: not a JSON record" in _message(lambda: _texts(path))
    path.write_bytes(pack(_lines([*RECORDS[:2], {"body": "x", "n": 1}])))
    assert f"{path}:3: no text field 'text'; text fields there: body" in _message(lambda: _texts(path))


def test_a_big_jsonl_file_is_cut_between_lines(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines(RECORDS).rstrip(b"\n"))
    whole = list(sources.documents(str(path)))
    for size in (1, 37, 200):
        monkeypatch.setattr(shard, "PIECE_BYTES", size)
        assert len(sources.shards(str(path))) > 1
        assert list(sources.documents(str(path))) == whole


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_cut_off_archive_is_an_error(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(_lines([{"text": str(i**9 % 1_000_003)} for i in range(5000)]))[:-200])
    assert f"{path} is damaged" in _message(lambda: _texts(path))
    path.write_bytes(b"nonsense")
    assert f"{path} is damaged" in _message(lambda: _texts(path))


def test_half_a_surrogate_pair_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "\\ud800"}\n')
    assert f"{path}:2:" in _message(lambda: _texts(path))


def test_parquet_by_row_group(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=10)
    assert len(sources.shards(str(path))) == 3
    assert _texts(path) == TEXTS
    assert "no text field 'body'; text fields there: text, title" in _message(lambda: _texts(path, field="body"))
    path.write_bytes(b"nonsense")
    assert "can't be read as Parquet" in _message(lambda: _texts(path))


def test_faults_are_one_clear_line(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "a.bin").write_bytes(b"abc")
    (tmp_path / "folder").mkdir()
    assert f"{tmp_path}/bad.txt:1: not UTF-8 at byte 3" in _message(lambda: _texts(tmp_path / "bad.txt"))
    assert "is empty" in _message(lambda: _texts(tmp_path / "empty.txt"))
    assert "unknown kind" in _message(lambda: _texts(tmp_path / "a.bin"))
    assert "matches no file" in _message(lambda: _texts(tmp_path / "*.nothing"))
    assert "does not exist" in _message(lambda: _texts(tmp_path / "nothing.txt"))
    assert "holds no text files" in _message(lambda: _texts(tmp_path / "folder"))


def test_a_missing_reader_names_the_package(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(_lines(RECORDS)))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install zstandard" in _message(lambda: _texts(path))


def test_stdlib_is_this_python_without_site_packages():
    cut = sources.shards("stdlib")
    keys = [key for shard in cut for key in shard.keys]
    assert 32 <= len(cut) <= 64 and len(keys) == len(set(keys)) > 500
    assert "argparse.py" in keys and not any("-packages" in key for key in keys)
    assert sum(shard.size for shard in cut) > 10_000_000
    document = next(sources.read(cut[0]))
    assert document.text == (Path(argparse.__file__).parent / document.key).read_bytes().decode()


def test_stdlib_is_looked_through_once_in_a_process(monkeypatch):
    read = []
    monkeypatch.setattr(text_files, "read_text", lambda path: read.append(path))
    text_files.cut_stdlib.cache_clear()
    try:
        first = sources.shards("stdlib")
        assert len(read) == len(set(read)) > 500
        assert sources.shards("stdlib") == first and len(read) == len(set(read))
    finally:
        text_files.cut_stdlib.cache_clear()


def test_held_out_is_a_share_and_depends_on_the_key_alone():
    keys = [f"file{i}.py" for i in range(20_000)]
    share = sum(sources.held_out(key, 0.1) for key in keys) / len(keys)
    assert abs(share - 0.1) < 0.01
    assert {key for key in keys if sources.held_out(key, 0.02)} <= {key for key in keys if sources.held_out(key, 0.1)}
    assert not any(sources.held_out(key, 0.0) for key in keys)
    # Written down once: another machine or version must split alike.
    assert [key for key in keys[:40] if sources.held_out(key, 0.1)] == ["file10.py", "file22.py", "file35.py"]


# --------------------------------------------------------------------------------------------------------------- pairs


def _pairs(source, field=("text", "title")) -> list[tuple[str, ...]]:
    return [document.texts for document in sources.documents(str(source), field=field)]


def test_pairs_come_from_two_fields_of_a_record(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(_lines([*RECORDS, {"text": "half", "title": ""}]))
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "x.parquet", row_group_size=7)
    expected = [(record["text"], record["title"]) for record in RECORDS]
    for name in ("x.jsonl", "x.parquet"):
        assert _pairs(tmp_path / name) == expected, "half a pair is left out, and its other half with it"
        keys = [d.key for d in sources.documents(str(tmp_path / name), field=("text", "title"))]
        assert keys == [d.key for d in sources.documents(str(tmp_path / name))][: len(keys)]
    for name in ("x.jsonl", "x.parquet"):
        assert "no text field 'nope'" in _message(lambda name=name: _pairs(tmp_path / name, ("text", "nope")))


def test_pairs_come_from_two_files_with_a_text_a_line(tmp_path, monkeypatch):
    """Lines end at a line feed alone, or one that holds an exotic separator would shift all that follow."""
    ours = ["one", "two\u2028still two\x0bstill", "", "fo\rur", "five", "six"]
    theirs = ["eins", "zwei", "drei", "vier", "", "sechs ß"]
    (tmp_path / "x.en").write_bytes("\n".join(ours).encode())  # the last line needs no line feed
    (tmp_path / "x.de").write_bytes("\r\n".join([*theirs, ""]).encode())
    expected = [(a, b) for a, b in zip(ours, theirs, strict=True) if a and b]
    assert _pairs(tmp_path / "x", ("en", "de")) == expected
    assert _pairs(tmp_path / "x", ("de", "en")) == [(b, a) for a, b in expected]
    whole = list(sources.documents(str(tmp_path / "x"), field=("en", "de")))
    monkeypatch.setattr(shard, "PIECE_BYTES", 20)
    assert len(sources.shards(str(tmp_path / "x"), field=("en", "de"))) > 2
    assert list(sources.documents(str(tmp_path / "x"), field=("en", "de"))) == whole


def test_faults_of_pairs(tmp_path):
    (tmp_path / "x.en").write_text("a\nb\n")
    say = lambda: _message(lambda: _pairs(tmp_path / "x", ("en", "de")))  # noqa: E731
    assert "x.de is missing" in say()
    (tmp_path / "x.de").write_text("a\nb\nc")
    assert "x.en has 2 lines and" in say() and "x.de 3" in say()
    (tmp_path / "x.de").write_bytes(b"a\n\xff\n")
    assert "x.de:2: not UTF-8" in say()
    assert "is plain text, which has no fields" in _message(lambda: _pairs(tmp_path / "x.en", ("en", "de")))
    assert "does not exist" in _message(lambda: _pairs(tmp_path / "y", ("en", "de")))


TFDS = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"text": text, "more": text, "n": np.int32})
        return tfds.core.DatasetInfo(builder=self, features=features)
    def _split_generators(self, manager):
        return {"train": self._generate_examples(12), "test": self._generate_examples(3)}
    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"row {i} é", "more": f"more {i}", "n": i}

builder = Tiny(data_dir=sys.argv[1], file_format="array_record")
builder.download_and_prepare()
folder = builder.data_dir

from jaxlm.data import sources
rows = list(sources.documents(f"tfds:{folder}"))
assert sorted(d.text for d in rows) == sorted(f"row {i} é" for i in range(12)), rows
assert len({d.key for d in rows}) == 12
assert {d.texts for d in sources.documents(f"tfds:{folder}", field=("text", "more"))} == {
    (f"row {i} é", f"more {i}") for i in range(12)
}
assert len(list(sources.documents(f"tfds:{folder}:test"))) == 3
assert len(list(sources.documents(f"tfds:{folder}:train[:50%]"))) == 6
for bad, words in {"nope": "splits there: ", "train": "text fields there: more, text"}.items():
    try:
        list(sources.documents(f"tfds:{folder}:{bad}", field="body"))
    except ValueError as error:
        assert words in str(error) and "\\n" not in str(error), error
    else:
        raise SystemExit(f"no error for {bad}")
assert "tensorflow" not in sys.modules and "jax" not in sys.modules
print("ok")
"""


def test_tfds_array_record_without_tensorflow(tmp_path):
    script = tmp_path / "tiny.py"
    script.write_text(textwrap.dedent(TFDS))
    done = subprocess.run([sys.executable, script, tmp_path / "data"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0 and done.stdout.strip().endswith("ok"), done.stderr


ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}


def test_tfds_faults(tmp_path):
    assert "no prepared data set" in _message(lambda: sources.shards(f"tfds:{tmp_path}"))
    assert "names no data set" in _message(lambda: sources.shards("tfds:"))
