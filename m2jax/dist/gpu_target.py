# SPDX-License-Identifier: Apache-2.0
"""What XLA's GPU compiler must know of a GPU it cannot ask: a ``GpuTargetConfigProto`` as text.

Figures: NVIDIA's H100 white paper (SXM5) and the CUDA programming guide's table for compute
capability 9.0. An H200 is an H100 with more and faster memory.
"""

from __future__ import annotations

_HOPPER = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 48 * 1024,
    "shared_memory_per_core": 228 * 1024,
    "shared_memory_per_block_optin": 227 * 1024,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "l2_cache_size": 50 * 2**20,
    "clock_rate_ghz": 1.98,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}
_MEMORY = {  # bytes, bytes/s
    "h100": (80 * 10**9, 3_350 * 10**9),
    "h200": (141 * 10**9, 4_800 * 10**9),
}


def text(kind: str) -> str:
    """The description of an ``h100`` or ``h200``."""
    size, rate = _MEMORY[kind]
    facts = {**_HOPPER, "device_memory_size": size, "memory_bandwidth": rate}
    lines = [f"  {key}: {value}" for key, value in facts.items()]
    return "\n".join(
        [
            "gpu_device_info {",
            "  cuda_compute_capability { major: 9 minor: 0 }",
            *lines,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 patch: 0 }",
            'device_description_str: "NVIDIA ' + kind.upper() + ' SXM"',
            "",
        ]
    )
