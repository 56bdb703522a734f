"""Values for buffers that no checkpoint holds: given, or made again by their module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from shardwise.errors import ConfigurationError, LeftOnMetaError, ShapeMismatchError, listed
from shardwise.materialization.comparable import Comparable
from shardwise.materialization.comparing import comparable_digests, digest_of
from shardwise.materialization.rerun import make_again
from shardwise.materialization.rules import buffer_rules
from shardwise.materialization.structure import Entry

Buffers = Mapping[str, torch.Tensor] | Callable[[str, torch.Tensor], torch.Tensor | None] | None
_SEED = 0


def fill_buffers(
    model: nn.Module,
    entries: Sequence[Entry],
    buffers: Buffers,
    *,
    bound: Collection[str],
    device: torch.device,
) -> tuple[str, ...]:
    """Give every buffer on meta its values unless a checkpoint has them, and put all buffers on one device.

    Args:
        model: Sharded or not.
        entries: Of the model.
        buffers: Values by name, or a function from name and meta tensor to values, or to None where it has none.
        bound: Names of buffers that a checkpoint holds.
        device: Where buffers go.

    Returns:
        Fqns of the buffers that got values: given, or made again. The others keep theirs, or get a checkpoint's.

    Raises:
        LeftOnMetaError: Listing buffers that nothing gives values.
        ConfigurationError: A value for something that is no buffer of the model.
        ShapeMismatchError: A value of another shape.
    """
    of_buffers = [entry for entry in entries if entry.role == "buffer"]
    if isinstance(buffers, Mapping):
        _refuse_unknown(buffers, of_buffers)
    values: dict[int, torch.Tensor] = {}
    without: list[Entry] = []
    for entry in of_buffers:
        given = _given(entry, buffers)
        if given is not None:
            values[id(entry.tensor)] = given
        elif entry.tensor.is_meta and entry.fqn not in bound:
            without.append(entry)

    def keep(entry: Entry, made: torch.Tensor) -> None:
        values[id(entry.tensor)] = made.to(entry.tensor.dtype)

    left = make_again(
        model,
        without,
        rules_of=lambda fqn, _: buffer_rules(model, fqn),
        seed_of=lambda _: _SEED,
        place=keep,
    )
    if left:
        raise LeftOnMetaError(
            f"expected values for every buffer, got none for {listed([e.fqn for e in left])}: they are on meta, no checkpoint holds them, "
            "and their module does not make them again. Pass buffers= (values by name, or a function), give the module a "
            "reset_buffers method, or build buffers off meta, as accelerate.init_empty_weights does, which transformers 4.57 needs."
        )
    filled = tuple(entry.fqn for entry in of_buffers if id(entry.tensor) in values)
    _put(entries, values, device)
    return filled


def equal_buffers(entries: Iterable[Entry], *, but: Collection[str]) -> Comparable:
    """Return what makes ranks compare their buffers' values, except those named."""
    digests = {
        entry.fqn: digest_of(entry.tensor, kind=f"{entry.tensor.dtype} {tuple(entry.tensor.shape)} ")
        for entry in entries
        if entry.role == "buffer" and entry.fqn not in but and not entry.tensor.is_meta
    }
    return comparable_digests(
        "the values of a buffer",
        digests,
        explain=lambda names: "they differ in " + listed(names),
        remedy=(
            "Buffers are not sharded, so every rank must hold the same. Give them with buffers=, or build the model in the "
            "same way, and from the same seed, on every rank; load_pretrained(defer=False) takes global rank 0's."
        ),
    )


def _given(entry: Entry, buffers: Buffers) -> torch.Tensor | None:
    if buffers is None:
        return None
    if isinstance(buffers, Mapping):
        names = [slot.fqn for slot in entry.slots if slot.fqn in buffers]
        value = buffers[names[0]] if names else None
    else:
        value = buffers(entry.fqn, entry.tensor)
    if value is None:
        return None
    if value.shape != entry.tensor.shape:
        raise ShapeMismatchError(
            f"buffers: {entry.fqn}: expected {tuple(entry.tensor.shape)} from the model, got {tuple(value.shape)}. Pass the "
            "buffer as the model registers it."
        )
    return value.detach().to(entry.tensor.dtype)


def _refuse_unknown(buffers: Mapping[str, torch.Tensor], entries: list[Entry]) -> None:
    known = {slot.fqn for entry in entries for slot in entry.slots}
    unknown = [name for name in buffers if name not in known]
    if unknown:
        raise ConfigurationError(
            f"buffers: expected names of the model's buffers as keys, got {listed(unknown)}. Parameters come from the "
            "checkpoint; rename= says under which name."
        )


def _put(entries: Iterable[Entry], values: dict[int, torch.Tensor], device: torch.device) -> None:
    """Replace buffers in all their places, plain attributes that are the same tensor included."""
    others = [entry for entry in entries if entry.role != "parameter"]
    for entry in others:
        if entry.role == "buffer" and not entry.tensor.is_meta:
            values.setdefault(id(entry.tensor), entry.tensor)
    on_device = {key: value.to(device) for key, value in values.items()}
    for entry in others:
        if id(entry.tensor) in on_device:
            entry.replace(on_device[id(entry.tensor)])
