"""A source whose reads are bounded: one that hangs is reported, with file and rank, while this rank listens to the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from shardwise.checkpoint import Readable, Source
from shardwise.checkpoint.stored_tensor import StoredTensor
from shardwise.errors import StalledReadError
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.read import SECONDS_FOR_STARTED_READS, await_read
from shardwise.materialization.reader_threads import ReaderThreads
from shardwise.materialization.sight import is_in_memory


class AwaitedSource:
    """What an exchange and a conversion need of a source.

    Args:
        source: Open.
        threads: On which it is read.
        agreement: Of the call.
    """

    def __init__(self, source: Source, *, threads: ReaderThreads, agreement: Agreement) -> None:
        self._source = source
        self._threads = threads
        self._agreement = agreement

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """As the source has them."""
        return self._source.tensors

    def read_into(self, file: str, offset: int, into: memoryview) -> None:
        """Read as `Source.read_into` does.

        Raises:
            As `await_read`.
        """
        future = self._threads.submit(self._source.read_into, file, offset, into)
        what = f"{self._source.name}, {file}: reading {len(into):,} bytes at byte {offset:,}"
        await_read(future, self._agreement, what=what)


@contextmanager
def awaited(source: Source, agreement: Agreement) -> Iterator[Readable]:
    """Bound the reads of a source in the body; what lies in memory needs none.

    Args:
        source: Open.
        agreement: Of the call.
    """
    if is_in_memory(source):
        yield source
        return
    threads = ReaderThreads(1)
    seconds = SECONDS_FOR_STARTED_READS
    try:
        yield AwaitedSource(source, threads=threads, agreement=agreement)
    except StalledReadError:
        seconds = 0.0  # the others wait to be told
        raise
    finally:
        threads.close(within_seconds=seconds)
