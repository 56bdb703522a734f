"""One rank downloads while the others wait: they are patient as long as its files grow."""

from __future__ import annotations

from concurrent.futures import wait
from functools import partial
from pathlib import Path

from shardwise.checkpoint import Location, download_snapshot, downloaded_bytes
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.reader_threads import ReaderThreads

_SECONDS_BETWEEN_LOOKS = 0.25


def download(location: Location, agreement: Agreement, *, subfolder: str) -> Path:
    """Download what is missing of a snapshot, as `download_snapshot` does, and count a step whenever its files have grown.

    Args:
        location: On a hub.
        agreement: Of the call.
        subfolder: Of the repository.

    Returns:
        The snapshot's directory.

    Raises:
        CheckpointError: As `download_snapshot`.
        PeerError: Another rank failed, or waited while nothing grew.
    """
    threads, known = ReaderThreads(1, name="shardwise-download"), -1
    future = threads.submit(partial(download_snapshot, location, subfolder=subfolder))
    try:
        while not wait([future], timeout=_SECONDS_BETWEEN_LOOKS).done:
            agreement.check()
            if (nbytes := downloaded_bytes(location)) != known:
                known = nbytes
                agreement.step()
        return future.result()
    finally:
        threads.close(within_seconds=0.0)
