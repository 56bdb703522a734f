"""Where tensor bytes come from."""

from shardwise.checkpoint.source import Source
from shardwise.checkpoint.state_dict import StateDictSource
from shardwise.checkpoint.stored_tensor import StoredTensor

__all__ = ["Source", "StateDictSource", "StoredTensor"]
