"""Which options of jaxlm's presets do the compilers accept, for devices that aren't here?

    python benchmarks/flags.py gpu v6e:2x2

`pip install "jax[cuda13]" libtpu` brings the compilers. Each option is given alone to a program of one addition: this
tells that a name and a value parse, not that they pay. Exit status 1 if one is refused.
"""

import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import jax
from jax.experimental import topologies

from jaxlm.runtime import compiler_options

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535  block_dim_limit_z: 65535  memory_bandwidth: 3352320000000  l2_cache_size: 52428800
  clock_rate_ghz: 1.98  device_memory_size: 84942979072  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"  dnn_version_info { major: 9 minor: 8 patch: 0 }  device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main(targets: list[str]) -> int:
    refused = 0
    for target in targets or ["gpu"]:
        gpu = {"platform": "cuda", "target_config": H100, "topology": "1x1x1"}
        how = gpu if target == "gpu" else {"platform": "tpu"}
        described = topologies.get_topology_desc("one" if target == "gpu" else target, **how)
        device: jax.Device = described.devices[0]
        for name, preset in compiler_options.PRESETS.items():
            if preset.platform != ("gpu" if target == "gpu" else "tpu"):
                continue
            for option, value in preset.options.items():
                try:
                    compiler_options.check_accepted({option: value}, device)
                    answer = "accepted"
                except ValueError as error:
                    answer, refused = str(error), refused + 1
                shown = compiler_options.format_options({option: value})
                print(f"{device.device_kind:24} {name:24} {shown:72} {answer}", flush=True)
    return bool(refused)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
