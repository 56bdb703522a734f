"""Which dim of a stack of matrices is sharded."""

from __future__ import annotations

import pytest

from shardwise.strategies.placement import thrifty_dim


@pytest.mark.parametrize(
    ("shape", "shard_ranks", "dim"),
    [
        ((4, 2048, 768), 8, 1),  # more ranks than experts
        ((4, 2047, 768), 8, 2),  # FSDP2 takes no dim but 0 that the ranks do not divide
        ((4, 2047, 767), 8, 0),
        ((8, 2048, 768), 8, 0),
        ((60, 2048, 768), 32, 0),  # 64 padded rows for 60
        ((65, 2048, 768), 64, 1),  # 128 padded rows for 65
        ((128, 2048, 768), 96, 2),  # 192 for 128
        ((5, 4, 8), 4, 1),  # 8 for 5
        ((13, 4, 8), 4, 0),  # 16 for 13 are less than 1.25
        ((16, 4, 8), 13, 0),  # 26 for 16, and 13 ranks divide nothing
        ((3, 8, 3, 3), 4, 1),  # a convolution
        ((3, 4096), 4, 0),  # a matrix
        ((3,), 4, 0),
        ((), 4, 0),
        ((0, 4, 4), 4, 0),
        ((3, 4, 4), 1, 0),
    ],
    ids=str,
)
def test_the_dim(shape: tuple[int, ...], shard_ranks: int, dim: int) -> None:
    assert thrifty_dim(shape, shard_ranks) == dim
