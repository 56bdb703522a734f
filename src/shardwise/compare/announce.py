"""Short progress lines from the ranks of a run to the process that started them, through a file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

Progress = Callable[[str], None]

PROGRESS_FILE_VARIABLE: Final = "SHARDWISE_PROGRESS_FILE"
_POLL_SECONDS: Final = 0.2


def announce(message: str) -> None:
    """Say what this rank does now; only rank 0 is heard, and only where somebody listens."""
    path = os.environ.get(PROGRESS_FILE_VARIABLE)
    if not path or os.environ.get("RANK", "0") != "0":
        return
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(message.replace("\n", " ") + "\n")


@contextmanager
def follow(path: Path, progress: Progress) -> Iterator[None]:
    """Hand each line that is added to `path` to `progress`, until the block ends.

    Args:
        path: The file that `announce` writes; made here.
        progress: Called from a thread of its own.
    """
    path.touch()
    ended = threading.Event()

    def poll() -> None:
        rest = ""
        with path.open(encoding="utf-8") as file:
            while True:
                last_look = ended.wait(_POLL_SECONDS)
                *lines, rest = (rest + file.read()).split("\n")
                for line in lines:
                    progress(line)
                if last_look:
                    return

    follower = threading.Thread(target=poll, name="shardwise-progress", daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()
