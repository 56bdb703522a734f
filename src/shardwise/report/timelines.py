"""The timelines of one mode: its load, and the training step that was sampled apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from shardwise.profiling import Timeline

LOAD_PHASES: Final = ("from_pretrained", "optimizer", "wrap_model")
STEP_PHASE: Final = "step"


def load_timelines(loads: Sequence[Mapping[str, Any]]) -> tuple[Timeline, ...]:
    """Read the ranks' timelines up to the end of their load.

    Args:
        loads: Timelines of the load, one per rank; what follows the last phase of the load is left out.

    Returns:
        The timelines by rank.

    Raises:
        ConfigurationError: A timeline cannot be read.
    """
    return tuple(_until_loaded(Timeline.from_json(document)) for document in _by_rank(loads))


def step_timelines(
    steps: Sequence[Mapping[str, Any]], *, loads: Sequence[Mapping[str, Any]]
) -> tuple[Timeline, ...]:
    """Read the ranks' timelines of the training step, as increases over the baselines of the load.

    Args:
        steps: Timelines of the step, one per rank.
        loads: Timelines of the load, one per rank.

    Returns:
        The timelines by rank; none where any rank of the load lacks one.

    Raises:
        ConfigurationError: A timeline cannot be read.
    """
    baselines = {document["rank"]: document["baseline"] for document in loads}
    if {document["rank"] for document in steps} != set(baselines):
        return ()
    return tuple(
        Timeline.from_json({**document, "baseline": baselines[document["rank"]]})
        for document in _by_rank(steps)
    )


def _by_rank(documents: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(documents, key=lambda document: int(document["rank"]))


def _until_loaded(line: Timeline) -> Timeline:
    end_seconds = line.phases_end_seconds(LOAD_PHASES)
    if end_seconds is None:
        return line
    is_inside = line.seconds <= end_seconds
    return dataclasses.replace(
        line,
        seconds=line.seconds[is_inside],
        increases={name: values[is_inside] for name, values in line.increases.items()},
        phases=tuple(span for span in line.phases if span.start_seconds < end_seconds),
    )
