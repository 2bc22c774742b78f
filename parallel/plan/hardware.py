"""Accelerators and the links between them, as data sheets give them.

| | sheet | bfloat16, dense | memory | links in a node, both directions |
| --- | --- | --- | --- | --- |
| A100 | NVIDIA A100 80GB SXM | 312 TFLOP/s | 80 GB, 2.039 TB/s | NVLink 3, 600 GB/s |
| H100 | NVIDIA H100 SXM | 989 (1,979 sparse) | 80 GB, 3.35 TB/s | NVLink 4, 900 GB/s |
| H200 | NVIDIA H200 SXM | 989 (1,979 sparse) | 141 GB, 4.8 TB/s | NVLink 4, 900 GB/s |
| MI300X | AMD Instinct MI300X | 1,307 | 192 GB, 5.3 TB/s | Infinity Fabric, 7 x 128 GB/s |

One direction of the links counts here. Networks differ from cluster to cluster: those here are of
8-GPU nodes with one adapter a GPU, HDR InfiniBand (200 Gbit/s) with A100 and NDR (400 Gbit/s) with
the others. Latencies are on no data sheet. Networks and latencies are assumptions, to be edited.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

from rondo.errors import UserError


@dataclass(frozen=True)
class Hardware:
    """One GPU and its links; bandwidths in one direction, of one GPU."""

    name: str
    peak_flops: float
    """Dense bfloat16 FLOP/s."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    """Bytes/s."""
    node_bandwidth: float
    """Bytes/s to other GPUs of its node."""
    network_bandwidth: float
    """Bytes/s to other nodes."""
    node_size: int = 8
    """GPUs in a node."""
    node_latency: float = 5e-6
    """Seconds to start a collective in a node."""
    network_latency: float = 20e-6
    """Seconds to start one across nodes."""


_KNOWN = (
    Hardware("A100", 312e12, 80e9, 2.039e12, 300e9, 25e9),
    Hardware("H100", 989e12, 80e9, 3.35e12, 450e9, 50e9),
    Hardware("H200", 989e12, 141e9, 4.8e12, 450e9, 50e9),
    Hardware("MI300X", 1307e12, 192e9, 5.3e12, 448e9, 50e9),
)
HARDWARE = {hardware.name: hardware for hardware in _KNOWN}


def find_hardware(
    name: str,
    *,
    node_size: int | None = None,
    nvlink_gbs: float | None = None,
    network_gbs: float | None = None,
) -> Hardware:
    """Hardware by name (in any case), with a cluster's own figures; bandwidths in GB/s.

    Raises UserError, which names the nearest, for an unknown name or an impossible figure.
    """
    by_upper = {known.upper(): hardware for known, hardware in HARDWARE.items()}
    if name.upper() not in by_upper:
        near = difflib.get_close_matches(name.upper(), by_upper, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"hardware: unknown {name!r}{hint} (known: {', '.join(HARDWARE)})")
    given = {"node_size": node_size, "nvlink_gbs": nvlink_gbs, "network_gbs": network_gbs}
    for key, value in given.items():
        if value is not None and not 0 < value < 1e9:
            raise UserError(f"{key}: must be above 0 and below 1e9, got {value}")
    base = by_upper[name.upper()]
    return dataclasses.replace(
        base,
        node_size=node_size or base.node_size,
        node_bandwidth=nvlink_gbs * 1e9 if nvlink_gbs else base.node_bandwidth,
        network_bandwidth=network_gbs * 1e9 if network_gbs else base.network_bandwidth,
    )
