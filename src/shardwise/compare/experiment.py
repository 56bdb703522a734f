"""Bring one model up in several modes, each in fresh processes, and lay the results side by side."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shardwise.compare.announce import Progress
from shardwise.compare.environment import describe_environment
from shardwise.compare.fingerprint import differing_names, is_tie, whole_digest
from shardwise.compare.launch import refuse_inside_launcher, run_ranks
from shardwise.compare.model_directory import model_directory
from shardwise.compare.modes import PEER_NAMES, Mode
from shardwise.compare.rank import Worker
from shardwise.compare.requirements import require_for_modes
from shardwise.compare.worker import LOAD_PHASES, measure_mode
from shardwise.errors import CommandError, ConfigurationError
from shardwise.profiling import Figure, Timeline, node_peak_bytes
from shardwise.profiling.whole_file import write_whole

SCHEMA: Final = "shardwise.compare/1"
DTYPES: Final = ("auto", "bfloat16", "float32")

_NODE_FIGURES: Final[dict[str, Figure]] = {
    "host_anon_peak_bytes": "anon_bytes",
    "host_file_peak_bytes": "file_bytes",
    "host_pss_peak_bytes": "pss_bytes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run of one mode.

    Args:
        entry: Its part of the document.
        digests: Digest by tensor; empty where the run failed, or nothing was compared.
        logits: Digest of the logits; empty likewise.
    """

    entry: Mapping[str, Any]
    digests: Mapping[str, str]
    logits: str

    @property
    def mode(self) -> str:
        """The mode's name."""
        return str(self.entry["mode"])

    @property
    def is_ok(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.entry["status"] == "ok")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What came out of a comparison.

    Args:
        document: The JSON document, schema `shardwise.compare/1`.
    """

    document: Mapping[str, Any]

    @property
    def failed_modes(self) -> tuple[str, ...]:
        """Names of the modes that failed."""
        return tuple(run["mode"] for run in self.document["runs"] if run["status"] != "ok")

    @property
    def is_equal(self) -> bool | None:
        """Whether all modes ended with equal tensors and logits; None where fewer than two came to their end."""
        equal: bool | None = self.document["agreement"]["equal"]
        return equal

    @property
    def is_good(self) -> bool:
        """Whether no mode of shardwise failed or differs from another; what other libraries do is told, and is no fault."""
        differing = {difference["mode"] for difference in self.document["agreement"]["differences"]}
        return not differing.union(self.failed_modes).difference(PEER_NAMES)

    def save(self, path: Path) -> None:
        """Write the document as JSON, whole or not at all; missing directories are made."""
        write_whole(path, json.dumps(self.document, allow_nan=False) + "\n")


def compare(
    model: str,
    *,
    ranks: int,
    modes: Sequence[Mode],
    dtype: str,
    log_directory: Path,
    progress: Progress,
    replicas: int = 1,
    repeats: int = 1,
    load_only: bool = False,
    worker: Worker = measure_mode,
) -> Comparison:
    """Bring a model up in each mode and compare time, memory, values and logits.

    A mode that fails is a run with its error; the others go on.

    Args:
        model: A directory or a hub id.
        ranks: Number of local ranks.
        modes: What to compare, in this order.
        dtype: Dtype in which shards are stored: `auto` for the checkpoint's own, `bfloat16` or `float32`.
        log_directory: Where the output of the ranks of a failed run is left, in a folder of the mode's name.
        progress: Told what goes on.
        replicas: Copies of each shard (HSDP); divides the ranks.
        repeats: Number of runs of each mode; the one of median time stands for them.
        load_only: Leave out the comparison of values, the training step and the question.
        worker: What each rank runs.

    Raises:
        ConfigurationError: An option is not possible, or this process is a rank itself.
        CheckpointError: There is no such model.
        MissingDependencyError: A mode needs a package that is not installed.
    """
    refuse_inside_launcher("compare", environ=os.environ)
    for name, value in (("ranks", ranks), ("replicas", replicas), ("repeats", repeats)):
        if value < 1:
            raise ConfigurationError(f"{name}: expected 1 or more, got {value}.")
    if ranks % replicas:
        raise ConfigurationError(f"replicas: expected a divisor of the {ranks} ranks, got {replicas}.")
    dtype = {"bf16": "bfloat16", "fp32": "float32"}.get(dtype, dtype)
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
    require_for_modes(modes)
    directory = model_directory(model, progress=progress)
    asked = next((mode for mode in modes if mode.memory_efficient_init), modes[0])
    runs: dict[str, list[Outcome]] = {mode.name: [] for mode in modes}
    for repeat in range(repeats):  # the modes in turn: what else the machine does then falls on all of them
        for mode in modes:
            if any(not run.is_ok for run in runs[mode.name]):
                continue  # a failed run stands for all
            runs[mode.name].append(
                _run(
                    {
                        "model": str(directory),
                        "mode": mode.name,
                        "dtype": dtype,
                        "mesh_shape": [ranks] if replicas == 1 else [replicas, ranks // replicas],
                        "load_only": load_only,
                        "ask": mode is asked,
                    },
                    worker=worker,
                    ranks=ranks,
                    log_directory=log_directory
                    / (mode.name if repeats == 1 else f"{mode.name}-{repeat + 1}"),
                    progress=_labelled(progress, mode.name, repeat=repeat, repeats=repeats),
                )
            )
    chosen = [median_entry([run.entry for run in runs[mode.name]]) for mode in modes]
    outcomes = [run for mode in modes for run in runs[mode.name]]
    with contextlib.suppress(OSError):  # it is left where a run has left its logs in it
        log_directory.rmdir()
    return Comparison(
        document={
            "schema": SCHEMA,
            "model": model,
            "dtype": dtype,
            "replicas": replicas,
            "environment": describe_environment(),
            "runs": chosen,
            "agreement": agreement(outcomes),
        }
    )


def agreement(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Compare every run that came to its end with the first of them.

    Returns:
        `equal` (None for fewer than two runs), `reference` (a mode), `parameters` and `buffers` (how many were
        compared) and `differences`: per mode, the tensors that differ and whether the logits do.
    """
    good = [outcome for outcome in outcomes if outcome.is_ok and outcome.logits]
    if not good:
        return {"equal": None, "reference": None, "parameters": 0, "buffers": 0, "differences": []}
    reference = good[0]
    compared = [_difference(reference, outcome) for outcome in good[1:]]
    differences = [found for found in compared if found["tensors"] or found["logits"]]
    kinds = [digest.split(" ", 1)[0] for digest in reference.digests.values() if not is_tie(digest)]
    return {
        "equal": not differences if len(good) > 1 else None,
        "reference": reference.mode,
        "parameters": kinds.count("parameter"),
        "buffers": kinds.count("buffer"),
        "differences": differences,
    }


