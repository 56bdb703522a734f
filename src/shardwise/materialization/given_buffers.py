"""Which buffers a user's `buffers=` gives values of."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shardwise.materialization.buffers import Buffers


class GivenBuffers:
    """A user's values, and on record for which buffers there are any.

    Args:
        buffers: As the user passes them.
    """

    def __init__(self, buffers: Buffers) -> None:
        self.fqns: set[str] = set(buffers) if isinstance(buffers, Mapping) else set()
        self._function = buffers if callable(buffers) else None
        self.buffers: Buffers = self._asked if self._function is not None else buffers

    def _asked(self, fqn: str, tensor: torch.Tensor) -> torch.Tensor | None:
        value = self._function(fqn, tensor) if self._function is not None else None
        if value is not None:
            self.fqns.add(fqn)
        return value
