"""The process group's store, as one call of shardwise uses it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from shardwise.errors import RankError

_PAUSE_SECONDS = 0.01


class CallStore:
    """The default process group's store; a lost connection is our error and says what it means.

    Without a process group this process is the only rank, and the store is its own.

    Args:
        call: Name of the call, for messages.
    """

    def __init__(self, *, call: str) -> None:
        self._call = call
        self._store: Any = (
            dist.distributed_c10d._get_default_store()
            if dist.is_initialized()
            else torch._C._distributed_c10d.HashStore()
        )

    @property
    def host_address(self) -> tuple[str, int] | None:
        """Name and port under which the store is reached; None where it is not reached over the network."""
        store = self._tcp_store
        return (store.host, store.port) if store is not None else None

    def set(self, key: str, value: str) -> None:
        """Set a key."""
        with self._connected():
            self._store.set(key, value)

    def set_once(self, key: str, value: str) -> None:
        """Set a key unless it has a value."""
        with self._connected():
            self._store.compare_set(key, "", value)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and return its new value."""
        with self._connected():
            return int(self._store.add(key, amount))

    def has(self, keys: Sequence[str]) -> bool:
        """Return whether all keys have a value."""
        with self._connected():
            return bool(self._store.check(list(keys)))

    def get(self, keys: Sequence[str]) -> list[str]:
        """Return the values of keys that are there."""
        with self._connected():
            return [value.decode() for value in self._store.multi_get(list(keys))]

    def delete_all(self, wanted: Callable[[str], bool]) -> None:
        """Delete every key that a function says is wanted; nothing where torch cannot list keys of this store."""
        list_keys = getattr(self._store, "list_keys", None)
        if list_keys is None:
            return
        with self._connected():
            for key in list_keys():
                if wanted(key):
                    self._store.delete_key(key)

    def wait_if_host(self, counter: str, *, count: int, timeout_seconds: float) -> None:
        """On the process that hosts the store, wait until a counter is reached, so that the others can still read.

        Args:
            counter: Counts the ranks that have read what they need.
            count: Value to wait for.
            timeout_seconds: Longest wait; a rank may never come.
        """
        if not self._is_host():
            return
        deadline = time.monotonic() + timeout_seconds
        while self.add(counter, 0) < count and time.monotonic() < deadline:
            time.sleep(_PAUSE_SECONDS)

    def _is_host(self) -> bool:
        # A launcher's agent hosts the store where this variable is set; otherwise rank 0 does.
        if (
            not dist.is_initialized()
            or dist.get_rank() != 0
            or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        ):
            return False
        return self._tcp_store is not None

    @property
    def _tcp_store(self) -> Any:
        store = self._store
        while hasattr(store, "underlying_store"):
            store = store.underlying_store
        return store if isinstance(store, torch._C._distributed_c10d.TCPStore) else None

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            raise RankError(
                f"{self._call}: rank {dist.get_rank()} lost the process group's store ({error}). The process that hosts it, "
                "rank 0 unless a launcher does, has ended: its log has the first error."
            ) from error
