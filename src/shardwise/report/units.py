"""Bytes and seconds in words that a reader can compare at a glance."""

from __future__ import annotations

from typing import Final, Literal

ByteUnit = Literal["MiB", "GiB"]

UNIT_BYTES: Final[dict[ByteUnit, int]] = {"MiB": 1 << 20, "GiB": 1 << 30}
_GIB_FROM: Final = 4 << 30  # below, MiB tell more with as many digits


def unit_for(most_bytes: float) -> ByteUnit:
    """Return the unit in which figures up to `most_bytes` are short and still exact enough."""
    return "GiB" if most_bytes >= _GIB_FROM else "MiB"


def format_bytes(count_bytes: float, *, unit: ByteUnit | None) -> str:
    """Return a byte count with its unit, such as `1,442 MiB` or `5.31 GiB`.

    Args:
        count_bytes: Bytes.
        unit: The unit; None chooses it by size.
    """
    chosen = unit_for(abs(count_bytes)) if unit is None else unit
    return f"{format_number(count_bytes, unit=chosen)} {chosen}"


def format_number(count_bytes: float, *, unit: ByteUnit) -> str:
    """Return a byte count as a number of `unit`, without the unit's name."""
    value = count_bytes / UNIT_BYTES[unit]
    if unit == "GiB":
        return f"{value:,.2f}"
    return f"{value:.1f}" if 0 < abs(value) < 10 else f"{value:,.0f}"


def format_seconds(seconds: float) -> str:
    """Return seconds with as many decimals as matter, without the unit's name."""
    if seconds >= 100:
        return f"{seconds:,.0f}"
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.2f}"
