"""Checkpoints: what is saved comes back bit for bit on any mesh; damage, full disks and killed processes cost no more
than the newest step, and are said."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import struct
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.formats.checkpoint import Checkpoints, abstract

ROOT = Path(__file__).parents[2]


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    frozen: dict
    opt: optax.OptState
    key: jax.Array


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def mesh(**sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def place(state, over, matrix):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(over, matrix if x.ndim == 2 else P())), state)


def make(step=1, seed=0):
    """A State with holes, an optimizer of nested named tuples, a typed key, and a dtype of 2 bytes and of 4 bits."""
    k1, k2, k3 = jax.random.split(jax.random.key(seed), 3)
    params = {"blocks": {"q": jax.random.normal(k1, (16, 8)), "k": None}, "bias": jax.random.normal(k2, (8,))}
    frozen = {"blocks": {"q": None, "k": jax.random.normal(k3, (16, 8), jnp.bfloat16)}, "bias": None}
    frozen["codes"] = jnp.arange(8).astype(jnp.int4)
    return State(jnp.int32(step), params, frozen, TX.init(params), jax.random.key(seed + 7))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)

    def bits(x):
        x = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return np.asarray(x).tobytes()

    return all(x.dtype == y.dtype and bits(x) == bits(y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def fill(folder, steps=(10, 20), **options):
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make(step, seed=step), {"loader": {"position": step}})
    return folder


def test_state_and_meta_come_back_bit_for_bit(tmp_path):
    state = make(5)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.save(5, state, {"config": {"lr": 1e-3}, "loader": {"position": 40}})
        restored, meta = checkpoints.restore(abstract(state))
    assert same(state, restored)
    assert meta == {"config": {"lr": 1e-3}, "loader": {"position": 40}}
    assert Checkpoints(tmp_path).read_meta() == meta
    assert (tmp_path / "checkpoint-5").is_dir()


def test_restore_on_another_mesh_is_bitwise_equal_and_lands_on_its_shards(tmp_path):
    state = place(make(), mesh(data=8), P("data"))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    other = place(make(seed=99), mesh(fsdp=2, tensor=4), P("fsdp", "tensor"))
    restored, _ = Checkpoints(tmp_path).restore(abstract(other))
    assert same(state, restored)
    assert restored.params["blocks"]["q"].sharding == other.params["blocks"]["q"].sharding
    assert restored.params["blocks"]["q"].addressable_shards[0].data.shape == (8, 2)


def test_plain_orbax_opens_a_step_without_our_code(tmp_path):
    fill(tmp_path, [3])
    with ocp.StandardCheckpointer() as plain:
        params = plain.restore(tmp_path / "checkpoint-3" / "params")
        opt = plain.restore(tmp_path / "checkpoint-3" / "opt")
    assert np.array_equal(params["blocks"]["q"], make(3, seed=3).params["blocks"]["q"])
    assert opt["1"]["0"]["mu"]["bias"].shape == (8,)
    assert json.loads((tmp_path / "checkpoint-3" / "meta" / "metadata").read_text()) == {"loader": {"position": 3}}


def test_weights_alone_are_read_without_the_rest_and_cast(tmp_path):
    fill(tmp_path, [3])
    for part in ("opt", "frozen", "rest"):
        shutil.rmtree(tmp_path / "checkpoint-3" / part)
    wanted = make(3, seed=3).params
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), wanted)
    params = Checkpoints(tmp_path).restore_params(shapes)
    assert same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), wanted))
    assert params["blocks"]["k"] is None


def test_a_path_inside_an_item_is_restored_alone(tmp_path):
    fill(tmp_path, [3])
    state = make(3, seed=3)
    mu = Checkpoints(tmp_path).restore_params(abstract(state.params), item="opt/1/0/mu")
    assert same(mu, state.opt[1][0].mu)


def test_the_saved_values_are_those_at_the_call_although_the_buffers_are_donated_next(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((512, 1024))
    shapes = abstract({"params": {"x": x}})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"params": {"x": x}}, {})
        for _ in range(20):
            x = step(x)
        restored, _ = checkpoints.restore(shapes)
    assert not np.any(restored["params"]["x"])


def test_host_memory_does_not_grow_with_the_number_of_saves(tmp_path):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    state = {"params": {"x": jax.random.normal(jax.random.key(0), (2048, 1024))}}  # 8 MiB
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in range(40):
            checkpoints.save(step, state, {})
            if step == 19:  # allocators and caches have reached their size
                checkpoints.wait()
                before = resident()
        checkpoints.wait()
        assert resident() - before < 80 << 20  # 20 leaked copies would be 160 MiB


def test_the_last_ones_and_the_best_one_are_kept(tmp_path):
    state = make()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan")), (5, 2.5), (6, None)]:
            checkpoints.save(step, state, {}, metrics=None if loss is None else {"valid/score": loss})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6]
        assert (checkpoints.best(), checkpoints.latest()) == (2, 6)


def test_the_same_step_is_written_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(4, make(4), {})
        assert not checkpoints.save(4, make(4), {})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(abstract(make()))
        assert not checkpoints.save(4, make(4), {})


def test_a_new_run_never_writes_among_the_checkpoints_of_another(tmp_path):
    fill(tmp_path, [10, 20])
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"already has checkpoint-10.*another folder"),
    ):
        checkpoints.save(5, make(), {})
    assert Checkpoints(tmp_path).steps() == [10, 20]


def test_going_back_to_an_older_step_sets_the_newer_ones_aside(tmp_path, capsys):
    fill(tmp_path, [10, 20, 30])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(abstract(make()), step=10)
        checkpoints.save(15, make(15), {})
        checkpoints.wait()
        assert checkpoints.steps() == [10, 15]
    assert "checkpoint-20 is set aside as checkpoint-20.aside: the run went back to step 10" in capsys.readouterr().err


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGE = {"flip": flip, "truncate": lambda p: os.truncate(p, p.stat().st_size // 2), "delete": Path.unlink}


@pytest.mark.parametrize("kind", DAMAGE)
def test_any_damaged_file_of_the_newest_step_is_survived(tmp_path, kind, capsys):
    def small(step):
        return {"params": {"w": jnp.full((16, 8), step)}, "step": jnp.int32(step)}

    with Checkpoints(tmp_path) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, small(step), {"position": step})
    newest = tmp_path / "checkpoint-20"
    files = [p for p in newest.rglob("*") if p.is_file()]
    assert len(files) > 15
    survived = set()
    for file in files:
        bytes_ = file.read_bytes()
        DAMAGE[kind](file)
        checkpoints = Checkpoints(tmp_path)
        state, meta = checkpoints.restore(abstract(small(0)))
        assert checkpoints.step == meta["position"] and same(state, small(meta["position"])), file
        said = capsys.readouterr().err
        if meta["position"] == 10:
            survived.add(file)
            assert f"WARNING: checkpoint-20 is damaged: {file.relative_to(newest)}" in said
            assert "checkpoint-10 is used instead" in said
            assert kind != "truncate" or "bytes instead of" in said or file.name == "manifest.json"
            with pytest.raises(ValueError, match=r"^[^\n]*checkpoint-20 is damaged: [^\n]*$"):
                checkpoints.restore(abstract(small(0)), step=20)
        file.write_bytes(bytes_)
    # Orbax's own bookkeeping isn't needed to read a step, and without the manifest nothing else is wrong.
    harmless = {p for p in files if p.name in ("_CHECKPOINT_METADATA", "commit_success.txt")}
    harmless |= {newest / "manifest.json"} if kind == "delete" else set()
    assert set(files) - survived == harmless


# Orbax reads the arrays of a part together and drops the failures after the first.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_step_without_manifest_is_used_and_said_and_passed_over_if_it_cannot_be_read(tmp_path, capsys):
    fill(tmp_path)
    (tmp_path / "checkpoint-20" / "manifest.json").unlink()
    assert Checkpoints(tmp_path).restore(abstract(make()))[1] == {"loader": {"position": 20}}
    assert "checkpoint-20 has no manifest.json: it is used without a check of its files" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "checkpoint-20" / "opt" / "d")
    assert Checkpoints(tmp_path).restore(abstract(make()))[1] == {"loader": {"position": 10}}
    assert "WARNING: checkpoint-20 is damaged: it has no manifest.json and can't be read" in capsys.readouterr().err


def test_nothing_sound_left_is_one_line(tmp_path):
    fill(tmp_path)
    for step in (10, 20):
        flip(tmp_path / f"checkpoint-{step}" / "meta" / "metadata")
    with pytest.raises(ValueError, match=r"no checkpoint that is sound \(checkpoint-20: meta/metadata") as error:
        Checkpoints(tmp_path).restore(abstract(make()))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="has no checkpoint"):
        Checkpoints(tmp_path / "nowhere").restore(abstract(make()))
    with pytest.raises(ValueError, match=r"no checkpoint at step 15 \(there: 10, 20\)"):
        Checkpoints(tmp_path).restore(abstract(make()), step=15)


def test_a_run_that_fell_back_can_save_the_damaged_step_again(tmp_path, capsys):
    fill(tmp_path)
    flip(tmp_path / "checkpoint-20" / "meta" / "metadata")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(abstract(make()))
        checkpoints.save(20, make(20, seed=5), {"again": True})
        assert checkpoints.restore(abstract(make()))[1] == {"again": True}
    assert (
        "checkpoint-20 is set aside as checkpoint-20.aside: meta/metadata has a wrong checksum"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.replace(params=s.params | {"bias": jnp.zeros(9)}), r"params: bias has shape \(8,\) but .* \(9,\)"),
        (lambda s: s.replace(params=s.params | {"bias": jnp.zeros(8, jnp.bfloat16)}), "bias has dtype float32 but"),
        (
            lambda s: s.replace(params=s.params | {"gate": jnp.zeros(8)}),
            "params lacks gate: the model's config differs",
        ),
        (lambda s: s.replace(params={"blocks": s.params["blocks"]}), "params has bias besides"),
        (lambda s: s.replace(opt=optax.sgd(0.1).init(s.params)), r"holds the parts .*'opt'.* but the run needs"),
    ],
)
def test_another_model_is_refused_and_never_takes_an_older_step(tmp_path, change, message, capsys):
    fill(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        Checkpoints(tmp_path).restore(abstract(change(make())))
    assert "\n" not in str(error.value)
    assert not capsys.readouterr().err


def test_meta_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="checkpoint meta is not JSON"):
        checkpoints.save(1, make(), {"path": Path("x")})
    assert not list(tmp_path.iterdir())


CHILD = """
import os, resource, signal, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp
from jaxlm.formats.checkpoint import Checkpoints, abstract
mode, folder = sys.argv[1:]
if mode == "denied" and os.getuid() == 0:
    os.setuid(65534)
