"""Timelines of several ranks, read back from their JSON and laid side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import ConfigurationError
from shardwise.profiling.columns import ReadingColumns
from shardwise.profiling.phases import PhaseSpan, seconds_by_name
from shardwise.profiling.readings import MemoryReading

Figure = Literal[
    "anon_bytes",
    "file_bytes",
    "pss_bytes",
    "device_bytes",
    "shared_bytes",
    "device_reserved_bytes",
    "fetched_bytes",
    "read_bytes",
    "received_bytes",
]
FIGURES: Final[tuple[Figure, ...]] = ("anon_bytes", "file_bytes", "pss_bytes", "device_bytes")
# Left out of a document where nothing was read; those of earlier versions have none of them.
OPTIONAL_FIGURES: Final[tuple[Figure, ...]] = (
    "shared_bytes",
    "device_reserved_bytes",
    "fetched_bytes",
    "read_bytes",
    "received_bytes",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timeline:
    """One rank's memory over time, as increases over its baseline.

    Args:
        rank: The rank.
        measures: What exactly the figures are.
        started_at_seconds: Unix time of the profile's start.
        seconds: Instants of the readings since the profile's start, ascending; shape (readings,).
        increases: Per figure, bytes above the baseline, NaN where not read; each of shape (readings,).
        phases: The phases, in the order of their start.
    """

    rank: int
    measures: str
    started_at_seconds: float
    seconds: NDArray[np.float64]
    increases: Mapping[Figure, NDArray[np.float64]]
    phases: tuple[PhaseSpan, ...]

    def __post_init__(self) -> None:
        for name, values in self.increases.items():
            if values.shape != self.seconds.shape:
                raise ConfigurationError(
                    f"timeline of rank {self.rank}: expected {self.seconds.size} values of {name}, one for each "
                    f"instant, got {values.size}"
                )

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Timeline:
        """Read what `MemoryProfile.to_json` wrote, with the key `rank` added.

        Raises:
            ConfigurationError: A key is missing, or columns differ in length.
        """
        try:
            baseline = document["baseline"]
            increases: dict[Figure, NDArray[np.float64]] = {}
            seconds = np.array(document["seconds"], dtype=np.float64)
            for name in (*FIGURES, *OPTIONAL_FIGURES):
                if name in OPTIONAL_FIGURES and name not in document:
                    increases[name] = np.full_like(seconds, np.nan)
                    continue
                base = baseline[name]
                column = np.array(document[name], dtype=np.float64)  # None becomes NaN
                increases[name] = np.full_like(column, np.nan) if base is None else column - base
            return cls(
                rank=document["rank"],
                measures=document["measures"],
                started_at_seconds=document["started_at_seconds"],
                seconds=seconds,
                increases=increases,
                phases=tuple(PhaseSpan(**span) for span in document["phases"]),
            )
        except KeyError as error:
            raise ConfigurationError(
                f"timeline: expected the key {error.args[0]!r}, got {sorted(document)}. Write timelines with "
                "MemoryProfile.to_json and add the rank."
            ) from error

    def peak_bytes(self, figure: Figure, *, until_seconds: float) -> int | None:
        """Return the highest increase up to an instant since the profile's start; None where never read."""
        values = self.increases[figure][self.seconds <= until_seconds]
        values = values[~np.isnan(values)]
        return None if values.size == 0 else max(0, int(values.max()))

    def phase_seconds(self) -> dict[str, float]:
        """Return the time spent in each phase, by name; time in which a name was open twice counts once."""
        return seconds_by_name(self.phases)

    def phases_end_seconds(self, names: Sequence[str]) -> float | None:
        """Return when the last of the named phases ends; None where there is none of them."""
        return max((span.stop_seconds for span in self.phases if span.name in names), default=None)


def timeline_document(
    columns: ReadingColumns,
    *,
    baseline: MemoryReading,
    phases: Sequence[PhaseSpan],
    measures: str,
    started_at_seconds: float,
    skipped_readings: int,
) -> dict[str, Any]:
    """Return the JSON form of a profile: by column, in absolute bytes, None where not read."""
    rows = list(columns.rows())
    columns_of_rows: dict[str, list[int | None]] = {
        name: [getattr(row, name) for row in rows] for name in OPTIONAL_FIGURES
    }
    was_read = {
        name: values for name, values in columns_of_rows.items() if any(value is not None for value in values)
    }
    return {
        "measures": measures,
        "started_at_seconds": started_at_seconds,
        "skipped_readings": skipped_readings,
        "seconds": [round(row.seconds, 6) for row in rows],
        "anon_bytes": [row.anon_bytes for row in rows],
        "file_bytes": [row.file_bytes for row in rows],
        "pss_bytes": [row.pss_bytes for row in rows],
        "device_bytes": [None if math.isnan(value) else int(value) for value in columns.device_values()],
        **was_read,
        "phases": [dataclasses.asdict(span) for span in phases],
        "baseline": {
            "anon_bytes": baseline.anon_bytes,
            "file_bytes": baseline.file_bytes,
            "pss_bytes": baseline.pss_bytes,
            "device_bytes": baseline.device_allocated_bytes,
            **{name: getattr(baseline, name) for name in was_read},
        },
    }


def node_increase(
    timelines: Sequence[Timeline], figure: Figure
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum one figure over ranks at equal wall-clock instants.

    Each rank counts with its last reading before the instant, and with 0 before its first one.

    Args:
        timelines: The ranks of one node.
        figure: What to sum.

    Returns:
        Instants in seconds since the start of the earliest profile, and the sum in bytes above the baselines at
        each; both of shape (instants,), empty where no rank has the figure.
    """
    origin = min((line.started_at_seconds for line in timelines), default=0.0)
    ranks: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for line in timelines:
        was_read = ~np.isnan(line.increases[figure])
        offset = line.started_at_seconds - origin
        ranks.append((line.seconds[was_read] + offset, line.increases[figure][was_read]))
    instants = np.unique(np.concatenate([when for when, _ in ranks])) if ranks else np.empty(0)
    total = np.zeros_like(instants)
    for when, values in ranks:
        held = np.concatenate([np.zeros(1), values])
        total += held[np.searchsorted(when, instants, side="right")]
    return instants, total


def node_peak_bytes(timelines: Sequence[Timeline], figure: Figure, *, until: Sequence[str]) -> int | None:
    """Return the highest sum over the ranks of one node, up to the end of the given phases.

    Args:
        timelines: The ranks of one node.
        figure: What to sum.
        until: Names of phases; the last end of any of them, on any rank, ends the span. Where none of them
            occurs, the whole timeline counts.

    Returns:
        Bytes above the baselines; None where no rank has the figure.
    """
    origin = min((line.started_at_seconds for line in timelines), default=0.0)
    ends = [
        end + line.started_at_seconds - origin
        for line in timelines
        if (end := line.phases_end_seconds(until)) is not None
    ]
    instants, total = node_increase(timelines, figure)
    if ends:
        total = total[instants <= max(ends)]
    return None if total.size == 0 else max(0, int(total.max()))
