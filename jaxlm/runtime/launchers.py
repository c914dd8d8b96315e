"""Reads from the environment which of how many processes this is and where process 0 listens, as launchers say it.

Nothing is set. If a launcher started one process, or there is no launcher, `count` is 1: such a process waits for
nobody, whatever else its allocation has room for.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

Env = Mapping[str, str]
PORTS = range(61440, 65536)  # above those that Linux gives to clients; a job's own number chooses one


@dataclass(frozen=True)
class Place:
    """A place is the position of this process among the processes of its run."""

    launcher: str
    """The launcher that says so, in words; empty: there is none."""
    count: int = 1
    index: int = 0
    address: str = ""
    """HOST:PORT of process 0."""
    devices: tuple[int, ...] | None = None
    """The devices of this host that this process may use; None: all that it sees."""


def find(env: Env, seconds: float = 300.0) -> Place:
    """Returns the place that the first launcher in `env` gives this process.

    `JAX_COORDINATOR_ADDRESS` overrides what a launcher says of process 0. seconds: how long a TPU's name for process 0
    may take to resolve. Raises ValueError if the environment describes the processes incompletely or wrongly.
    """
    if env.get("JAXLM_DISTRIBUTED") == "0":
        return Place("JAXLM_DISTRIBUTED=0: alone")
    place = next(filter(None, (read(env) for read in (_by_hand, lambda e: _tpu(e, seconds), *LAUNCHERS))), Place(""))
    if place.count == 1:
        return place
    if not 0 <= place.index < place.count:
        raise ValueError(f"processes: {place.launcher}: number {place.index} of {place.count} is not one of them")
    place = replace(place, address=env.get("JAX_COORDINATOR_ADDRESS") or place.address)
    if not place.address:
        raise ValueError(
            f"processes: {place.launcher} says not where process 0 is: set JAX_COORDINATOR_ADDRESS=HOST:PORT"
        )
    host, _, port = place.address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS: {place.address!r} is not HOST:PORT")
    return place


def _by_hand(env: Env) -> Place | None:
    """Reads `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or a Kubernetes Job's index."""
    if "JAX_NUM_PROCESSES" not in env:
        if "JAX_COORDINATOR_ADDRESS" in env and not any(read(env) for read in LAUNCHERS):
            raise ValueError("JAX_COORDINATOR_ADDRESS is set: set JAX_NUM_PROCESSES and JAX_PROCESS_ID too")
        if "JOB_COMPLETION_INDEX" in env:
            return Place("an Indexed Job of Kubernetes without JAX_NUM_PROCESSES: each index runs alone")
        return None
    launcher = env.get("JAXLM_LAUNCHER") or "JAX_NUM_PROCESSES"
    index = env.get("JAX_PROCESS_ID")
    if index is None and "JOB_COMPLETION_INDEX" in env:
        launcher, index = "an Indexed Job of Kubernetes", env["JOB_COMPLETION_INDEX"]
    try:
        return Place(launcher, int(env["JAX_NUM_PROCESSES"]), int(index or ""))
    except ValueError:
        raise ValueError(
            f"JAX_NUM_PROCESSES {env['JAX_NUM_PROCESSES']!r} and JAX_PROCESS_ID {index!r}: set both to whole numbers"
        ) from None


def _tpu(env: Env, seconds: float) -> Place | None:
    """Asks JAX for the hosts of a TPU slice, or of several (`MEGASCALE_…`), on GKE and on Compute Engine."""
    if env.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("tpu", ""):
        return None
    from jax._src import cloud_tpu_init, clusters

    if not cloud_tpu_init.running_in_cloud_tpu_vm:
        return None
    for cluster, name in ((clusters.GkeTpuCluster, "TPU on GKE"), (clusters.GceTpuCluster, "TPU VM")):
        if not cluster.is_env_present():
            continue
        count, slices = cluster.get_process_count(), cluster._get_num_slices()
        if count == 1:
            return Place(f"{name}, one host")
        address = env.get("JAX_COORDINATOR_ADDRESS") or cluster.get_coordinator_address(
            timeout_secs=int(seconds), override_coordinator_port=env.get("JAX_COORDINATOR_PORT")
        )
        launcher = f"{name}, {slices} slices" if slices > 1 else name
        return Place(launcher, count, cluster.get_process_id(), address)
    return None


def _slurm(env: Env) -> Place | None:
    """Reads the task of a job step. A batch script itself, or a shell in an allocation, is no task and runs alone."""
    if "SLURM_JOB_ID" not in env:
        return None
    if not {"SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= env.keys():
        return Place("SLURM, but not started by srun: alone")
    count = int(env["SLURM_STEP_NUM_TASKS"])
    if count == 1:
        return Place("SLURM, one task")
    from jax._src import clusters

    step = env.get("SLURM_STEP_ID", "0")
    port = env.get("JAX_COORDINATOR_PORT") or _port(f"slurm {env['SLURM_JOB_ID']} {step}")
    address = clusters.SlurmCluster.get_coordinator_address(0, port)  # it reads SLURM_STEP_NODELIST, `node[07,09-12]`
    tasks_here = _tasks_on_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""), int(env.get("SLURM_NODEID", 0)))
    return Place(
        "SLURM", count, int(env["SLURM_PROCID"]), address, _own_devices(env, env.get("SLURM_LOCALID"), tasks_here)
    )


def _tasks_on_node(tasks: str, node: int) -> int:
    """Returns the number of tasks on a node; SLURM's `2(x3),1` means 2 on each of three nodes, 1 on the fourth."""
    counts: list[int] = []
    for part in filter(None, tasks.split(",")):
        number, _, times = part.partition("(x")
        counts += [int(number)] * int(times.rstrip(")") or 1)
    return counts[node] if node < len(counts) else 1


def _open_mpi(env: Env) -> Place | None:
    """Reads the variables of Open MPI, whose version 5 doesn't say where process 0 is if there are several hosts."""
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    count, here = int(env["OMPI_COMM_WORLD_SIZE"]), int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", 0))
    if count == 1:
        return Place("Open MPI, one process")
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_orte_hnp_uri") or env.get("OMPI_MCA_ess_base_jobid", "")
    port = env.get("JAX_COORDINATOR_PORT") or _port(f"mpi {job}")
    address = ""
    if here == count:
        address = f"127.0.0.1:{port}"
    elif "OMPI_MCA_orte_hnp_uri" in env:  # up to Open MPI 4: mpirun's host, which process 0 shares by default
        from jax._src import clusters

        address = clusters.OmpiCluster.get_coordinator_address(0, port)
    devices = _own_devices(env, env.get("OMPI_COMM_WORLD_LOCAL_RANK"), here)
    return Place("Open MPI", count, int(env["OMPI_COMM_WORLD_RANK"]), address, devices)


def _pmi(env: Env) -> Place | None:
    """Reads the variables of the process management interface: MPICH, Intel MPI and Cray's PALS set them."""
    if not {"PMI_RANK", "PMI_SIZE"} <= env.keys():
        return None
    count = int(env["PMI_SIZE"])
    if count == 1:
        return Place("PMI, one process")
    rank = env.get("MPI_LOCALRANKID") or env.get("PALS_LOCAL_RANKID")
    here = int(env.get("MPI_LOCALNRANKS") or env.get("PALS_LOCAL_SIZE") or 0)
    job = (env.get("PMI_ID") and env.get("HYDI_CONTROL_FD")) or env.get("PMI_JOBID") or env.get("PALS_APID", "")
    port = env.get("JAX_COORDINATOR_PORT") or _port(f"pmi {job}")
    address = f"127.0.0.1:{port}" if here == count else ""
    return Place("PMI", count, int(env["PMI_RANK"]), address, _own_devices(env, rank, here))


LAUNCHERS: tuple[Callable[[Env], Place | None], ...] = (_slurm, _open_mpi, _pmi)


def _port(job: str) -> str:
    """Returns a port that is the same for all processes of a job, and likely another for another job."""
    return str(PORTS[zlib.crc32(job.encode()) % len(PORTS)])


def _own_devices(env: Env, rank: str | None, here: int) -> tuple[int, ...] | None:
    """Returns the device of a process that shares its host with `here` - 1 others; None: all that it sees.

    A launcher that has assigned the devices itself (`--gpus-per-task=1`) shows each process only its own.
    """
    visible = [d for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    if rank is None or here < 2 or len(visible) == 1 or "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    return (int(rank),)
