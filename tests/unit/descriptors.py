"""Open descriptors of files that a test knows; what else is open may be another test's, and be collected meanwhile."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def open_in(place: Path) -> list[Path]:
    """Return the file of each open descriptor of a file, or of those below a directory; none where the system does not tell."""
    place, found = place.resolve(), []
    if os.path.isdir("/proc/self/fd"):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                file = Path(os.readlink(f"/proc/self/fd/{name}"))
                if file.is_relative_to(place):
                    found.append(file)
    return sorted(found)