def _difference(reference: Outcome, outcome: Outcome) -> dict[str, Any]:
    return {
        "mode": outcome.mode,
        "tensors": differing_names(reference.digests, outcome.digests),
        "logits": outcome.logits != reference.logits,
    }


def merge_ranks(mode: str, results: Mapping[int, Mapping[str, Any]]) -> Outcome:
    """Make one run of what its ranks returned: times and peaks from their profiles, the rest from the load report.

    Args:
        mode: The mode's name.
        results: What the worker returned, by rank.
    """
    by_rank = [results[rank] for rank in sorted(results)]
    first = by_rank[0]
    timelines = [Timeline.from_json(result["timeline"]) for result in by_rank]
    phases = {name: max(result["seconds"][name] for result in by_rank) for name in LOAD_PHASES}
    reported = {report["rank"]: report for report in first["report"]["ranks"]}
    ranks = [
        {
            **reported[result["rank"]],
            **result["peaks"],
            "node": result["node"],
            "seconds": sum(result["seconds"].values()),
        }
        for result in by_rank
    ]
    entry = {
        **first["report"],
        "mode": mode,
        "status": "ok",
        "seconds": max(rank["seconds"] for rank in ranks),
        "phases": phases,
        "ranks": ranks,
        "step_seconds": max(
            (r["step_seconds"] for r in by_rank if r["step_seconds"] is not None), default=None
        ),
        "node": _node_peaks(timelines, nodes=[result["node"] for result in by_rank]),
        "timelines": [result["timeline"] for result in by_rank],
        "step_timelines": [r["step_timeline"] for r in by_rank if r["step_timeline"] is not None],
        "answer": first["answer"],
        "fingerprint": whole_digest(first["digests"]),
        "logits": first["logits"],
    }
    return Outcome(entry=entry, digests=first["digests"], logits=first["logits"])


def median_entry(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the run of median time, with the times of all; a failed run stands for all of them.

    Args:
        entries: The runs of one mode.
    """
    for entry in entries:
        if entry["status"] != "ok":
            return entry
    seconds = [entry["seconds"] for entry in entries]
    # The lower median is the time of a run, and not between two.
    middle = entries[seconds.index(statistics.median_low(seconds))]
    return middle if len(entries) == 1 else {**middle, "repeat_seconds": seconds}


def _run(
    arguments: Mapping[str, Any], *, worker: Worker, ranks: int, log_directory: Path, progress: Progress
) -> Outcome:
    progress(f"starting {ranks} rank{'s' if ranks > 1 else ''}")
    shutil.rmtree(log_directory, ignore_errors=True)  # of an earlier command
    try:
        results = run_ranks(worker, arguments, ranks=ranks, log_directory=log_directory, progress=progress)
    except CommandError as error:
        progress("failed")
        entry = {"mode": arguments["mode"], "status": "failed", "error": str(error)}
        return Outcome(entry=entry, digests={}, logits="")
    shutil.rmtree(log_directory, ignore_errors=True)
    outcome = merge_ranks(arguments["mode"], results)
    progress(f"done, {outcome.entry['seconds']:.1f} s to load and shard")
    return outcome


def _node_peaks(timelines: Sequence[Timeline], *, nodes: Sequence[str]) -> dict[str, int | None]:
    """Highest sum over the ranks of a node at equal instants, of the fullest node."""
    members = [
        [line for line, where in zip(timelines, nodes, strict=True) if where == node]
        for node in dict.fromkeys(nodes)
    ]
    peaks: dict[str, int | None] = {}
    for name, figure in _NODE_FIGURES.items():
        found = [node_peak_bytes(lines, figure, until=LOAD_PHASES) for lines in members]
        peaks[name] = max((peak for peak in found if peak is not None), default=None)
    return peaks


def _labelled(progress: Progress, mode: str, *, repeat: int, repeats: int) -> Progress:
    label = mode if repeats == 1 else f"{mode} ({repeat + 1} of {repeats})"
    return lambda message: progress(f"{label}: {message}")
