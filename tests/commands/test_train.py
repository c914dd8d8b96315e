"""A whole run from the command line, in this process, on eight devices: train, resume, evaluate, generate, refuse."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.assembly import new_data, open_model, run_directory
from jaxlm.assembly.model_source import StartModel
from jaxlm.commands import cli
from jaxlm.core import config_io
from jaxlm.core.config import Mesh
from jaxlm.training.log import read_lines

CONFIG = """
from jaxlm import Data, Execution, Mesh, Optim, Run, Train
from jaxlm.models import llama
from jaxlm.objectives import causal

def config():
    return Run(
        name="run",
        model=llama.Config(vocab=384, layers=2, width=16, heads=4, kv_heads=2, head_width=8, ffn=32, positions=64),
        objective=causal.Config(),
        data=Data(train=({text!r},), holdout=0.2, tokenizer="bytes", cache={cache!r}, tokenize_workers=1),
        optim=Optim(lr=1e-2, warmup=1, ema=0.5),
        train=Train(steps=6, batch_size=16, micro_batches=2, seq_len=32, eval_every=3, save_every=2, log_every=1,
                    sample_every=0, prompts=("def ",), sample_tokens=4),
        mesh=Mesh(data=2, fsdp=2, tensor=2),
        execution=Execution(dtype="float32", scan=True),
        out={out!r},
    )
"""


def made_in(folder: Path) -> Path:
    text = folder / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text(f"file {i}: " + "".join(f"def f{i * j}(x): return x + {j}\n" for j in range(20)))
    (folder / "c.py").write_text(CONFIG.format(text=str(text), cache=str(folder / "cache"), out=str(folder / "runs")))
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return made_in(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose run has ended, with what it has shown in a file. Who changes it leaves it as it was."""
    home = made_in(tmp_path_factory.mktemp("trained"))
    with (home / "shown.txt").open("w") as shown, contextlib.redirect_stdout(shown):
        assert run(home) == 0
    return home


def run(home: Path, *args: str) -> int:
    return cli.main(["train", str(home / "c.py"), *args])


def lines(folder: Path) -> list[dict]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in line.items() if k != "time"} for line in read_lines(folder / "metrics.jsonl")]


def weights(folder: Path, step: int) -> dict[str, np.ndarray]:
    values = jax.device_get(open_model.open_model(folder, step).params)
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(values)}


