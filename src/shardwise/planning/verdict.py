"""Whether something fits, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

_GIBIBYTE = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What is needed at most.

    Args:
        load_host_bytes: Of a node's memory, while a model is loaded.
        load_device_bytes: Of a device's memory, while a model is loaded.
        training_host_bytes: Of a node's memory, while it is trained.
        training_device_bytes: Of a device's memory, while it is trained.
    """

    load_host_bytes: int
    load_device_bytes: int
    training_host_bytes: int
    training_device_bytes: int

    @property
    def host_bytes(self) -> int:
        """Of a node's memory."""
        return max(self.load_host_bytes, self.training_host_bytes)

    @property
    def device_bytes(self) -> int:
        """Of a device's memory."""
        return max(self.load_device_bytes, self.training_device_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What there is; None where nobody said.

    Args:
        host_bytes: Memory of a node.
        device_bytes: Memory of a device.
    """

    host_bytes: int | None
    device_bytes: int | None

    @property
    def given(self) -> bool:
        """Whether anything was said."""
        return self.host_bytes is not None or self.device_bytes is not None

    def fits(self, need: Need) -> bool:
        """Return whether a need is within them."""
        return not self.lacking(need)

    def lacking(self, need: Need) -> list[Lack]:
        """Return what is not enough for a need."""
        pairs = (
            (
                "host memory of a node",
                need.host_bytes,
                self.host_bytes,
                need.load_host_bytes >= need.training_host_bytes,
            ),
            (
                "device",
                need.device_bytes,
                self.device_bytes,
                need.load_device_bytes >= need.training_device_bytes,
            ),
        )
        return [
            Lack(where=where, need_bytes=needed, limit_bytes=limit, at_load=at_load)
            for where, needed, limit, at_load in pairs
            if limit is not None and needed > limit
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """A memory that is too small.

    Args:
        where: Which memory.
        need_bytes: What is needed of it at most.
        limit_bytes: What there is of it.
        at_load: Whether the most is needed while the model is loaded, and not in training.
    """

    where: str
    need_bytes: int
    limit_bytes: int
    at_load: bool

    def __str__(self) -> str:
        """Say it as `16.4 of 15.0 GiB on device, in training`."""
        when = "at load" if self.at_load else "in training"
        where = f"on {self.where}" if self.where == "device" else f"of {self.where}"
        return f"{_number(self.need_bytes)} of {_number(self.limit_bytes)} GiB {where}, {when}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether something fits.

    Args:
        fits: Whether it does.
        text: In one sentence, with what would help where it does not.
    """

    fits: bool
    text: str


Alternative = tuple[str, Callable[[], Need]]
"""What to change, in the words of the command line, and the function that works out what is needed then."""


def verdict(need: Need, limits: Limits, alternatives: Iterable[Alternative]) -> Verdict:
    """Say whether a need is within limits; where it is not, try one change after the other until one makes it fit.

    Args:
        need: What is needed.
        limits: What there is, at least one of the two.
        alternatives: Changes, in the order in which they are tried.
    """
    lacks = limits.lacking(need)
    if not lacks:
        return Verdict(fits=True, text=f"fits: {_within(need, limits)}")
    text = "does not fit: " + " and ".join(map(str, lacks))
    tried: list[str] = []
    for change, needed in alternatives:
        then = needed()
        still = limits.lacking(then)
        figures = ", ".join(_number(_of(lack.where, then)) for lack in lacks)
        tried.append(f"with {change}: {figures}{' (still too much)' if still else ''}")
        if not still:
            break
    return Verdict(fits=False, text="; ".join([text, *tried]))


def _of(where: str, need: Need) -> int:
    return need.device_bytes if where == "device" else need.host_bytes


def _within(need: Need, limits: Limits) -> str:
    found = []
    if limits.host_bytes is not None:
        found.append(
            f"{_number(need.host_bytes)} of {_number(limits.host_bytes)} GiB of host memory of a node"
        )
    if limits.device_bytes is not None:
        found.append(f"{_number(need.device_bytes)} of {_number(limits.device_bytes)} GiB on device")
    return ", ".join(found)


def _number(nbytes: int) -> str:
    gibibytes = nbytes / _GIBIBYTE
    return f"{gibibytes:,.1f}" if gibibytes >= 1 else f"{gibibytes:.2g}"
