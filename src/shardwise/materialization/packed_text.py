"""Long texts for the process group's store, compressed."""

from __future__ import annotations

import base64
import zlib


def packed(text: str) -> str:
    """Return a text in few characters."""
    return base64.b64encode(zlib.compress(text.encode(), level=1)).decode()


def unpacked(text: str) -> str:
    """Return what was packed."""
    return zlib.decompress(base64.b64decode(text)).decode()
