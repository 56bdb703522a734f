"""What an export did cost, on each rank and together."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

from shardwise.errors import listed
from shardwise.materialization.agreement import Agreement
from shardwise.profiling import MemoryProfile, own_node

SCHEMA: Final = "shardwise.export_report/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankExport:
    """The cost on one rank.

    Args:
        rank: Global rank.
        node: Host name.
        written_bytes: Of tensors, by this rank.
        network_bytes: That this rank received from others to write it.
        host_anon_peak_bytes: Highest increase of anonymous host memory over the value at entry.
        device_peak_bytes: The same of device memory; 0 where there is no device.
        seconds: Wall-clock time on this rank.
    """

    rank: int
    node: str
    written_bytes: int
    network_bytes: int
    host_anon_peak_bytes: int
    device_peak_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What an export has written.

    Args:
        schema: Name and version of the JSON form.
        directory: That holds it.
        kind: `"model"`, or `"adapter"` for the adapter of a PEFT model alone.
        world_size: Number of ranks that took part.
        writers: Ranks that saw the directory and wrote.
        files: Size in bytes of each file that holds tensors, by name.
        tensors: Number of tensors in them.
        dtypes: Number of tensors by the name of their dtype.
        whole: Checkpoint names of the tensors that a conversion made of whole ones, which one rank held.
        seconds: Wall-clock time of the slowest rank.
        phases: Wall-clock seconds by phase name.
        written_bytes: Of tensors, by all ranks together.
        network_bytes: Moved between ranks, by all ranks together.
        ranks: One entry per rank, in their order.
    """

    schema: str = SCHEMA
    directory: str
    kind: str
    world_size: int
    writers: tuple[int, ...]
    files: dict[str, int]
    tensors: int
    dtypes: dict[str, int]
    whole: tuple[str, ...]
    seconds: float
    phases: dict[str, float]
    written_bytes: int
    network_bytes: int
    ranks: tuple[RankExport, ...]

    def summary(self) -> str:
        """Say in a few lines what was written, and what it did cost."""
        peak = max(of.host_anon_peak_bytes for of in self.ranks)
        dtypes = ", ".join(f"{count} {name}" for name, count in self.dtypes.items())
        longest = sorted(self.phases.items(), key=lambda item: -item[1])[:3]
        lines = [
            f"{self.directory}: {self.kind}, {_counted(self.tensors, 'tensor')} ({dtypes}) in "
            f"{_counted(len(self.files), 'file')}, {_mebibytes(sum(self.files.values()))}",
            f"{_counted(self.world_size, 'rank')}, {len(self.writers)} of them wrote, {self.seconds:.2f} s (longest phases: "
            f"{', '.join(f'{name} {seconds:.2f}' for name, seconds in longest)})",
            f"{_mebibytes(self.network_bytes)} moved between ranks; worst rank: peak of anonymous host memory {_mebibytes(peak)}",
        ]
        if self.whole:
            lines.append(f"made of whole tensors: {listed(self.whole)}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data for `json.dump`."""
        return {
            **asdict(self),
            "writers": list(self.writers),
            "whole": list(self.whole),
            "ranks": [asdict(each) for each in self.ranks],
        }


def gathered_ranks(
    agreement: Agreement, profile: MemoryProfile, *, written_bytes: int, network_bytes: int
) -> tuple[RankExport, ...]:
    """Return every rank's cost. All ranks call this together, within a phase.

    Args:
        agreement: Of the call.
        profile: Of this rank.
        written_bytes: By this rank.
        network_bytes: Received by this rank.
    """
    own = RankExport(
        rank=agreement.rank,
        node=own_node(),
        written_bytes=written_bytes,
        network_bytes=network_bytes,
        host_anon_peak_bytes=profile.anon_peak_bytes,
        device_peak_bytes=profile.device_peak_bytes,
        seconds=profile.seconds,
    )
    return tuple(
        RankExport(**json.loads(text)) for text in agreement.gather("report", json.dumps(asdict(own)))
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _mebibytes(count_bytes: int) -> str:
    return f"{count_bytes / 2**20:,.1f} MiB"
