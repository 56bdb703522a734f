"""What a load did cost, on each rank and together; the same fields as what a plan predicts."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from shardwise.errors import ConfigurationError
from shardwise.profiling.whole_file import write_whole

SCHEMA: Final = "shardwise.load_report/1"
ORIGINS: Final = ("checkpoint", "tied", "initialised", "recomputed", "derived", "kept")
DTYPE_ROLES: Final = ("stored", "compute", "reduce", "optimizer")

_MOST_PHASES: Final = 3  # in words


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """The cost on one rank. Peaks are increases over the value at entry.

    Args:
        rank: Global rank.
        node: Host name.
        host_anon_peak_bytes: Highest increase of anonymous host memory.
        device_peak_bytes: Highest increase of device memory; 0 where there is no device.
        shard_bytes: Bytes of the parameters and buffers that this rank keeps.
        storage_bytes: Bytes that this rank requested from storage.
        network_bytes: Bytes that this rank received from other ranks.
        retried_reads: Reads that were tried again after an error that was over in a moment.
        seconds: Wall-clock time on this rank.
    """

    rank: int
    node: str
    host_anon_peak_bytes: int
    device_peak_bytes: int
    shard_bytes: int
    storage_bytes: int
    network_bytes: int
    retried_reads: int
    seconds: float

    def __post_init__(self) -> None:
        where = f"rank report {self.rank}"
        _check_text(where, "node", self.node)
        for name in (
            "rank",
            "host_anon_peak_bytes",
            "device_peak_bytes",
            "shard_bytes",
            "storage_bytes",
            "network_bytes",
            "retried_reads",
        ):
            _check_count(where, name, getattr(self, name))
        _check_figure(where, "seconds", self.seconds)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ConfigurationError: A key is missing or unknown, or a value is not possible.
        """
        _check_keys("rank report", cls, document)
        return cls(**document)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """The cost of a load.

    Args:
        schema: Name and version of the JSON form.
        model: Directory, hub id or class name.
        strategy: What sharded the model.
        route: Who read what and how it reached the ranks.
        route_reason: Why it was this route.
        world_size: Number of ranks.
        seconds: Wall-clock time of the slowest rank.
        phases: Wall-clock seconds by phase name.
        storage_bytes: Bytes requested from storage, by all ranks together.
        network_bytes: Bytes moved between ranks, by all ranks together.
        predicted: What the plan had said, under the names of these fields; empty where there was no plan. `whole_tensor_bytes` is
            the most that one rank holds at a time, beside shard and staging, to make what `converted` names: sources and results
            of one conversion.
        tensors: Number of tensors by origin.
        origins: Origin of each tensor, by name.
        converted: Names of the tensors that a conversion made which had to see whole stored tensors: one rank held those.
        dtypes: Name of the dtype `stored`, for `compute`, for `reduce` and of the `optimizer` state; None where
            there is none.
        ranks: One entry per rank that reported, in the order of ranks.
    """

    schema: str = SCHEMA
    model: str
    strategy: str
    route: str
    route_reason: str
    world_size: int
    seconds: float
    phases: dict[str, float]
    storage_bytes: int
    network_bytes: int
    predicted: dict[str, float | int]
    tensors: dict[str, int]
    origins: dict[str, str]
    converted: tuple[str, ...]
    dtypes: dict[str, str | None]
    ranks: tuple[RankReport, ...]

    def __post_init__(self) -> None:
        where = "load report"
        if self.schema != SCHEMA:
            raise ConfigurationError(
                f"load report: expected schema {SCHEMA!r}, got {self.schema!r}. Write it with this version of shardwise."
            )
        for name in ("model", "strategy", "route", "route_reason"):
            _check_text(where, name, getattr(self, name))
        for name in ("world_size", "storage_bytes", "network_bytes"):
            _check_count(where, name, getattr(self, name))
        if self.world_size < 1:
            raise ConfigurationError("load report: expected world_size of 1 or more, got 0")
        _check_figure(where, "seconds", self.seconds)
        for field, figures in (("phases", self.phases), ("predicted", self.predicted)):
            for name, figure in figures.items():
                _check_figure(where, f"{field}[{name!r}]", figure)
        for origin, count in self.tensors.items():
            if origin not in ORIGINS:
                raise ConfigurationError(
                    f"load report: expected origins among {ORIGINS}, got {origin!r} in tensors"
                )
            _check_count(where, f"tensors[{origin!r}]", count)
        strange = sorted({origin for origin in self.origins.values() if origin not in ORIGINS})
        if strange:
            raise ConfigurationError(
                f"load report: expected origins among {ORIGINS}, got {strange} in origins"
            )
        if not all(isinstance(name, str) for name in self.converted):
            raise ConfigurationError(
                f"load report: expected names of tensors in converted, got {self.converted}"
            )
        if set(self.dtypes) != set(DTYPE_ROLES):
            raise ConfigurationError(
                f"load report: expected dtypes for {DTYPE_ROLES}, got them for {tuple(self.dtypes)}"
            )
        numbers = [report.rank for report in self.ranks]
        if numbers != sorted(set(numbers)) or (numbers and numbers[-1] >= self.world_size):
            raise ConfigurationError(
                f"load report: expected each rank below {self.world_size} at most once and in order, got {numbers}"
            )

    def __str__(self) -> str:
        """Say in a few lines what the load did cost; `to_json` has every figure."""
        worst: dict[str, int] = {
            name: max((getattr(report, name) for report in self.ranks), default=0)
            for name in ("shard_bytes", "host_anon_peak_bytes", "device_peak_bytes")
        }
        origins = ", ".join(f"{count} {origin}" for origin, count in self.tensors.items() if count)
        longest = sorted(self.phases.items(), key=lambda item: -item[1])[:_MOST_PHASES]
        return "\n".join(
            (
                f"{self.model}: {self.strategy}, route {self.route} ({self.route_reason}), {self.world_size} rank{'s' * (self.world_size != 1)}, "
                f"{self.seconds:.2f} s (longest phases: {', '.join(f'{name} {seconds:.2f}' for name, seconds in longest)})",
                f"worst rank: shard {_mebibytes(worst['shard_bytes'])}, peak of anonymous host memory "
                f"{_mebibytes(worst['host_anon_peak_bytes'])}, of device memory {_mebibytes(worst['device_peak_bytes'])}",
                f"all ranks: {_mebibytes(self.storage_bytes)} read from storage, {_mebibytes(self.network_bytes)} moved between "
                "ranks",
                f"tensors: {origins or 'none'}",
            )
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data for `json.dump`."""
        ranks = [dataclasses.asdict(report) for report in self.ranks]
        return {**dataclasses.asdict(self), "ranks": ranks, "converted": list(self.converted)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ConfigurationError: A key is missing or unknown, or a value is not possible.
        """
        _check_keys("load report", cls, document)
        ranks = tuple(RankReport.from_json(report) for report in document["ranks"])
        return cls(**{**document, "ranks": ranks, "converted": tuple(document["converted"])})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, whole or not at all; missing directories are made.

        Args:
            path: File to write; an existing one is replaced.
        """
        write_whole(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")


def _mebibytes(count_bytes: int) -> str:
    return f"{count_bytes / 2**20:,.1f} MiB"


def _check_keys(where: str, cls: type[LoadReport] | type[RankReport], document: Mapping[str, Any]) -> None:
    fields = {field.name for field in dataclasses.fields(cls)}
    missing, unknown = sorted(fields - set(document)), sorted(set(document) - fields)
    if missing or unknown:
        raise ConfigurationError(
            f"{where}: expected the keys {sorted(fields)}; missing: {missing}, unknown: {unknown}. "
            "Pass a document that to_json of the same version of shardwise made."
        )


def _check_text(where: str, name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"{where}: expected {name} to be a text that is not empty, got {value!r}")


def _check_count(where: str, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigurationError(f"{where}: expected {name} to be a whole number of 0 or more, got {value!r}")


def _check_figure(where: str, name: str, value: object) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < 0
    ):
        raise ConfigurationError(f"{where}: expected {name} to be a number of 0 or more, got {value!r}")
