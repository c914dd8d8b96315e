"""Which process this is, by the variables that each launcher leaves."""

import pytest

from jaxlm.runtime import launchers
from jaxlm.runtime.launchers import Place, find

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "node[07,09-11]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_PROCID": "5",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
       "PMIX_NAMESPACE": "job7"}  # fmt: skip


@pytest.fixture(autouse=True)
def slurm_is_read_from_a_table(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NODELIST", SLURM["SLURM_STEP_NODELIST"])  # JAX reads the real environment


def test_nothing_is_one_process():
    assert find({}) == Place("") and Place("").count == 1


def test_by_hand():
    env = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert find(env) == Place("JAX_NUM_PROCESSES", 4, 3, "a:1")
    assert find(env | {"JAXLM_LAUNCHER": "Ray"}).launcher == "Ray"
    assert find(env | SLURM).index == 3  # said by hand counts for more
    assert find(env | {"JAXLM_DISTRIBUTED": "0"}).count == 1
    assert find({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}).count == 1


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "set JAX_NUM_PROCESSES and JAX_PROCESS_ID too"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_PROCESS_ID None: set both"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES 'two'"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "set JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "a:1"}, "number 2 of 2"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "a"}, "'a' is not HOST:PORT"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "Open MPI says not where process 0 is"),
    ],
)
def test_half_a_description_is_refused(env, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        find(env)


def test_slurm_tasks():
    place = find(SLURM)
    assert (place.launcher, place.count, place.index, place.devices) == ("SLURM", 8, 5, (1,))
    host, _, port = place.address.partition(":")
    assert host == "node07" and int(port) in launchers.PORTS
    assert find(SLURM | {"SLURM_STEP_ID": "1"}).address != place.address  # two steps of a job may share a node
    assert find(SLURM | {"JAX_COORDINATOR_PORT": "7777"}).address == "node07:7777"


def test_slurm_gives_all_devices_to_a_node_s_only_task_and_leaves_those_it_has_dealt_out():
    one_a_node = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_LOCALID": "0", "SLURM_NODEID": "5"}
    assert find(one_a_node).devices is None
    assert find(SLURM | {"CUDA_VISIBLE_DEVICES": "1"}).devices is None
    assert find(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}).devices == (1,)
    assert find(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1(x4)", "SLURM_NODEID": "3"}).devices is None


def test_slurm_waits_for_nobody_where_srun_started_no_others():
    assert find(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) == Place("SLURM, one task")
    batch_script = {k: v for k, v in SLURM.items() if "STEP" not in k} | {"SLURM_PROCID": "0"}
    assert find(batch_script) == Place("SLURM, but not started by srun: alone")


def test_mpi_on_one_host_needs_no_address():
    place = find(MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    assert (place.launcher, place.count, place.index, place.devices) == ("Open MPI", 2, 1, (1,))
    assert place.address.startswith("127.0.0.1:")
    place = find(MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "JAX_COORDINATOR_ADDRESS": "a:1"})
    assert (place.address, place.devices) == ("a:1", None)
    pmi = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
    assert find(pmi).index == 1 and find(pmi).address.startswith("127.0.0.1:")


def test_kubernetes_indexed_jobs():
    env = {"JOB_COMPLETION_INDEX": "2", "JAX_NUM_PROCESSES": "4", "JAX_COORDINATOR_ADDRESS": "run-0.run:8476"}
    assert find(env) == Place("an Indexed Job of Kubernetes", 4, 2, "run-0.run:8476")
    assert find({"JOB_COMPLETION_INDEX": "2"}).count == 1  # as many runs as indices


def test_tpu_slices(monkeypatch):
    from jax._src import cloud_tpu_init
    from jax._src.clusters import cloud_tpu_cluster

    env = {"TPU_WORKER_HOSTNAMES": "localhost,b", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2",
           "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "localhost"}  # fmt: skip
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert find(env).count == 1  # no TPU here
    for module in (cloud_tpu_init, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    assert find(env) == Place("TPU on GKE, 2 slices", 4, 3, "localhost:8482")
    assert find(env | {"JAX_PLATFORMS": "cpu"}).count == 1
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert find(env) == Place("TPU on GKE, one host")
