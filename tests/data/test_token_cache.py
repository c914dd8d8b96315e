"""The cache: tokenised once, whole or not at all, refused when damaged, never stale."""

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data import sources, token_cache
from jaxlm.data.tokenizer import Bytes

ROOT = Path(__file__).parents[2]


class Counting(Bytes):
    """Bytes, and how many documents were encoded."""

    count = 0

    def encode(self, text: str) -> list[int]:
        Counting.count += 1
        return super().encode(text)


class Wide(Bytes):
    """A vocabulary that 16 bits can't hold."""

    vocab_size = 70_000


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"document {i}: " + "é" * i)
    return folder


@pytest.fixture(autouse=True)
def _reset():
    Counting.count = 0


def _prepare(source, root, tokenizer=None, **more):
    return token_cache.prepare(str(source), tokenizer or Bytes(), root, **({"workers": 1, "progress": False} | more))


def _message(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_documents_come_back_between_bos_and_eos(corpus, tmp_path):
    made = _prepare(corpus, tmp_path / "root")
    assert list(made) == ["train"]
    opened = token_cache.open_cache(made["train"])
    texts = [document.text for document in sources.documents(str(corpus))]
    assert len(opened) == len(texts) == 60
    for i, text in enumerate(texts):
        ids = opened.document(i).tolist()
        assert (ids[0], ids[-1]) == (Bytes().bos_id, Bytes().eos_id)
        assert bytes(ids[1:-1]).decode() == text and opened.raw_bytes[i] == len(text.encode())
    assert opened.tokens.dtype == np.uint16 and isinstance(opened.tokens, np.memmap)
    assert (opened.vocab_size, opened.tokenizer_fingerprint, opened.pad_id) == (264, Bytes.fingerprint, 256)
    assert opened.offsets.dtype == opened.raw_bytes.dtype == np.int64


def test_big_vocabularies_take_32_bits(corpus, tmp_path):
    assert token_cache.open_cache(_prepare(corpus, tmp_path / "root", Wide())["train"]).tokens.dtype == np.uint32


def test_held_out_documents_are_the_other_part_and_come_back_as_text(corpus, tmp_path):
    made = _prepare(corpus, tmp_path / "root", holdout=0.3)
    train, valid = token_cache.open_cache(made["train"]), token_cache.open_cache(made["valid"])
    assert len(train) + len(valid) == 60 and 5 < len(valid) < 35
    for part, opened in (("train", train), ("valid", valid)):
        want = list(token_cache.texts(str(corpus), holdout=0.3, part=part))
        assert [bytes(opened.document(i)[1:-1].tolist()).decode() for i in range(len(opened))] == want
    assert "choose 'train' or 'valid'" in _message(lambda: next(token_cache.texts(str(corpus), part="test")))


@pytest.mark.parametrize("text", ["Citizen:\nSpeak é, speak.\n\n" * 400, "x" * 9000, "two words " * 900])
def test_one_long_document_is_divided_for_validation(tmp_path, text):
    """The classic first file: no whole document could be held out of it."""
    for name, content in (("a.txt", text), ("a.jsonl", json.dumps(dict(text=text)))):
        (tmp_path / name).write_text(content)
        made = _prepare(tmp_path / name, tmp_path / "root", holdout=0.02)
        train, valid = (token_cache.open_cache(made[part]) for part in ("train", "valid"))
        whole = sum(int(c.raw_bytes.sum()) for c in (train, valid))
        assert whole == len(text.encode()) and 0.01 < valid.raw_bytes.sum() / whole < 0.05
        assert len(valid) <= 2 and len(train) <= 3, "neighbouring pieces are one document"
        for part, opened in (("train", train), ("valid", valid)):
            found = [bytes(opened.document(i)[1:-1].tolist()).decode() for i in range(len(opened))]
            assert found == list(token_cache.texts(str(tmp_path / name), holdout=0.02, part=part))
            assert all(piece in text for piece in found)
        assert f"{tmp_path / name}: no whole document falls to validation; {len(valid)} pieces" in valid.notes[0]
        assert token_cache.open_cache(_prepare(tmp_path / name, tmp_path / "root")["train"]).notes == ()


def test_pairs_that_are_left_out_are_counted(tmp_path):
    (tmp_path / "p.en").write_text("one\n\nthree\nfour\n")
    (tmp_path / "p.de").write_text("eins\nzwei\n  \nvier\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(dict(en=a, de=b)) + "\n" for a, b in ("ab", ("", "c"))))
    for name, n, first in (("p", 2, tmp_path / "p.en:2"), ("p.jsonl", 1, "p.jsonl@23")):
        made = _prepare(tmp_path / name, tmp_path / "root", field=("en", "de"))
        notes = token_cache.open_cache(made["train"]).notes
        assert notes == (
            f"{tmp_path / name}: {n} pairs are left out, for one of their texts is empty (first: {first})",
        )


def test_workers_change_nothing_and_the_second_call_does_no_work(corpus, tmp_path):
    one = _prepare(corpus, tmp_path / "one", Counting(), holdout=0.3)
    assert Counting.count == 60
    two = _prepare(corpus, tmp_path / "two", workers=2, holdout=0.3)
    for part in one:
        for name in ("tokens.bin", "offsets.bin", "raw_bytes.bin"):
            assert (one[part] / name).read_bytes() == (two[part] / name).read_bytes()
    stamp = (one["train"] / "tokens.bin").stat().st_mtime_ns
    assert _prepare(corpus, tmp_path / "one", Counting(), holdout=0.3) == one
    assert Counting.count == 60 and (one["train"] / "tokens.bin").stat().st_mtime_ns == stamp
    assert not (one["train"].parent / "parts").exists()


def test_whatever_changes_the_content_changes_the_folder(corpus, tmp_path):
    root = tmp_path / "root"
    folders = [_prepare(corpus, root)["train"], _prepare(corpus, root, holdout=0.3)["train"]]
    other = Bytes()
    other.fingerprint = "another"
    folders.append(_prepare(corpus, root, other)["train"])
    (corpus / "05.txt").write_text("changed")
    folders.append(_prepare(corpus, root)["train"])
    (corpus / "99.txt").write_text("added")
    folders.append(_prepare(corpus, root)["train"])
    assert len(set(folders)) == 5
    assert len(token_cache.open_cache(folders[-1])) == 61


def test_a_cache_travels_by_path(corpus, tmp_path):
    opened = token_cache.open_cache(_prepare(corpus, tmp_path / "root")["train"])
    packed = pickle.dumps(opened)
    assert len(packed) < 1000
    assert (pickle.loads(packed).tokens == opened.tokens).all()


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "raw_bytes.bin"])
def test_damage_is_refused(corpus, tmp_path, name):
    path = _prepare(corpus, tmp_path / "root")["train"]
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    message = _message(lambda: token_cache.open_cache(path))
    assert f"{path / name} is damaged" in message and "delete" in message
    (path / name).write_bytes(whole[:-8])
    assert f"{path / name} is damaged" in _message(lambda: token_cache.open_cache(path, verify=False))
    (path / name).unlink()
    assert f"{path / name} is damaged" in _message(lambda: token_cache.open_cache(path, verify=False))


