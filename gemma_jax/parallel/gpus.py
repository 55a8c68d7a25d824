"""GPUs that need not be there, for JAX's CUDA plugin to compile for: needs neither a GPU nor CUDA, but `ptxas`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """What differs between GPUs of one generation."""

    name: str  # as CUDA has it
    memory_bytes: int
    memory_bandwidth: int  # bytes a second


# NVIDIA's data sheets; the memory of the H100 as CUDA reports it
MODELS = {
    "h100": Model("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
    "h200": Model("NVIDIA H200", 141 * 10**9, 4_800_000_000_000),
}


def target_config(kind: str) -> str:
    """A Hopper of the SXM form as XLA's GpuTargetConfigProto (NVIDIA's data sheet and CUDA's device properties)."""
    model = MODELS[kind]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {model.memory_bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {model.memory_bytes}
  shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{model.name}"
"""
