"""Accelerators are described by numbers: what a chip computes, stores and moves, and how its networks are built.

Sources. NVIDIA: the data sheet of each card and of the DGX or HGX system it comes in, dense, without the factor 2 of
sparsity; `xla` is how XLA describes the card in `xla/backends/gpu/target_config/specs`. TPU: cloud.google.com/tpu/docs,
system architecture of each version; ICI per link and network per chip as "How to Scale Your Model" (Austin et al. 2025)
states them, which are the documents' aggregates divided by links and directions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Dense bfloat16 FLOP/s of one device, as JAX names and counts devices (a TPU v2, v3 or 7x chip is two devices, a v4 or
# v5p chip is one). GeForce with float32 accumulation.
PEAK_FLOPS = {
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
}


def peak_flops(kind: str) -> float | None:
    """Returns the dense bfloat16 FLOP/s of a device kind; None if it isn't known (every CPU): then there is no MFU."""
    return PEAK_FLOPS.get(kind)


@dataclass(frozen=True)
class Chip:
    """A chip is one device as JAX counts it. Bandwidths are bytes a second, those of networks one way."""

    name: str
    kind: str
    """JAX's name of it: `device.device_kind`."""
    platform: str
    hbm: float
    """Bytes of memory that a program can use."""
    hbm_bandwidth: float
    host: int
    """Devices of one host."""
    link: float
    """Bandwidth of one ICI link (TPU), or of a device into its NVLink domain (GPU)."""
    network: float
    """Bandwidth that one device has out of its slice (TPU: data centre network) or its node (GPU: one NIC each)."""
    to_host: float = 0.0
    """Bandwidth between a device and its host's memory: PCIe × 16, of which the data sheets give the sum of both ways
    (GPU); 0: not known."""
    dims: int = 0
    """Dimensions of a TPU's torus, each with two links a chip; 0: every device of a host reaches every other."""
    low: float | None = None
    """Operations a second in eight bits: int8 (TPU, but fp8 of a TPU7x), or fp8, mxfp8 and int8 (GPU); None: no faster
    than bfloat16."""
    cores: int = 1
    """Number that each TPU chip counts for in a slice's short name, such as v5p-128."""
    devices: int = 1
    """Devices of one TPU chip."""
    efficiency: float = 0.6
    """Share of the peak that large bfloat16 products reach in a training step.

    v4, v5e, v5p, v6e and H100 have the median over published runs in `benchmarks/plan_accuracy.py`, and H200 that of
    H100; the others have no such run: 0.6."""
    xla: Mapping[str, float] = field(default_factory=dict)
    """Values that `XLA_TARGET` needs (GPU)."""

    @property
    def flops(self) -> float:
        """Returns the dense bfloat16 FLOP/s, or 0 if they aren't known."""
        return PEAK_FLOPS.get(self.kind, 0.0)


GIB = 1 << 30
HOPPER = dict(cores=132, fpus=128, smem=233472, optin=232448, threads=2048, l2=52428800, clock=1.98, major=9, minor=0)
AMPERE = dict(cores=108, fpus=64, smem=167936, optin=166912, threads=2048, l2=41943040, clock=1.41, major=8, minor=0)
BLACKWELL = dict(
    cores=148, fpus=128, smem=233472, optin=232448, threads=2048, l2=132644864, clock=1.965, major=10, minor=0
)
ADA = dict(cores=128, fpus=128, smem=102400, optin=101376, threads=1536, l2=75497472, clock=2.52, major=8, minor=9)

