"""What one way to bring a model up costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Memory and bytes of a load. Host memory is memory that has no file behind it, above what imports and the empty model take.

    Args:
        name: A route, or what people call a plain way.
        host_peak_bytes: Of the rank with the most.
        node_host_peak_bytes: Of the node with the most: the sum of its ranks' peaks.
        device_peak_bytes: Of the rank with the most; 0 on CPU ranks.
        storage_bytes: Read from storage in the job; of plain ways once per node that reads, as what ranks of a node read again is in its
            page cache.
        node_storage_bytes: The most that one node reads.
        rank_storage_bytes: The most that one rank asks for.
        network_bytes: Received by all ranks.
        node_network_bytes: The most that the ranks of one node receive.
        rank_network_bytes: The most that one rank receives, or sends.
    """

    name: str
    host_peak_bytes: int
    node_host_peak_bytes: int
    device_peak_bytes: int
    storage_bytes: int
    node_storage_bytes: int
    rank_storage_bytes: int
    network_bytes: int
    node_network_bytes: int
    rank_network_bytes: int
