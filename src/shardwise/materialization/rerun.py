"""A module's own way to make its values again: what transformers, torch and their users call for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from shardwise.materialization.structure import Entry

_POISON = (0xFF, 0x55)  # as floats: not a number, and a number that nothing computes


def own_rerun(model: nn.Module, fqn: str, *, buffers_only: bool) -> Callable[[], None] | None:
    """Return what makes the values of a module again, or None if it offers nothing.

    Args:
        model: That the module is a part of.
        fqn: Of the module; empty for the model itself.
        buffers_only: Whether buffers alone are wanted. `reset_parameters` then counts only for a module without
            parameters of its own: it would make those.

    Returns:
        `_init_weights` of the transformers model around the module, else the module's `reset_buffers` or
        `reset_parameters`.
    """
    module = model.get_submodule(fqn)
    parts = fqn.split(".") if fqn else []
    for depth in range(len(parts), -1, -1):
        around = model.get_submodule(".".join(parts[:depth]))
        init_weights = getattr(around, "_init_weights", None)
        if callable(init_weights):
            return lambda: init_weights(module)
    names = ["reset_buffers"] if buffers_only else []
    if not buffers_only or not any(True for _ in module.parameters(recurse=False)):
        names.append("reset_parameters")
    for name in names:
        method = getattr(module, name, None)
        if callable(method):
            return method  # type: ignore[no-any-return]
    return None


def made_by_modules(
    model: nn.Module, entries: Iterable[Entry], *, buffers_only: bool, seed_of: Callable[[str], int]
) -> Iterator[tuple[Entry, torch.Tensor | None]]:
    """Let modules make tensors again, one module at a time.

    Args:
        model: That the modules are parts of.
        entries: What is wanted.
        buffers_only: As `own_rerun` takes it.
        seed_of: From a module's fqn to the seed of its random numbers; equal on all ranks.

    Yields:
        Each entry and its full value on the host, or None where its module does not make it.
    """
    by_module: dict[int, list[Entry]] = {}
    for entry in entries:
        by_module.setdefault(id(entry.slots[0].module), []).append(entry)
    fqn_of = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    for of_module in by_module.values():
        module = of_module[0].slots[0].module
        fqn = fqn_of[id(module)]
        rerun = own_rerun(model, fqn, buffers_only=buffers_only)
        made: dict[str, torch.Tensor] = {}
        if rerun is not None:
            names = {entry.slots[0].name: entry.tensor for entry in of_module}
            made = made_again(module, names, rerun, seed=seed_of(fqn))
        for entry in of_module:
            yield entry, made.get(entry.slots[0].name)


def made_again(
    module: nn.Module, names: Mapping[str, torch.Tensor], rerun: Callable[[], None], *, seed: int
) -> dict[str, torch.Tensor]:
    """Let a module make some of its own tensors again, whole and on the host.

    It runs twice over memory that held different bytes before: what comes out different was not written.

    Args:
        module: The others of its parameters are on meta meanwhile, so that nothing happens to them.
        names: Its own parameters and buffers that are wanted, by their names in the module.
        rerun: As `own_rerun` returned.
        seed: Of the random numbers; equal on all ranks.

    Returns:
        The values by name; what the module did not write is not among them.
    """
    runs = []
    for poison in _POISON:
        with _only(module, names, poison) as tensors, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # What it makes on the way is on the host too, whatever torch's default device is.
            with torch.no_grad(), torch.device("cpu"):
                rerun()
            # A module may put a new tensor in the place of its old one.
            runs.append({name: _registered(module, name, tensors[name]).detach() for name in names})
    return {name: value for name, value in runs[1].items() if _same_bytes(runs[0][name], value)}


@contextmanager
def _only(
    module: nn.Module, names: Mapping[str, torch.Tensor], poison: int
) -> Iterator[dict[str, torch.Tensor]]:
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    attributes = {k: v for k, v in vars(module).items() if isinstance(v, torch.Tensor)}
    made: dict[str, torch.Tensor] = {}
    try:
        for name, parameter in parameters.items():
            if parameter is not None:
                whole = _blank(parameter, poison) if name in names else _on_meta(parameter)
                module._parameters[name] = nn.Parameter(whole, requires_grad=False)
                made[name] = module._parameters[name]  # type: ignore[assignment]
        for name, buffer in buffers.items():
            if buffer is not None:
                module._buffers[name] = _blank(buffer, poison) if name in names else buffer.detach().clone()
                made[name] = module._buffers[name]  # type: ignore[assignment]
        yield made
    finally:
        module._parameters.clear()
        module._parameters.update(parameters)
        module._buffers.clear()
        module._buffers.update(buffers)
        vars(module).update(attributes)


def _blank(like: torch.Tensor, poison: int) -> torch.Tensor:
    blank = torch.empty(like.shape, dtype=like.dtype, device="cpu")
    if blank.dtype == torch.bool:
        return blank.fill_(poison == _POISON[0])
    blank.view(-1).view(torch.uint8).fill_(poison)
    return blank


def _on_meta(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device="meta")


def _registered(module: nn.Module, name: str, made: torch.Tensor) -> torch.Tensor:
    found = module._parameters.get(name, module._buffers.get(name))
    return made if found is None else found


def _same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(_bytes_of(first), _bytes_of(second))


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
