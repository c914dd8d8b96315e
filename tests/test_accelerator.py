"""The accelerator benchmark's arithmetic: kinds of kernels, time that is left, batches that fit, rows of its table."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def beside():
    """Its modules import each other as scripts of one folder do."""
    if not (FOLDER / "accelerator.py").is_file():
        pytest.skip("benchmarks are not part of this copy")
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def common():
    return importlib.import_module("accelerator_common")


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("accelerator")


@pytest.mark.parametrize(
    ("kernel", "operation", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128", "custom-call.11", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", "", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "custom-call.3", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128", "", "matmul"),
        ("gemm_fusion_dot_12", "gemm_fusion_dot.12", "matmul"),
        ("void cutlass::device_kernel<cutlass_tensorop_bf16_s16816gemm>", "", "matmul"),
        ("input_add_reduce_fusion_4", "input_add_reduce_fusion.4", "reduction"),
        ("triton_red_fused__to_copy_native_layer_norm_3", "", "reduction"),
        ("loop_multiply_fusion_2", "loop_multiply_fusion.2", "elementwise"),
        ("triton_poi_fused_gelu_1", "", "elementwise"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "", "elementwise"),
        ("MemcpyD2D", "copy.5", "copy"),
        ("Memset", "", "copy"),
        ("input_transpose_fusion", "", "copy"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "reduce-scatter.2", "collective"),
        ("dot.5", "dot.5", "matmul"),
        ("x", "reduce.7", "reduction"),
        ("RngBitGenerator", "", "other"),
    ],
)
def test_the_kind_of_a_kernel(common, kernel, operation, kind):
    assert common.kind_of(kernel, operation) == kind


def test_a_trace_becomes_shares_that_add_up_with_the_idle_time(common):
    """Two streams: a product of 40 with a copy of 20 inside it, nothing for 20, a fusion of 40."""
    events = [
        ("loop_add_fusion_1", "", 60e6, 40e6),
        ("nvjet_a.1", "", 0.0, 40e6),
        ("MemcpyD2D", "", 10e6, 20e6),
    ]
    found = common.summarize(events, steps=2)
    assert found["traced_ms_per_step"] == pytest.approx(50)
    assert found["idle_share"] == pytest.approx(0.2)
    assert found["kinds_ms_per_step"]["matmul"] == pytest.approx(20)
    assert found["kinds_share"]["matmul"] == pytest.approx(0.8 * 0.4)
    assert sum(found["kinds_share"].values()) + found["idle_share"] == pytest.approx(1)
    assert found["longest"][0]["calls_per_step"] == 0.5 and found["kernels_per_step"] == 1.5
    with pytest.raises(ValueError, match="no kernel"):
        common.summarize([], 1)


def test_rows_that_fit(common):
    assert common.fitting(4, fixed=20, used=60, limit=100) == 8  # 10 a row
    assert common.fitting(4, fixed=20, used=60, limit=99) == 4
    assert common.fitting(64, fixed=20, used=660, limit=100) == 8
    assert common.fitting(1, fixed=20, used=60, limit=10) == 1
    small = {"family": "llama", "layers": 2, "width": 64, "heads": 2, "kv_heads": 1, "ffn": 128, "vocab": 512}
    small["seq"] = 64
    batches = [common.first_batch(small, memory) for memory in (20e6, 40e6, 400e6)]
    assert batches == sorted(batches) and len(set(batches)) == 3
    assert 1.15 * common.estimated_bytes(small, batches[1], logits=True) <= 0.8 * 40e6


def test_only_memory_that_is_out_is_an_answer(common):
    def command(text):
        raise RuntimeError(text)

    answer = common.guarded(command)(text="RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore")
    assert answer == {"oom": "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."}
    with pytest.raises(RuntimeError, match="INTERNAL"):
        common.guarded(command)(text="INTERNAL: something else")


@pytest.fixture
def run(bench, common, tmp_path):
    """One part, run by `f` with a clock that shows `left` seconds → what the file says of it."""

    def go(f, left=100.0, needs=10.0):
        given = SimpleNamespace(rehearse=True, out=tmp_path / "out.json", keep=True, minutes=1, parts=[], threads=1)
        record = bench.Record(given, {"device": "NVIDIA H100 80GB HBM3"})
        clock = common.Clock(left / 60, now=lambda: 0.0)
        try:
            bench.run(record, bench.parts.Bench(given, clock, tmp_path), "gpt2", needs, f)
        finally:
            go.saved = json.loads(record.path.read_text())
        return go.saved["parts"]["gpt2"]

    return go


def test_a_part_is_done_skipped_or_failed_and_the_file_says_which(run, bench):
    def breaks(put):
        put({"half": 1})
        raise RuntimeError("the process has died:\nTraceback\nKeyError: 'x'")

    def late(put):
        raise TimeoutError("tests took more than the 9 s that were left")

    assert run(lambda put: {"x": 1}) | {"seconds": 0} == {"status": "done", "x": 1, "seconds": 0}
    assert run(lambda put: {}, left=9)["why"] == "gpt2 needs about 10 s, and 9 s are left"
    failed = run(breaks)
    assert (failed["status"], failed["half"], failed["error"]) == ("failed", 1, "RuntimeError: KeyError: 'x'")
    assert run(late)["status"] == "skipped"
    assert run(lambda put: {"rows": {"a": {"error": "no"}}})["status"] == "failed"
    assert run.saved["machine"]["published_flops_per_s"] == 989.4e12


def test_what_was_put_is_on_disk_when_a_run_is_cut(run):
    def cut(put):
        put({"rows": {"jaxlm": 1}})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cut)
    assert run.saved["parts"]["gpt2"]["rows"] == {"jaxlm": 1}
    assert run.saved["parts"]["gpt2"]["status"] == "running"


def test_unequal_numbers_end_the_run(run, bench, monkeypatch):
    case = {"compared": "this with that", "unequal": ["packing, gpt2"], "raised": {}}
    monkeypatch.setattr(bench.parts, "numerics", lambda b, w: case)
    with pytest.raises(bench.NotEqual, match="packing, gpt2"):
        run(lambda put: bench.numerics(SimpleNamespace(say=print), None, put))
    assert run.saved["parts"]["gpt2"]["status"] == "unequal"


def test_the_table_compares_rows_of_one_batch(bench, capsys):
    kinds = dict.fromkeys((*bench.KINDS, "other"), 0.1)
    memory = {"batch": 4, "compiled": 2e9, "peak": 3e9}
    ours = {"batch": 4, "positions": 1000, "flops_per_step": 8e12, "memory": memory}
    ours |= {"seconds": {"torch.compile": [0.02, 0.03, 0.02]}, "kernels": {"kinds_share": kinds, "idle_share": 0.3}}
    peer = {"batch": 4, "positions": 1000, "memory": {"peak": 5e9}, "seconds": {"jaxlm": [0.04, 0.04], "x": [9.0]}}
    wide = ours | {"batch": 8, "flops_per_step": 16e12, "seconds": {"alone": [0.04]}}
    part = {"shape": "s", "status": "done", "rows": {"jaxlm": ours, "torch.compile": peer, "b": {"skipped": "late"}}}
    more = {"shape": "s", "status": "done", "rows": {"wide": wide}}
    parts = {"ceilings": {"flops_per_s": 800e12, "status": "failed", "why": "?"}, "gpt2": part, "gpt2 largest": more}
    result = {"machine": {"published_flops_per_s": 1000e12}, "parts": parts}
    first, second, third, fourth = [dict(zip(bench.HEADER, row, strict=True)) for row in bench.rows(result)]
    assert (first["ms/step"], first["tokens/s"], first["TFLOP/s"]) == (20, 200000, pytest.approx(400))
    assert (first["of ceiling"], first["of published"], first["idle"]) == ("50.0 %", "40.0 %", "30.0 %")
    assert first["time / PyTorch's"] == pytest.approx(0.5)
    assert (first["compiled GB"], first["peak GB"]) == (2, 3)
    assert second["TFLOP/s"] == pytest.approx(200) and second["matmul"] == "-"
    assert third["rows × positions"] == "skipped" and third["ms/step"] == "-"
    assert fourth["time / PyTorch's"] == "-" and fourth["TFLOP/s"] == pytest.approx(400)


class Bench:
    """Stands in for the processes: `answers[side]` says what its commands give, an exception is raised."""

    def __init__(self, bench, common, folder, together):
        self.parts, self.clock, self.folder, self.rehearse = bench.parts, common.Clock(9, lambda: 0.0), folder, False
        self.settings, self.memory, self.dropped = SimpleNamespace(threads=1), 80e9 if together else 50e9, []
        self.said, self.answers, self.started = [], {}, []

    def start(self, torch=False):
        return SimpleNamespace(torch=torch, process=SimpleNamespace(poll=lambda: None), name=None)

    def drop(self, worker):
        self.dropped.append(worker)

    def say(self, text):
        self.said.append(text)

    def ask(self, worker, do, **given):
        if do == "prepare":
            way = str((given.get("overrides"), given.get("segments")))
            worker.name = "torch.compile" if worker.torch else "unrolled" if "'False'" in way else "scanned"
            self.started.append(worker.name)
        answer = self.answers.get((worker.name, do), {})
        answer = answer.pop(0) if isinstance(answer, list) else answer
        if isinstance(answer, Exception):
            raise answer
        memory = {"batch": given.get("batch", 4), "compiled": 20e9, "state": 2e9, "peak": 20e9, "reserved": 25e9}
        usual = {
            "prepare": {
                "memory": memory,
                "tried": {"4": 1},
                "notes": {"attention": "x"},
                "config": {},
                "flops_per_step": memory["batch"] * 10,
            }
            | ({"losses": [9.0, 8.0]} if worker.torch else {}),
            "steps": {"seconds": 0.5, "losses": [9.0, 8.0]},
            "memory": memory,
            "resize": {"memory": memory},
        }
        return usual.get(do, {}) | answer


@pytest.fixture
def race(bench, common, tmp_path):
    def go(answers, together=True):
        fake = Bench(bench, common, tmp_path, together)
        fake.answers = answers
        race = bench.parts.Race(fake, "gpt2-124m", lambda value: None)
        race.run(["jaxlm, scanned", "jaxlm, unrolled"])
        assert not race.alive and len(fake.dropped) >= len(fake.started)
        return race.rows, fake

    return go


def beside_whom(rows):
    return {name: sorted(row.get("seconds", {})) for name, row in rows.items()}


def test_each_of_our_ways_takes_turns_with_the_peer_where_both_fit(race):
    rows, _ = race({})
    ours = ["jaxlm, scanned", "jaxlm, unrolled"]
    peer = ["torch.compile"]
    assert beside_whom(rows) == {"torch.compile": ours, ours[0]: ["alone", *peer], ours[1]: peer}


def test_where_they_do_not_fit_each_has_the_device_alone(race):
    rows, fake = race({}, together=False)
    assert set(map(tuple, beside_whom(rows).values())) == {("alone",)}
    assert fake.started == ["scanned", "torch.compile", "unrolled"]


def test_memory_that_runs_out_beside_the_peer_is_tried_again_alone(race, bench):
    rows, fake = race({("unrolled", "prepare"): [bench.parts.MemoryIsOut("no"), {}]})
    assert beside_whom(rows)["jaxlm, unrolled"] == ["alone"] and "error" not in rows["jaxlm, unrolled"]
    assert beside_whom(rows)["torch.compile"] == ["jaxlm, scanned"]
    assert any("again, alone" in line for line in fake.said)


def test_a_peer_that_fails_or_computes_something_else_leaves_ours_measured(race):
    for answer in (RuntimeError("the process has died:\nno torch"), {"losses": [9.0, 3.0]}):
        rows, _ = race({("torch.compile", "prepare"): answer})
        assert beside_whom(rows)["jaxlm, scanned"] == beside_whom(rows)["jaxlm, unrolled"] == ["alone"]
        assert rows["torch.compile"]["error"].startswith(
            ("RuntimeError: no torch", "Different: torch.compile does not")
        )


def test_a_peer_that_holds_fewer_rows_sets_the_batch(race):
    memory = {"batch": 16, "state": 1, "peak": 2, "reserved": 3}
    rows, _ = race({("torch.compile", "prepare"): {"memory": memory}})
    assert {row["batch"] for row in rows.values()} == {16}
    assert rows["jaxlm, scanned"]["memory"]["peak"] is None  # that of more rows
    assert rows["jaxlm, scanned"]["flops_per_step"] == 160
    rows, _ = race({("torch.compile", "prepare"): {"memory": memory}}, together=False)
    assert rows["jaxlm, scanned"]["batch"] > 16 == rows["jaxlm, scanned, fewer rows"]["batch"]
