"""Fakes and helpers for tests, ours and users': no cluster needed."""

from shardwise.testing.rank_pool import RankFailedError, RankPool

__all__ = ["RankFailedError", "RankPool"]
