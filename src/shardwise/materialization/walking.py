"""Walks over a model's modules.

`nn.Module.modules()` resumes a generator for each module and each level above it, and everything that lists parameters goes through
it; a wrap walks its model several times, and a model may have tens of thousands of modules.
"""

from __future__ import annotations

from torch import nn

from shardwise.materialization.names import WRAPPERS


def named_modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what `model.named_modules()` yields: each module once, by the first of its names."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    left: list[tuple[str, nn.Module]] = [("", model)]
    while left:
        name, module = of = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append(of)
        if module._modules:
            prefix = f"{name}." if name else ""
            children = [(prefix + key, child) for key, child in module._modules.items() if child is not None]
            children.reverse()
            left += children
    return found


def modules_by_prefix(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return every place of every module, as `model.named_modules(remove_duplicate=False)` does.

    Returns:
        Modules with what the names of their tensors begin with, free of wrappers' parts: empty, or ending in a dot.
    """
    found: list[tuple[str, nn.Module]] = []
    left: list[tuple[str, nn.Module]] = [("", model)]
    while left:
        prefix, module = of = left.pop()
        found.append(of)
        if module._modules:
            children = [
                (prefix if key in WRAPPERS else f"{prefix}{key}.", child)
                for key, child in module._modules.items()
                if child is not None
            ]
            children.reverse()
            left += children
    return found


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """Return what `model.parameters()` yields: each parameter once."""
    found: dict[int, nn.Parameter] = {}
    for _, module in named_modules_of(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), parameter)
    return list(found.values())
