"""Where tensor bytes come from."""

from shardwise.checkpoint.state_dict import StateDictSource

__all__ = ["StateDictSource"]
