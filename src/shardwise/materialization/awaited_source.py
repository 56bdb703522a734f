"""A source whose reads are bounded: one that hangs is reported, with file and rank, while this rank listens to the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from shardwise.checkpoint import Readable, Run, Source
from shardwise.checkpoint import stitched as stitched_by_source
from shardwise.checkpoint.stored_tensor import StoredTensor
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.awaited_call import Doing, await_call, calling_threads, on_thread
from shardwise.materialization.reader_threads import ReaderThreads


class AwaitedSource:
    """What an exchange and a conversion need of a source.

    Args:
        source: Open.
        name: Of the source, for messages.
        threads: On which it is read.
        agreement: Of the call.
    """

    def __init__(self, source: Readable, *, name: str, threads: ReaderThreads, agreement: Agreement) -> None:
        self._source = source
        self._name = name
        self._threads = threads
        self._agreement = agreement

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """As the source has them."""
        return self._source.tensors

    def begin(self, file: str, offset: int, into: memoryview) -> Callable[[], None]:
        """Begin to read as `Source.read_into` does.

        Returns:
            Waits for the read, and raises as `await_call`.
        """
        future = self._threads.submit(self._source.read_into, file, offset, into)
        what = f"{self._name}, {file}: reading {len(into):,} bytes at byte {offset:,}"
        return lambda: await_call(future, self._agreement, Doing(what))

    def read_into(self, file: str, offset: int, into: memoryview) -> None:
        """Read as `Source.read_into` does.

        Raises:
            As `await_call`.
        """
        self.begin(file, offset, into)()


@contextmanager
def awaited(source: Readable, agreement: Agreement, *, name: str) -> Iterator[AwaitedSource]:
    """Bound the reads of a source in the body.

    Args:
        source: Open.
        agreement: Of the call.
        name: Of the source, for messages.
    """
    with calling_threads(1, name="shardwise-read") as threads:
        yield AwaitedSource(source, name=name, threads=threads, agreement=agreement)


def mapped(source: Source, runs: Sequence[Run], agreement: Agreement) -> list[torch.Tensor | None]:
    """Map runs of one file as `Source.mapped` does.

    Raises:
        CheckpointError: The file cannot be opened, or has changed.
        PeerError: Another rank failed.
        StalledReadError: The file system does not answer.
    """
    what = f"{source.name}, {runs[0].file}: opening it to map it"
    return on_thread(lambda _: source.mapped(runs), agreement, what=what)


def stitched(
    source: Source, shards: Sequence[Sequence[Run]], agreement: Agreement
) -> list[torch.Tensor | None]:
    """Put pages of files side by side as `shardwise.checkpoint.stitched` does.

    Raises:
        CheckpointError: A file cannot be opened or read, or has changed.
        PeerError: Another rank failed.
        StalledReadError: The file system does not answer.
    """

    def one_by_one(doing: Doing) -> list[torch.Tensor | None]:
        found: list[torch.Tensor | None] = []
        for runs in shards:
            doing.begin(f"{source.name}, {runs[0].file}: mapping {len(runs)} runs of it")
            found += stitched_by_source(source, [runs])
        return found

    return on_thread(one_by_one, agreement, what=f"{source.name}: mapping")


def require_unchanged(source: Source, agreement: Agreement) -> None:
    """Raise unless every file of a source that is open is still what it was.

    Raises:
        ChangedFileError: A file is another one, or has other bytes.
        PeerError: Another rank failed.
        StalledReadError: The file system does not answer.
    """
    on_thread(
        lambda _: source.require_unchanged(),
        agreement,
        what=f"{source.name}: looking whether its files have changed",
    )