# TPU v4: 32 GiB, 1,228 GB/s; v5e: 16 GB, 819 GB/s, 1,600 Gb/s of ICI; v5p: 95 GB, 2,765 GB/s, 4,800 Gb/s; v6e: 32 GB,
# 1,640 GB/s, 3,200 Gb/s; 7x (of a chip, which is two devices): 192 GiB, 7,380 GB/s, 9,600 Gb/s. Memory: what the
# compiler gives a program, a little less than the chip's.
CHIPS = {
    c.name: c
    for c in (
        Chip("v4", "TPU v4", "tpu", 30.75 * GIB, 1.228e12, 4, 45e9, 6.25e9, dims=3, cores=2, efficiency=0.78),
        Chip("v5e", "TPU v5 lite", "tpu", 15.75 * GIB, 8.19e11, 8, 45e9, 3.125e9, dims=2, low=394e12, efficiency=0.87),
        Chip(
            "v5p",
            "TPU v5",
            "tpu",
            95.74 * GIB,
            2.765e12,
            4,
            90e9,
            6.25e9,
            dims=3,
            low=918e12,
            cores=2,
            efficiency=0.745,
        ),
        Chip("v6e", "TPU v6 lite", "tpu", 31.25 * GIB, 1.64e12, 8, 90e9, 12.5e9, dims=2, low=1836e12, efficiency=0.61),
        Chip("tpu7x", "TPU7x", "tpu", 94.75 * GIB, 3.69e12, 8, 90e9, 6.25e9, dims=3, low=2307e12, cores=2, devices=2),
        Chip("a100", "NVIDIA A100-SXM4-80GB", "gpu", 85100068864, 2.039e12, 8, 300e9, 25e9, 32e9, xla=AMPERE),
        Chip(
            "h100",
            "NVIDIA H100 80GB HBM3",
            "gpu",
            84942979072,
            3.352e12,
            8,
            450e9,
            50e9,
            64e9,
            low=1978.9e12,
            efficiency=0.57,
            xla=HOPPER,
        ),
        Chip(
            "h200",
            "NVIDIA H200",
            "gpu",
            151397597184,
            4.8e12,
            8,
            450e9,
            50e9,
            64e9,
            low=1978.9e12,
            efficiency=0.57,
            xla=HOPPER,
        ),
        Chip("b200", "NVIDIA B200", "gpu", 191514411008, 7.672e12, 8, 900e9, 50e9, 64e9, low=4500e12, xla=BLACKWELL),
        # No NVLink: through PCIe 4.0 × 16.
        Chip(
            "rtx4090",
            "NVIDIA GeForce RTX 4090",
            "gpu",
            24000000000,
            1.008e12,
            8,
            25e9,
            3.1e9,
            25e9,
            low=330.3e12,
            xla=ADA,
        ),
    )
}
INT8_TPUS = ("v5e", "v5p", "v6e")
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6litepod": "v6e", "v7x": "tpu7x", "7x": "tpu7x", "4090": "rtx4090"}

XLA_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152  shared_memory_per_core: {smem}
  threads_per_core_limit: {threads}  core_count: {cores}  fpus_per_core: {fpus}  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535  block_dim_limit_z: 65535  memory_bandwidth: {bandwidth}  l2_cache_size: {l2}
  clock_rate_ghz: {clock}  device_memory_size: {memory}  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536  runtime_version: "13.0.0"  dnn_version: "9.12.0"
}}
platform_name: "CUDA"  dnn_version_info {{ major: 9 minor: 8 patch: 0 }}  device_description_str: "{kind}"
"""


def xla_target(c: Chip) -> str:
    """Returns a GPU's description for XLA's compiler: `GpuTargetConfigProto` as text."""
    return XLA_TARGET.format(**c.xla, kind=c.kind, memory=int(c.hbm), bandwidth=int(c.hbm_bandwidth))


def compute_capability(device: Any) -> tuple[int, int] | None:
    """Returns the compute capability of an NVIDIA GPU, which may be only described: (9, 0) of Hopper; None of others,
    and where it isn't known."""
    chip = of_kind(device.device_kind)
    if chip is not None:
        return (int(chip.xla["major"]), int(chip.xla["minor"])) if chip.xla else None
    if device.platform != "gpu":
        return None
    major, _, minor = str(device.compute_capability).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def multiplies_fp8(device: Any) -> bool:
    """Returns whether a device multiplies matrices of fp8 numbers (e4m3fn and e5m2): GPUs from Ada and Hopper on, and
    the TPU of generation 7."""
    capability = compute_capability(device)
    return device.device_kind == "TPU7x" if capability is None else capability >= (8, 9)


def multiplies_mxfp8(device: Any) -> bool:
    """Returns whether a device multiplies matrices of e4m3 numbers of which 32 share a power of two: GPUs from
    Blackwell on."""
    return (compute_capability(device) or (0, 0)) >= (10, 0)


def multiplies_int8(device: Any) -> bool:
    """Returns whether a device multiplies matrices of int8 numbers more quickly than of bfloat16: GPUs from Turing on,
    and the TPUs for which Google states a rate of its own."""
    capability = compute_capability(device)
    chip = of_kind(device.device_kind)
    return chip is not None and chip.name in INT8_TPUS if capability is None else capability >= (7, 5)


def of_kind(kind: str) -> Chip | None:
    """Returns the chip of a device kind, as JAX calls it; None if it isn't in the table."""
    canonical = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}.get(kind, kind)
    return next((c for c in CHIPS.values() if c.kind == canonical), None)
