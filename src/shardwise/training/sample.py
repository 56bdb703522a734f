"""A text to try training with, which comes with the package."""

from __future__ import annotations

from pathlib import Path


def sample_text() -> Path:
    """Return the file: about 20 KB of prose, written for this project."""
    return Path(__file__).with_name("sample.txt")
