"""How many CPUs a process may use, which of them are near a device, and how many threads read for it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch

from shardwise.errors import ConfigurationError

READ_THREADS_VARIABLE: Final = "SHARDWISE_READ_THREADS"
_FEWEST_THREADS, _MOST_THREADS = 2, 16
_SYSTEM: Final = Path("/")


def device_read_threads(*, cpus: int, of_node: int, environ: Mapping[str, str]) -> int:
    """Return how many threads read a rank's bytes into pinned memory: its part of the CPUs, since reading from the page cache is copying.

    Args:
        cpus: That this process may use. They may be its own already: launchers bind ranks to some.
        of_node: That all ranks of the node may use together.
        environ: `SHARDWISE_READ_THREADS` in it wins; `LOCAL_WORLD_SIZE` says how many ranks the node has.

    Raises:
        ConfigurationError: The variable is not a number of threads.
    """
    asked = positive_from(environ, READ_THREADS_VARIABLE)
    if asked is not None:
        return asked
    local_ranks = environ.get("LOCAL_WORLD_SIZE", "1")
    share = of_node // max(1, int(local_ranks) if local_ranks.isdigit() else 1)
    return max(_FEWEST_THREADS, min(_MOST_THREADS, share, cpus))


def positive_from(environ: Mapping[str, str], name: str) -> int | None:
    """Return the whole number above 0 that an environment variable holds; None where it is not set.

    Raises:
        ConfigurationError: It holds something else.
    """
    text = environ.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigurationError(
            f"{name}: expected a whole number above 0, got {text!r}. Unset it for the default."
        )
    return int(text)


def usable_cpus(system: Path = _SYSTEM) -> int:
    """Return the number of CPUs that this process may use at a time: those of its affinity, or fewer where its cgroup has less time.

    Args:
        system: Root of the file system; another one in tests.
    """
    by_affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([by_affinity, *map(math.ceil, _cgroup_limits(system))]))


def cpus_of_node(system: Path = _SYSTEM) -> int:
    """Return the number of CPUs that all processes of this job may use at a time on this node: what its cgroups leave it.

    Args:
        system: Root of the file system; another one in tests.
    """
    limits = map(math.ceil, _cgroup_limits(system))
    return max(1, min([os.cpu_count() or 1, *limits, *_cpuset_sizes(system)]))


def usable_of(near: frozenset[int] | None, system: Path = _SYSTEM) -> int:
    """Return how many CPUs threads may use at a time that keep to some.

    Args:
        near: On which they run; None: on any.
        system: Root of the file system; another one in tests.
    """
    usable = usable_cpus(system)
    return min(usable, len(near)) if near else usable


def _groups_around(system: Path, controller: str) -> Iterator[Path]:
    """Yield the paths of the groups around this process, of both versions of cgroups, which may be in use side by side."""
    found = {Path()}
    with suppress(OSError):
        for line in (system / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" or controller in controllers.split(","):
                own = Path(path.strip("/"))
                found |= {own, *own.parents}
    yield from found


def _cpuset_sizes(system: Path) -> Iterator[int]:
    """Yield how many CPUs each group around this process may run on; none where that is not said."""
    for inside in _groups_around(system, "cpuset"):
        for name in (inside / "cpuset.cpus.effective", "cpuset" / inside / "cpuset.effective_cpus"):
            with suppress(OSError, ValueError):
                size = len(parsed_cpus((system / "sys/fs/cgroup" / name).read_text()))
                if size:
                    yield size


def _cgroup_limits(system: Path) -> Iterator[float]:
    """Yield the CPUs' worth of time that each group around this process has; none where there is no limit."""
    for inside in _groups_around(system, "cpu"):
        with suppress(OSError, ValueError):
            quota, period = (system / "sys/fs/cgroup" / inside / "cpu.max").read_text().split()
            yield float(quota) / float(period)  # "max" is no number
        with suppress(OSError, ValueError):
            group = system / "sys/fs/cgroup/cpu" / inside  # the first version of cgroups
            allowed = float((group / "cpu.cfs_quota_us").read_text())
            if allowed > 0:
                yield allowed / float((group / "cpu.cfs_period_us").read_text())


def cpus_near(device: torch.device, system: Path = _SYSTEM) -> frozenset[int] | None:
    """Return the CPUs of this process's that are on the device's side of the machine; None where the system does not tell, or all are.

    Args:
        device: An accelerator.
        system: Root of the file system; another one in tests.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    try:
        properties = torch.get_device_module(device).get_device_properties(device)
        address = (
            f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        )
        listed = parsed_cpus((system / "sys/bus/pci/devices" / address / "local_cpulist").read_text())
    except (AttributeError, OSError, RuntimeError, TypeError, ValueError):
        return None  # without it threads run anywhere, which is slower and not wrong
    return near_of(listed, frozenset(os.sched_getaffinity(0)))


def keep_to(cpus: frozenset[int] | None) -> None:
    """Let the calling thread run on some CPUs only.

    Args:
        cpus: None leaves it alone.
    """
    if cpus is not None:
        with suppress(OSError):  # they may have been taken away meanwhile
            os.sched_setaffinity(0, cpus)


def near_of(listed: frozenset[int], allowed: frozenset[int]) -> frozenset[int] | None:
    """Return the allowed CPUs that are listed; None where these are all or none, and there is nothing to choose."""
    near = listed & allowed
    return near if near and near != allowed else None


def parsed_cpus(text: str) -> frozenset[int]:
    """Return the numbers of a list as `0-3,8`.

    Raises:
        ValueError: It is no such list.
    """
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        found.update(range(int(low), int(high or low) + 1))
    return frozenset(found)
