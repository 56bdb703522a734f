"""On what a comparison was made, for its document."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

_PACKAGES: Final = ("shardwise", "torch", "transformers", "accelerate", "safetensors", "numpy")


def describe_environment() -> dict[str, Any]:
    """Return versions (None for what is not installed), platform and number of usable processors."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "platform": platform.platform(),
        "cpus": usable_cpus(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def usable_cpus() -> int:
    """Return the number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
