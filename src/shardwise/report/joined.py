"""The load and the training step on one time axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from shardwise.profiling import Timeline

_BREAK_SHARE: Final = 0.04  # of the load's time


def load_and_step(
    loads: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]
) -> tuple[tuple[Timeline, ...], float | None]:
    """Read the ranks' timelines, with the step moved next to the load where it was sampled apart.

    Both parts are increases over the load's baseline.

    Args:
        loads: Timelines of the load, one per rank.
        steps: Timelines of the step, one per rank; empty where the loads hold the step as well.

    Returns:
        The timelines by rank, and the middle of the break between load and step in seconds since the start of the
        earliest timeline (None where there is no break).

    Raises:
        ConfigurationError: A timeline cannot be read.
    """
    by_rank = sorted(loads, key=lambda document: int(document["rank"]))
    lines = tuple(Timeline.from_json(document) for document in by_rank)
    later = {document["rank"]: document for document in steps}
    if not lines or set(later) != {line.rank for line in lines}:
        return lines, None
    trains = [Timeline.from_json({**later[d["rank"]], "baseline": d["baseline"]}) for d in by_rank]
    origin = min(line.started_at_seconds for line in lines)
    load_seconds = float(
        max(line.started_at_seconds - origin + line.seconds.max(initial=0.0) for line in lines)
    )
    resumed_seconds = load_seconds * (1 + _BREAK_SHARE)
    shift_seconds = origin + resumed_seconds - min(line.started_at_seconds for line in trains)
    joined = tuple(_join(line, train, shift_seconds) for line, train in zip(lines, trains, strict=True))
    return joined, (load_seconds + resumed_seconds) / 2


def _join(load: Timeline, step: Timeline, shift_seconds: float) -> Timeline:
    """Return `load` followed by `step`, whose wall-clock time is moved by `shift_seconds`."""
    offset = step.started_at_seconds + shift_seconds - load.started_at_seconds
    moved = tuple(
        dataclasses.replace(
            span, start_seconds=span.start_seconds + offset, stop_seconds=span.stop_seconds + offset
        )
        for span in step.phases
    )
    return dataclasses.replace(
        load,
        seconds=np.concatenate([load.seconds, step.seconds + offset]),
        increases={
            name: np.concatenate([values, step.increases[name]]) for name, values in load.increases.items()
        },
        phases=(*load.phases, *moved),
    )