def test_a_run_leaves_everything_about_itself(trained: Path, capsys: pytest.CaptureFixture) -> None:
    folder = trained / "runs" / "run"
    made = {p.name for p in folder.iterdir()}
    assert made >= {"config.json", "checkpoints", "metrics.jsonl", "events", "report.html", "report.png", "samples.txt",
                    "environment.json", "tokenizer"}  # fmt: skip
    log = lines(folder)
    train = [line for line in log if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert train[-1]["loss"] < train[0]["loss"]
    assert [line["step"] for line in log if line["kind"] == "valid"] == [0, 3, 6]
    shown = (trained / "shown.txt").read_text()
    assert "attention    xla (cudnn needs an NVIDIA GPU" in shown and "data 2 × fsdp 2 × tensor 2" in shown

    assert cli.main(["eval", str(folder), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    final = [line for line in log if line["kind"] == "valid"][-1]
    assert metrics["bits_per_byte"] == pytest.approx(
        final["bits_per_byte"], rel=1e-5
    )  # the averaged weights, both times
    assert metrics["targets"] == final["targets"]
    assert cli.main(["generate", str(folder), "--prompt", "def f", "--tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["prompts"] == ["def f"]
    assert cli.main(["report", str(folder)]) == 0


def test_resumed_equals_uninterrupted_bit_for_bit(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxlm.training import loop

    whole = trained / "runs" / "run"
    original = loop.Hooks.__init__

    def dying(self, **hooks):  # type: ignore[no-untyped-def]
        step, calls = hooks["step"], []

        def one(state, batch):  # type: ignore[no-untyped-def]
            calls.append(1)
            if len(calls) == 4:
                raise MemoryError("killed")
            return step(state, batch)

        original(self, **hooks | {"step": one})

    monkeypatch.setattr(loop.Hooks, "__init__", dying)
    with pytest.raises(MemoryError):
        run(trained, "--name", "cut")
    monkeypatch.undo()
    cut = trained / "runs" / "cut"
    assert run(trained, "--name", "cut") == 0
    assert lines(cut) == lines(whole)
    a, b = weights(cut, 6), weights(whole, 6)
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_resumed_on_another_mesh_sees_the_same_data(trained: Path) -> None:
    folder = trained / "runs" / "moved"
    shutil.copytree(trained / "runs" / "run", folder)
    config = json.loads((folder / "config.json").read_text())
    config["name"], config["train"]["prompts"] = "moved", []
    (folder / "config.json").write_text(json.dumps(config))
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    cut_log(folder, "end")
    assert cli.main(["train", str(folder), "--mesh.data", "1", "--mesh.fsdp", "8", "--mesh.tensor", "1"]) == 0
    a = [x for x in lines(trained / "runs" / "run") if x["kind"] == "train"]
    b = [x for x in lines(folder) if x["kind"] == "train"]
    assert [x["weight/tokens"] for x in a] == [x["weight/tokens"] for x in b]
    np.testing.assert_allclose([x["loss"] for x in a], [x["loss"] for x in b], rtol=1e-5)


def cut_log(folder: Path, name: str) -> None:
    """As if the run had been killed just before that event."""
    text = (folder / "metrics.jsonl").read_text()
    assert name in text
    (folder / "metrics.jsonl").write_text(text[: text.index(f'"name": "{name}"')])


def test_a_run_killed_at_its_very_end_ends_once(trained: Path, capsys: pytest.CaptureFixture) -> None:
    folder = trained / "runs" / "run"
    whole, samples = lines(folder), (folder / "samples.txt").read_text()
    cut_log(folder, "end")
    assert run(trained) == 0
    assert lines(folder) == whole and (folder / "samples.txt").read_text() == samples
    capsys.readouterr()
    assert run(trained) == 0
    assert "finished already" in capsys.readouterr().out and lines(folder) == whole


def test_a_finished_run_is_given_more_steps(trained: Path, capsys: pytest.CaptureFixture) -> None:
    folder = trained / "runs" / "longer"
    shutil.copytree(trained / "runs" / "run", folder)
    before = [x for x in lines(folder) if x["kind"] == "train"]
    assert cli.main(["train", str(folder), "--train.steps", "5"]) == 2
    assert "train.steps is 6 there and 5 here" in capsys.readouterr().err
    assert cli.main(["train", str(folder), "--train.steps", "8", "--train.prompts"]) == 0
    shown = capsys.readouterr().out
    assert "train.steps 6 → 8: the schedule is now that of 8 steps; the learning rate goes on at " in shown
    after = [x for x in lines(folder) if x["kind"] == "train"]
    assert after[:6] == before and [x["step"] for x in after[6:]] == [7, 8]
    assert [x["step"] for x in lines(folder) if x.get("name") == "end"] == [6, 8]
    assert json.loads((folder / "config.json").read_text())["train"]["steps"] == 8
    assert cli.main(["train", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "finished already" in shown and f"jaxlm train {folder} --train.steps 16" in shown


@pytest.mark.usefixtures("one_device")
def test_a_finished_run_learns_new_data_in_a_run_beside_it(trained: Path, capsys: pytest.CaptureFixture) -> None:
    """Under the next free name, or the one that is given; the same command goes on with it; Python does the same."""
    folder, new = trained / "runs" / "week", trained / "new.txt"
    shutil.copytree(trained / "runs" / "run", folder)
    new.write_text("other words than those before\n" * 200)
    for name in ("metrics.jsonl", "config.json"):
        assert (folder / name).is_file()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    short = ["--train.steps", "2", "--train.prompts", "--optim.ema", "0", "--train.micro_batches", "1",
             "--mesh.data", "1", "--mesh.fsdp", "1", "--mesh.tensor", "1", "--train.batch-size", "4"]  # fmt: skip
    args = ["train", str(folder), "--data.train", str(new), *short]
    capsys.readouterr()
    assert cli.main(args) == 0
    shown = capsys.readouterr().out
    second = folder.with_name("week-2")
    rates = f"{second} goes on from {folder} as a new run: its learning rate rises to 0.01 by step 1 and is 0.01 at "
    assert f"{rates}step 2, the last (cosine); that of {folder} ended at 0.001\n" in shown
    warning = f"warning: {second} may forget what {folder} learned"
    [line] = [line for line in shown.splitlines() if line.startswith("warning: ")]
    assert line.startswith(warning) and "--continual.methods replay --continual.replay.share 0.05" in line
    assert f"Warning: {second} may forget what {folder} learned" in (second / "report.html").read_text()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    run = run_directory.read_config(second)
    assert (run.start, run.data.train, run.name) == (str(folder), (str(new),), "week-2")
    start, learned = weights(folder, 6), weights(second, 2)
    assert start.keys() == learned.keys()
    rows = lines(second)
    assert [x["step"] for x in rows if x["kind"] == "train"] == [1, 2] and rows[0]["model"] == str(folder)

    assert cli.main(args) == 0 and f"{second} is finished already" in capsys.readouterr().out
    names = {"week-2": {}, "given": {"name": "given"}, "week-3": {"seed": 7}}
    for name, more in names.items():
        made = jaxlm.load(folder, **{"data.train": (str(new),), **CHANGES}, **more)
        assert (made.name, made.start, made.out) == (name, str(folder), str(folder.parent))
    third = jaxlm.load(second, **{"data.train": (str(trained / "text"),), "continual.methods": ("replay",)})
    assert (third.name, third.start, third.train.steps) == ("week-3", str(second), 2)
    assert new_data.told(third, StartModel(third.start))[1:] == [], "replay keeps what was learned"
    same = jaxlm.load(folder, **{"train.steps": 9})
    assert (same.name, same.start) == ("week", ""), "other fields than its data change no more than they did"
    with pytest.raises(ValueError, match=r"start: new data for .* starts from its own model"):
        jaxlm.load(folder, start=str(second), **{"data.train": (str(new),)})

    both = trained / "both"  # what the second run changed counts half
    assert cli.main(["merge", str(folder), str(second), "--out", str(both), "--weights", "0.5", "0.5"]) == 0
    old, learned, half = (jaxlm.open(place).pretrained.params for place in (folder, second, both))
    assert (np.asarray(old["embed"]) != np.asarray(learned["embed"])).any()
    jax.tree.map(
        lambda a, b, c: np.testing.assert_array_equal(c, (0.5 * np.asarray(a, float) + 0.5 * b).astype(np.float32)),
        old, learned, half,
    )  # fmt: skip


CHANGES = {
    "train.steps": 2, "train.prompts": (), "optim.ema": 0.0, "train.micro_batches": 1, "mesh": Mesh(),
    "train.batch_size": 4,
}  # fmt: skip


BREAKING = ["--optim.lr", "31.25", "--optim.clip", "0", "--optim.ema", "0", "--train.micro_batches", "1",
            "--mesh.data", "1", "--mesh.fsdp", "1", "--mesh.tensor", "1"]  # fmt: skip
"""A rate that breaks the model, and a step on one device that compiles fast, once for those who use it."""

BAD = {
    "unknown key": (["--optim.learning-rate", "1"], "unknown config key optim.learning_rate"),
    "mistyped key": (["--optim.wramup", "1"], "did you mean 'optim.warmup'"),
    "wrong type": (["--optim.lr", "fast"], "optim.lr: 'fast' is not a valid float"),
    "mesh too large": (["--mesh.data", "16"], "does not fit 8 devices"),
    "batch and mesh": (["--train.batch-size", "6"], "train.batch_size"),
    "sequence too long": (["--train.seq-len", "128"], "longer than model.positions 64"),
    "nothing there": (["--data.train", "nowhere/*.txt"], "nowhere"),
    "vocabulary": (["--model.vocab", "100"], "model.vocab: 100 does not fit the tokenizer's"),
    "frozen pattern": (["--optim.freeze", "nothing"], "optim.freeze: pattern 'nothing' matches no parameter"),
    "fused attention": (["--execution.attention", "cudnn"], "needs an NVIDIA GPU"),
    "warm-up": (["--optim.warmup", "9"], "do not fit into train.steps"),
    "heads": (["--model.kv-heads", "1"], "mesh: blocks/k has 1 kv"),
    "encoder objective": (["--out", "/dev/null/x"], "/dev/null"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_one_line_and_status_2(home: Path, case: str, capsys: pytest.CaptureFixture) -> None:
    args, message = BAD[case]
    assert run(home, *args) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"fine \xff broken", "x.txt"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "2"),
        ("x.jsonl", b'{"body": "a"}\n', "text"),
        ("x.txt", b"", "x.txt"),
    ],
)
def test_bad_data_names_the_file(
    home: Path, name: str, content: bytes, message: str, capsys: pytest.CaptureFixture
) -> None:
    file = home / name
    file.write_bytes(content)
    assert run(home, "--data.train", str(file)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_a_directory_of_another_config_is_left_alone(trained: Path, capsys: pytest.CaptureFixture) -> None:
    before = (trained / "runs" / "run" / "metrics.jsonl").read_bytes()
    assert run(trained, "--optim.lr", "1e-3") == 2
    assert "belongs to another config: optim.lr is 0.01 there and 0.001 here" in capsys.readouterr().err
    assert (trained / "runs" / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.usefixtures("one_device")
def test_dry_run_shows_where_values_come_from_and_writes_nothing(home: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(home, "--dry-run", *BREAKING) == 0
    shown = capsys.readouterr().out
    for words in (
        "optim.lr",
        "31.25",
        "command line",
        "blocks/q",
        "adamw, decay 0.1",
        "MiB a device",
        "targets (in brackets",
    ):
        assert words in shown
    assert not (home / "runs").exists()


def test_dry_run_shows_examples_that_are_judged_as_a_whole(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxlm.commands import dry_run
    from jaxlm.data.tokenizer import Bytes
    from jaxlm.objectives import choice, tag
    from jaxlm.objectives.objective import RowShape

    tokens, rng = Bytes(), np.random.default_rng(0)
    texts = [dict(ids=[*text], types=[0] * len(text)) for text in (b"one", b"two")]
    record, row = dict(texts=texts, answer=1), RowShape(8, "encoder")
    dry_run.show_example(choice.example(choice.Config(most=2), record, row, tokens, rng), tokens, "first")
    shown = capsys.readouterr().out
    assert (
        "one" in shown
        and "two" in shown
        and "first: 3 tokens (and 5 of padding)" in shown
        and "target number 1" in shown
        and "<pad>" not in shown
    )
    assert dry_run.named(np.array([0, 1, 1], np.float32), ("no", "yes", "so")) == "yes so"
    words = tag.Config(labels=("O", "B"))
    row = tag.example(words, dict(ids=[*b"ab cd"], firsts=[0, 3], tags=[1, 0]), RowShape(5), tokens, rng)
    marked: list[bool] = []
    monkeypatch.setattr(dry_run, "decoded", lambda ids, segments, tokens, marks: marked.extend(marks))
    monkeypatch.setattr(dry_run, "print_text", lambda text: None)
    dry_run.show_example(row, tokens, "first", ("O", "B"))
    assert "labels: B O" in capsys.readouterr().out
    assert marked == [True, False, False, True, False], "the words' own first tokens"


@pytest.mark.parametrize("kind", ["byte_level", "word_piece"])
def test_examples_are_shown_as_their_text(kind: str) -> None:
    """Whatever a vocabulary's spelling, without padding, and marked where no terminal could underline."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from jaxlm.commands import dry_run
    from jaxlm.data.tokenizer import HuggingFace

    if kind == "byte_level":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        words = ["[UNK]", "a", "caf", "##é", "世", "##界"]
        made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = HuggingFace(made.to_str())
    first, second = tokens.encode("a café"), tokens.encode(" 世界")
    ids, segments = np.array([*first, *second, 0, 0]), np.array([1] * len(first + second) + [0] * 2)
    marked = [len(first) <= t < len(first + second) for t in range(len(ids))]
    assert dry_run.decoded(ids, segments, tokens, marked).plain.strip() == "a café⟦ 世界⟧"


def test_every_shipped_config_loads_and_its_weights_are_declared() -> None:
    from jaxlm.core.spec import count
    from jaxlm.models import MODELS
    from jaxlm.objectives import OBJECTIVES
    from jaxlm.weights.adapters import METHODS

    files = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
    sizes = {}
    for file in files:
        run = config_io.load(file)
        assert config_io.from_dict(json.loads(json.dumps(config_io.to_dict(run))), MODELS, OBJECTIVES, METHODS) == run
        assert run.name == file.stem
        sizes[run.name] = count(MODELS.of(run.model).specs(run.model)) / 1e6
    assert sizes["gpt2_124m"] == pytest.approx(124.5, abs=0.1)
    assert sizes["llama_1b"] == pytest.approx(1236, abs=1)
    assert sizes["llama_8b"] == pytest.approx(8030, abs=1)
    assert sizes["bert_base"] == pytest.approx(110.2, abs=0.2)


def test_the_small_commands(home: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["doctor"]) == 0
    assert "jaxlib" in capsys.readouterr().out
    assert cli.main(["data", "inspect", str(home / "c.py"), "--examples", "1"]) == 0
    assert "of them targets (in brackets" in capsys.readouterr().out
    assert cli.main(["data", "prepare", str(home / "c.py")]) == 0
    assert "documents" in capsys.readouterr().out
    made = home / "made.model"
    assert cli.main(["tokenizer", "train", str(home / "text"), "--vocab", "300", "--out", str(made)]) == 0
    assert made.exists()
    assert cli.main(["train", "tiny_lama"]) == 2
    assert "did you mean 'tiny_llama'" in capsys.readouterr().err
    assert cli.main(["eval", str(home)]) == 2
    assert "neither a run directory nor" in capsys.readouterr().err


def test_a_run_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_io.load(Path(__file__).parents[2] / "configs" / "tiny_llama.py").seed = 1  # type: ignore[misc]


@pytest.mark.usefixtures("one_device")
def test_the_best_checkpoint_is_used_where_the_run_says_so(home: Path, capsys: pytest.CaptureFixture) -> None:
    """At a rate that breaks the model the first validation is the best one."""
    more = ["--train.save_every", "0", "--train.eval_every", "1", "--train.prompts"]
    assert run(home, *BREAKING, *more, "--train.use", "best", "--train.metric", "accuracy") == 0
    folder = home / "runs" / "run"
    valid = {line["step"]: line["accuracy"] for line in lines(folder) if line["kind"] == "valid" and line["step"]}
    best = max(valid, key=lambda step: (valid[step], step))
    assert weights(folder, None).keys() == weights(folder, best).keys()
    jax.tree.map(np.testing.assert_array_equal, weights(folder, None), weights(folder, best))
    assert run(home, *BREAKING, "--name", "other", "--train.metric", "acuracy") == 2
    assert "train.metric: unknown 'acuracy'; did you mean 'accuracy'?" in capsys.readouterr().err
