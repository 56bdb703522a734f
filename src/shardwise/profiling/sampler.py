"""A timeline of this process's host and device memory, with the phases it went through."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from shardwise.errors import ConfigurationError
from shardwise.profiling.columns import MemoryPeaks, ReadingColumns, reading_of, span_peaks
from shardwise.profiling.pace import handing_over_seconds, next_sample_seconds
from shardwise.profiling.phases import PhaseSpan, activate, active_recorders, deactivate, seconds_by_name
from shardwise.profiling.readings import MemoryReading
from shardwise.profiling.row_reader import RowReader
from shardwise.profiling.saved import save_document
from shardwise.profiling.summary import summary
from shardwise.profiling.timeline import timeline_document
from shardwise.profiling.traffic import Traffic, span_traffic

MOST_ROWS: Final = (
    65536  # 5.5 MiB; 11 minutes at 100 readings a second, then half as many a second, and so on
)
_THREAD_SHARE: Final = (
    0.01  # of one core, for everything that the sampler's thread does, and what others lose to it
)


class MemoryProfile:
    """Samples memory from `start` to `stop` in one daemon thread; `profile_memory` is the usual way in.

    A reading is also taken at the start and stop of each phase, and at `stop`; peaks use all readings.

    Args:
        device: See `profile_memory`.
        interval_seconds: See `profile_memory`.
        proportional: See `profile_memory`.

    Raises:
        ConfigurationError: The interval is not a positive number, or the platform gives no memory figures.
    """

    def __init__(
        self, *, device: torch.device | str | int | None, interval_seconds: float, proportional: bool = True
    ) -> None:
        if not (math.isfinite(interval_seconds) and interval_seconds > 0):
            raise ConfigurationError(
                f"memory profile: expected interval_seconds above 0, got {interval_seconds}. 0.01 is usual."
            )
        self._interval_seconds = interval_seconds
        self._reader = RowReader(device=device, interval_seconds=interval_seconds, proportional=proportional)
        self._lock = threading.RLock()  # a signal handler may open a phase inside a reading
        self._columns = ReadingColumns(most_rows=MOST_ROWS)
        self._phases: list[PhaseSpan] = []
        self._open_phases: dict[int, tuple[str, int, float]] = {}  # key: (name, depth, start in seconds)
        self._phase_count = 0
        self._skipped_readings = 0
        # Held while the thread is to run: to wait for it is one call into C, where an event's wait is a dozen in Python.
        self._running = threading.Lock()
        self._thread: threading.Thread | None = None
        self._baseline: MemoryReading | None = None
        self._started_at_seconds = 0.0  # Unix time
        self._origin_seconds = 0.0  # of time.perf_counter
        self._stopped_after_seconds: float | None = None

    def start(self) -> None:
        """Take the baseline and start to sample.

        Raises:
            ConfigurationError: The profile was started before.
        """
        if self._baseline is not None:
            raise ConfigurationError("memory profile: expected one start, got a second. Make a new profile.")
        if self._reader.has_device:
            # The reset below would hide a peak from the profiles around this one.
            for other in active_recorders():
                if isinstance(other, MemoryProfile):
                    other._take(all_figures=True)
            self._reader.reset_device_peak()
        self._started_at_seconds = time.time()
        self._origin_seconds = time.perf_counter()
        first = self._reader.read(self._now(), all_figures=True)
        self._baseline = reading_of(first)
        self._columns.append(first)
        self._running.acquire()
        self._thread = threading.Thread(target=self._sample, name="shardwise-memory-profile", daemon=True)
        self._thread.start()
        activate(self)

    def stop(self) -> None:
        """Take the last reading, and end the thread and all open phases; a second call does nothing."""
        if self._baseline is None or self._stopped_after_seconds is not None:
            return
        deactivate(self)
        self._running.release()
        if self._thread is not None:
            self._thread.join()
        self._take(all_figures=True)
        with self._lock:
            for key in tuple(self._open_phases):
                self._close_phase(key)
            self._stopped_after_seconds = self._now()
            self._reader.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note a phase in this profile, with a reading at each end; after `stop`, do nothing.

        Args:
            name: The phase's name. Phases nest; one name may occur again.

        Raises:
            ConfigurationError: The profile was not started, or the name is empty.
        """
        key = self._open_phase(name)
        try:
            yield
        finally:
            if self._stopped_after_seconds is None:
                self._take(all_figures=False)
            with self._lock:
                self._close_phase(key)

    @property
    def baseline(self) -> MemoryReading:
        """The first reading, from which increases are counted."""
        if self._baseline is None:
            raise ConfigurationError("memory profile: expected a started profile. Call start() first.")
        return self._baseline

    @property
    def readings(self) -> list[MemoryReading]:
        """All readings so far, the oldest first; each field is absolute."""
        with self._lock:
            return list(self._columns.rows())

    @property
    def phases(self) -> list[PhaseSpan]:
        """The phases that have ended, in the order of their start."""
        with self._lock:
            return sorted(self._phases, key=lambda span: (span.start_seconds, span.depth))

    @property
    def seconds(self) -> float:
        """Time from start to stop, or until now."""
        if self._stopped_after_seconds is None:
            return self._now() if self._baseline else 0.0
        return self._stopped_after_seconds

    @property
    def measures(self) -> str:
        """What exactly the figures are on this platform."""
        return self._reader.measures

    @property
    def skipped_readings(self) -> int:
        """Number of readings that the system refused."""
        return self._skipped_readings

    @property
    def anon_peak_bytes(self) -> int:
        """Highest increase of anonymous memory over the baseline."""
        return self.peak_between(0.0, math.inf).anon_peak_bytes

    @property
    def file_peak_bytes(self) -> int:
        """Highest increase of file-backed memory over the baseline."""
        return self.peak_between(0.0, math.inf).file_peak_bytes

    @property
    def shared_peak_bytes(self) -> int:
        """Highest increase of shared memory over the baseline."""
        return self.peak_between(0.0, math.inf).shared_peak_bytes

    @property
    def pss_peak_bytes(self) -> int | None:
        """Highest increase of the proportional set size over the baseline; None where it cannot be read."""
        return self.peak_between(0.0, math.inf).pss_peak_bytes

    @property
    def device_peak_bytes(self) -> int:
        """Highest increase of device memory over the baseline; 0 where there is no device."""
        return self.peak_between(0.0, math.inf).device_peak_bytes

    @property
    def device_reserved_peak_bytes(self) -> int:
        """Highest increase of what the device's allocator holds; 0 where there is no device."""
        return self.peak_between(0.0, math.inf).device_reserved_peak_bytes

    @property
    def traffic(self) -> Traffic:
        """What was fetched from storage, read and received from the start on."""
        return self.traffic_between(0.0, math.inf)

    def traffic_between(self, start_seconds: float, stop_seconds: float) -> Traffic:
        """Return what was fetched from storage, read and received within a span; exact for a phase's span.

        Args:
            start_seconds: Start of the span, since the profile's start.
            stop_seconds: End of the span, since the profile's start.
        """
        with self._lock:
            return span_traffic(self._columns, start_seconds=start_seconds, stop_seconds=stop_seconds)

    def peak_between(self, start_seconds: float, stop_seconds: float) -> MemoryPeaks:
        """Return the highest increases over the baseline within a span, both ends included.

        Args:
            start_seconds: Start of the span, since the profile's start.
            stop_seconds: End of the span, since the profile's start.
        """
        with self._lock:
            return span_peaks(
                self._columns, baseline=self.baseline, start_seconds=start_seconds, stop_seconds=stop_seconds
            )

    def phase_seconds(self) -> dict[str, float]:
        """Return the time spent in each phase, by name; time in which a name was open twice counts once."""
        return seconds_by_name(self.phases)

    def __str__(self) -> str:
        """Say in a table what each phase did cost; `to_json` has every reading."""
        if self._baseline is None:
            return "memory profile: not started"
        return summary(
            self.phases,
            seconds=self.seconds,
            peaks=self.peak_between,
            traffic=self.traffic_between,
            measures=self.measures,
        )

    def save(self, path: str | os.PathLike[str], *, rank: int | None = None) -> None:
        """Write the profile as JSON, whole or not at all; `shardwise report` draws it, beside those of other ranks.

        Args:
            path: File to write, another one for each rank. Missing directories are made.
            rank: This process's rank; None for the default process group's, else the launcher's `RANK`, else 0.
        """
        save_document(self.to_json(), path, rank=rank)

    def to_json(self) -> dict[str, Any]:
        """Return the timeline by column, in absolute bytes (None where not read), for `json.dump`.

        `started_at_seconds` is Unix time: with it the timelines of several ranks can be laid side by side.
        """
        with self._lock:
            return timeline_document(
                self._columns,
                baseline=self.baseline,
                phases=self.phases,
                measures=self.measures,
                started_at_seconds=self._started_at_seconds,
                skipped_readings=self._skipped_readings,
            )

    def _now(self) -> float:
        return time.perf_counter() - self._origin_seconds

    def _sample(self) -> None:
        due, lost_seconds = self._interval_seconds, 0.0
        switch_seconds = sys.getswitchinterval()
        while not self._running.acquire(timeout=max(0.0, due - self._now())):
            lost_seconds += handing_over_seconds(self._now() - due, switch_seconds=switch_seconds)
            self._take(all_figures=None)
            due = next_sample_seconds(
                now_seconds=self._now(),
                interval_seconds=self._interval_seconds,
                thread_seconds=time.thread_time() + lost_seconds,
                share=_THREAD_SHARE,
            )

    def _take(self, *, all_figures: bool | None) -> None:
        with self._lock:
            try:
                row = self._reader.read(self._now(), all_figures=all_figures)
            except OSError:
                self._skipped_readings += 1
                return
            if self._columns.append(row):
                self._interval_seconds *= 2

    def _open_phase(self, name: str) -> int:
        if self._baseline is None or not name:
            got = "an empty name" if self._baseline else "a profile that was not started"
            raise ConfigurationError(
                f"phase {name!r}: expected a name and a started memory profile, got {got}"
            )
        if self._stopped_after_seconds is None:
            self._take(all_figures=False)
        with self._lock:
            key = self._phase_count
            self._phase_count += 1
            if self._stopped_after_seconds is None:
                self._open_phases[key] = (name, len(self._open_phases), self._now())
        return key

    def _close_phase(self, key: int) -> None:
        opened = self._open_phases.pop(key, None)
        if opened is not None:  # else the profile stopped first, and closed it
            name, depth, start = opened
            stop = self._now()
            self._phases.append(PhaseSpan(name=name, depth=depth, start_seconds=start, stop_seconds=stop))


@contextmanager
def profile_memory(
    device: torch.device | str | int | None = None, interval_seconds: float = 0.01, proportional: bool = True
) -> Iterator[MemoryProfile]:
    """Record host and device memory of this process, and what it reads, while the block runs; it calls nothing of other ranks.

    Any code may run in the block. It can name its parts, and so can what it calls:

        with sw.profile_memory() as profile:
            with sw.phase("build"):
                model = build()
            with sw.phase("train"):
                ...
        print(profile)
        profile.save(f"profiles/{rank}.json")  # shardwise report profiles/*.json --html memory.html

    Args:
        device: Accelerator whose memory is recorded too; None for the process's current one, if there is any
            (choose it before). Its peak statistics are reset at entry.
        interval_seconds: Time between two samples.
        proportional: Whether the proportional set size is read too, for which the kernel walks every page of the process.

    Yields:
        The profile, whose figures may be read at any time, also after the block.

    Raises:
        ConfigurationError: The interval is not a positive number, or the platform gives no memory figures.
    """
    profile = MemoryProfile(device=device, interval_seconds=interval_seconds, proportional=proportional)
    profile.start()
    try:
        yield profile
    finally:
        profile.stop()
