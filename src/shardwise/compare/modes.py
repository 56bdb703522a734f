"""The ways to bring a model up that are compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from shardwise.errors import ConfigurationError

StrategyName = Literal["native_fsdp", "accelerate", "peer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One way to bring a model up.

    Args:
        name: What the user calls it.
        strategy: Which strategy shards the model; `"peer"`: another library does, in a way of the mode's name.
        memory_efficient_init: Whether no rank loads the whole model, or the source rank alone does.
        route: Of the strategy; `"auto"` is the one that it chooses.
    """

    name: str
    strategy: StrategyName
    memory_efficient_init: bool
    route: str = "auto"


DEFAULT_MODES: Final = ("native-eager", "native-efficient", "accelerate-eager", "accelerate-efficient")
# Not imported from the planner: help is to come without torch.
ROUTES_BY_NAME: Final = ("direct", "replicate", "node", "rank0", "striped")
ROUTE_NAMES: Final = tuple(f"native-{route}" for route in ROUTES_BY_NAME)
PEER_NAMES: Final = (
    "transformers-distributed",
    "dcp-reader",
    "set-model-state-dict",
    "accelerate-stock",
)


def _on_each_route(prefix: str, strategy: StrategyName) -> Iterator[Mode]:
    for route in ROUTES_BY_NAME:
        yield Mode(name=f"{prefix}-{route}", strategy=strategy, memory_efficient_init=True, route=route)


MODES: Final[Mapping[str, Mode]] = MappingProxyType(
    {
        mode.name: mode
        for mode in (
            Mode(name="native-eager", strategy="native_fsdp", memory_efficient_init=False),
            Mode(name="native-efficient", strategy="native_fsdp", memory_efficient_init=True),
            Mode(name="accelerate-eager", strategy="accelerate", memory_efficient_init=False),
            Mode(name="accelerate-efficient", strategy="accelerate", memory_efficient_init=True),
            *_on_each_route("native", "native_fsdp"),
            *_on_each_route("accelerate", "accelerate"),
            *(Mode(name=name, strategy="peer", memory_efficient_init=False) for name in PEER_NAMES),
        )
    }
)


def modes_named(names: Iterable[str]) -> tuple[Mode, ...]:
    """Return the modes of these names, in their order, each once; the four default ones for no name.

    Raises:
        ConfigurationError: A name is not that of a mode.
    """
    asked = tuple(dict.fromkeys(names))
    unknown = [name for name in asked if name not in MODES]
    if unknown:
        raise ConfigurationError(
            f"mode: expected one of {', '.join(MODES)}, got {', '.join(map(repr, unknown))}. "
            "Give one of these names, several of them, or none for the first four."
        )
    return tuple(MODES[name] for name in asked or DEFAULT_MODES)