def test_a_broken_or_missing_index_is_refused(corpus, tmp_path):
    path = _prepare(corpus, tmp_path / "root")["train"]
    index = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps(index | {"version": 99}))
    assert "cache format 99" in _message(lambda: token_cache.open_cache(path))
    (path / "index.json").write_text("{")
    assert "index.json is damaged" in _message(lambda: token_cache.open_cache(path))
    assert "is no prepared token cache" in _message(lambda: token_cache.open_cache(tmp_path / "none"))


def test_faults_are_one_clear_line(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    assert "can't write the token cache" in _message(lambda: _prepare(corpus, tmp_path / "file" / "root"))
    assert "holdout=1.0" in _message(lambda: _prepare(corpus, tmp_path / "root", holdout=1.0))
    assert "not one document fell to 'valid'" in _message(lambda: _prepare(corpus, tmp_path / "root", holdout=1e-9))
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    assert "the corpus is empty" in _message(lambda: _prepare(tmp_path / "empty.jsonl", tmp_path / "root"))
    nameless = Bytes()
    nameless.bos_id = nameless.eos_id = None
    assert "document boundaries" in _message(lambda: _prepare(corpus, tmp_path / "root", nameless))


def test_a_worker_hands_on_the_fault_of_a_file(corpus, tmp_path):
    (corpus / "30.txt").write_bytes(b"ab\xff")
    assert "30.txt:1: not UTF-8 at byte 2" in _message(lambda: _prepare(corpus, tmp_path / "root", workers=2))
    (corpus / "30.txt").write_bytes(b"abc")
    assert len(token_cache.open_cache(_prepare(corpus, tmp_path / "root")["train"])) == 60


SLOW = """
import os, sys, time
from jaxlm.data import token_cache
from jaxlm.data.tokenizer import Bytes

class Slow(Bytes):
    def encode(self, text):
        open(os.path.join(sys.argv[2], str(os.getpid())), "w").close()
        time.sleep(0.1)
        return super().encode(text)

if __name__ == "__main__":
    token_cache.prepare(sys.argv[1], Slow(), sys.argv[3], workers=2, progress=False)
"""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to watch processes")
def test_a_killed_run_goes_on_where_it_was_and_leaves_no_worker(corpus, tmp_path):
    script, pids, root = tmp_path / "slow.py", tmp_path / "pids", tmp_path / "root"
    script.write_text(textwrap.dedent(SLOW))
    pids.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, script, corpus, pids, root], env=environment)
    deadline = time.monotonic() + 30
    while len(list(root.glob("*/parts/*.npz"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 10
    workers = [int(path.name) for path in pids.iterdir()]
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(workers) == 2 and not any(map(_alive, workers))
    kept = {path.stem for path in root.glob("*/parts/*.npz")}
    cut = sources.shards(str(corpus))
    assert 4 <= len(kept) < len(cut)
    made = _prepare(corpus, root, Counting())
    assert Counting.count == sum(len(shard.keys) for shard in cut if shard.name not in kept)
    want = _prepare(corpus, tmp_path / "fresh")
    assert (made["train"] / "tokens.bin").read_bytes() == (want["train"] / "tokens.bin").read_bytes()


def test_a_full_disk_is_one_clear_line_and_loses_nothing(corpus, tmp_path):
    """A limit on file size stands in for the disk: parts fit, the joined file doesn't."""
    root = tmp_path / "root"
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "from jaxlm.data import token_cache; from jaxlm.data.tokenizer import Bytes\n"
        "try: token_cache.prepare(sys.argv[1], Bytes(), sys.argv[2], workers=1, progress=False)\n"
        "except ValueError as error: print(error)\n"
    )
    command = [sys.executable, "-B", "-c", script, corpus, root]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert "can't write the token cache" in done.stdout and done.stdout.count("\n") == 1, done.stderr
    assert "File too large" in done.stdout
    assert len(list(root.glob("*/parts/*.npz"))) == len(sources.shards(str(corpus)))
    _prepare(corpus, root, Counting())
    assert Counting.count == 0
