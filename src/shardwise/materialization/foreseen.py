"""Which parameters no rule would initialise: tried on meta first, so that few modules run on values to find out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.materialization.rerun import RulesOf, make_again, modules_of, seeded
from shardwise.materialization.shield import Shield, registered
from shardwise.materialization.structure import Entry


def uninitialised(model: nn.Module, entries: Iterable[Entry], *, rules_of: RulesOf) -> list[Entry]:
    """Return the parameters that no rule would write.

    A rule that cannot run on meta may need values, which only initialising has: what it is for is not among them.

    Args:
        model: Sharded or not; it stays as it is.
        entries: Of parameters that are to be initialised.
        rules_of: As `make_again` takes it.

    Raises:
        ModelError: A module's own code failed on values.
    """
    left = _unwritten_on_meta(model, entries, rules_of)
    # On meta some of torch's functions do nothing, such as trunc_normal_.
    return (
        make_again(model, left, rules_of=rules_of, seed_of=lambda _: 0, place=lambda *_: None) if left else []
    )


def _unwritten_on_meta(model: nn.Module, entries: Iterable[Entry], rules_of: RulesOf) -> list[Entry]:
    left: list[Entry] = []
    with Shield(model) as shield, torch.no_grad(), seeded(0), torch.device("meta"):
        for fqn, module, wanted in modules_of(model, entries):
            for rule in rules_of(fqn, [entry.slots[0].name for entry in wanted]):
                blanks = [(entry, _on_meta(entry)) for entry in wanted]
                before = [_storage_of(blank) for _, blank in blanks]
                with shield.exposing(module, blanks), _Writes() as writes:
                    try:
                        for call in rule.calls:
                            call()
                    except Exception:  # of somebody else's code
                        wanted = []
                        break
                    after = [_storage_of(tensor) for e, _ in blanks if (tensor := registered(e)) is not None]
                wanted = [
                    e
                    for (e, _), storage, now in zip(blanks, before, after, strict=True)
                    if now == storage and storage not in writes.reached
                ]
            left += wanted
    return left


def _on_meta(entry: Entry) -> nn.Parameter:
    blank = torch.empty(entry.tensor.shape, dtype=entry.tensor.dtype, device="meta")
    return nn.Parameter(blank, requires_grad=False)


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the storages that operations write to; a tensor's own count of them leaves out those through `.data`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reached: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for at, argument in enumerate(func._schema.arguments):
            value = args[at] if at < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.reached |= {_storage_of(each) for each in _tensors_in(value)}
        return func(*args, **kwargs)


def _tensors_in(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [each for each in values if isinstance(each, torch.Tensor)]


def _storage_of(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
