"""SIGTERM as a wish to stop at the next step boundary."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Preemption:
    """Whether this process was told to end.

    The signal changes nothing by itself. Ranks tell each other in a collective, a step's or one of its own after what takes long,
    which succeeds only where all of them live: a rank that is told to end because a peer has died fails there, and saves nothing.
    """

    def __init__(self) -> None:
        self.is_wanted = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Take note of SIGTERM while the body runs; the handler from before is back afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set a handler
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_wanted = True