def state(step):  # random bits don't compress: 8 MiB
    bits = jax.random.bits(jax.random.key(step), (2 << 20,))
    return {"params": {"x": bits}, "opt": {"m": bits}}
checkpoints = Checkpoints(folder)
try:
    if mode != "denied":
        checkpoints.save(1, state(1) if mode != "full" else {"params": {"x": jnp.ones(8)}}, {}, wait=True)
    if mode == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    checkpoints.save(2, state(2), {})
    if mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.save(3, state(3), {})
    print("NO ERROR")
except ValueError as error:
    print("ERROR", error)
    print("LEFT", *sorted(os.listdir(folder)))
"""


def child(mode, folder):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, mode, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_write_that_fails_is_one_line_at_the_next_call_and_costs_only_itself(tmp_path):
    code, out, err = child("limit", tmp_path / "run")
    assert code == 0 and "NO ERROR" not in out and "Traceback" not in err
    message = next(line for line in out.splitlines() if line.startswith("ERROR"))
    assert "checkpoint at step 2 was not saved to" in message and "ulimit -f" in message
    assert "earlier ones are intact, newest: 1" in message
    assert "LEFT checkpoint-1\n" in out  # the half-written files are gone
    assert Checkpoints(tmp_path / "run").damage(1) is None


def test_a_full_disk_is_one_line_and_costs_only_itself(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small tmpfs here")
    try:
        code, out, _ = child("full", tmp_path / "run")
        assert code == 0
        assert "ERROR checkpoint at step 2 was not saved to" in out and "the disk is full: free some space" in out
        assert "LEFT checkpoint-1\n" in out
        assert Checkpoints(tmp_path / "run").damage(1) is None
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_no_permission_is_one_line():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        code, out, err = child("denied", folder)
        assert code == 0, err
        assert (
            "ERROR checkpoint at step 2 was not saved to" in out
            and "permission denied: make the folder writable" in out
        )


def test_a_process_killed_while_saving_leaves_the_step_before(tmp_path):
    code, *_ = child("kill", tmp_path)
    assert code == -signal.SIGKILL
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() in ([1], [1, 2])
    assert all(checkpoints.damage(step) is None for step in checkpoints.steps())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), {"x": jnp.zeros(2 << 20, jnp.uint32)})
    checkpoints.restore_params(shapes)
    with checkpoints:
        checkpoints.step = checkpoints.latest()
        checkpoints.save(9, {"params": {"x": jnp.ones(3)}}, {})
    assert not [p for p in tmp_path.iterdir() if "tmp" in p.name]  # what the killed one left has been swept


WORKER = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize("127.0.0.1:" + port, 2, rank)
from jaxlm.formats.checkpoint import Checkpoints, abstract
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
def put(x, spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])
def state(step):
    whole = np.arange(64, dtype=np.float32).reshape(16, 4) + step
    return {"params": {"w": put(whole, P("fsdp")), "b": put(whole[0], P())}, "step": put(np.int32(step), P())}
with Checkpoints(folder, keep=2) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"step": step}, metrics={"valid/score": float(step)})
    checkpoints.wait()
    if rank == 0:
        os.truncate(folder + "/checkpoint-3/meta/metadata", 1)
    restored, meta = checkpoints.restore(abstract(state(0)))
    shard = restored["params"]["w"].addressable_shards[0]
    assert np.array_equal(shard.data, np.asarray(state(2)["params"]["w"].addressable_shards[0].data))
print("DONE", rank, checkpoints.steps(), meta)
"""


@pytest.mark.multiprocess
def test_two_processes_save_together_and_one_process_restores(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), port, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        results = [worker.communicate(timeout=100) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, (out, err) in enumerate(results):
        assert f"DONE {rank} [1, 2, 3] {{'step': 2}}" in out, err
    assert "checkpoint-3 is damaged: meta/metadata" in results[0][1]
    wanted = {"params": {"w": jnp.zeros((16, 4)), "b": jnp.zeros(4)}, "step": jnp.int32(0)}
    restored, _ = Checkpoints(tmp_path).restore(abstract(place(wanted, mesh(tensor=8), P("tensor"))), step=2)
    assert np.array_equal(restored["params"]["w"], np.arange(64).reshape(16, 4) + 2)


def test_cadence_and_bad_options():
    checkpoints = Checkpoints("unused", every=5)
    assert [step for step in range(1, 12) if checkpoints.due(step)] == [5, 10]
    with pytest.raises(ValueError, match="checkpoint keep = 0"):
        Checkpoints("unused", keep=0)
