"""How shards in host memory are kept: as pages of the file, or as copies."""

from __future__ import annotations

from typing import Literal, cast

from shardwise.errors import ConfigurationError

CpuStorage = Literal["auto", "map", "copy"]
CPU_STORAGE = ("auto", "map", "copy")


def checked_cpu_storage(cpu_storage: str, *, direct_io: bool) -> CpuStorage:
    """Return how shards of CPU ranks are kept.

    Args:
        cpu_storage: As the user says.
        direct_io: Whether files are to be read past the page cache, through which mapped pages come.

    Raises:
        ConfigurationError: It is no such way, or the two contradict each other.
    """
    if cpu_storage not in CPU_STORAGE:
        raise ConfigurationError(
            f"cpu_storage: expected one of {', '.join(CPU_STORAGE)}, got {cpu_storage!r}"
        )
    if direct_io and cpu_storage == "map":
        raise ConfigurationError(
            "direct_io=True and cpu_storage='map': expected one of them, got both. Mapped pages are pages of the page cache: use "
            "cpu_storage='copy', or leave direct_io out."
        )
    return "copy" if direct_io else cast(CpuStorage, cpu_storage)
