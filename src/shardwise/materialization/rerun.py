"""Let modules make values of their own tensors again, whole and on the host, one module at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shardwise.errors import ModelError
from shardwise.materialization.collector import resting_collector
from shardwise.materialization.freed import give_back_freed
from shardwise.materialization.rules import Rule
from shardwise.materialization.shield import Shield, registered
from shardwise.materialization.structure import Entry
from shardwise.materialization.walking import named_modules_of

_POISON = (0xFF, 0x55)  # as floats: not a number, and a number that nothing computes

_LARGE_BYTES = 2**24

RulesOf = Callable[[str, Sequence[str]], Sequence[Rule]]


def make_again(
    model: nn.Module,
    entries: Iterable[Entry],
    *,
    rules_of: RulesOf,
    seed_of: Callable[[str], int],
    place: Callable[[Entry, torch.Tensor], None],
) -> list[Entry]:
    """Let modules make tensors again; the rest of the model cannot change meanwhile.

    Each module runs twice over memory that held different bytes before: what comes out different was not written, or was
    drawn from random numbers other than torch's own on the host. Of the first run digests alone are kept, so there is
    never more than one copy of one module's wanted tensors.

    Args:
        model: That the modules are parts of; sharded or not.
        entries: What is wanted.
        rules_of: From a module's fqn and the names of its wanted tensors to the rules to try in turn.
        seed_of: From the fqn of a rule's owner to the seed of its random numbers; equal on all ranks.
        place: Takes the full value of an entry, on the host, and keeps what it wants of it.

    Returns:
        Those that no rule wrote.

    Raises:
        ModelError: A module's own code failed, as it does where it needs the values of other tensors.
    """
    left: list[Entry] = []
    entries = list(entries)
    if not entries:
        return left  # a shield around very many tensors takes its time
    with Shield(model) as shield:
        for fqn, module, wanted in modules_of(model, entries):
            for rule in rules_of(fqn, [entry.slots[0].name for entry in wanted]):
                if wanted:
                    made = _made_by(rule, shield, fqn, module, wanted, seed=seed_of(rule.owner))
                    wanted = [entry for entry in wanted if entry.fqn not in made]
                    for entry, value in made.values():
                        place(entry, value)
                    made.clear()  # before the next one is made
                    entry = value = None  # type: ignore[assignment]
            left += wanted
    return left


def owners_of(model: nn.Module, entries: Iterable[Entry]) -> list[tuple[str, list[str]]]:
    """Return the fqns of the modules that have tensors, and the names that these have there."""
    return [(fqn, [e.slots[0].name for e in owned]) for fqn, _, owned in modules_of(model, entries)]


def modules_of(model: nn.Module, entries: Iterable[Entry]) -> Iterator[tuple[str, nn.Module, list[Entry]]]:
    """Yield the modules that own tensors, each with its fqn and those of the entries that are its own."""
    owned: dict[int, list[Entry]] = {}
    for entry in entries:
        owned.setdefault(id(entry.slots[0].module), []).append(entry)
    with resting_collector():
        fqn_of = {id(module): fqn for fqn, module in named_modules_of(model)}
    for key, of_module in owned.items():
        yield fqn_of[key], of_module[0].slots[0].module, of_module


def _made_by(
    rule: Rule, shield: Shield, fqn: str, module: nn.Module, wanted: Sequence[Entry], *, seed: int
) -> dict[str, tuple[Entry, torch.Tensor]]:
    """Return what a rule writes, by fqn."""
    first = {
        e.fqn: _digest_of(value) for e, value in _run(rule, shield, fqn, module, wanted, _POISON[0], seed)
    }
    again = _run(rule, shield, fqn, module, wanted, _POISON[1], seed)
    return {entry.fqn: (entry, value) for entry, value in again if _digest_of(value) == first[entry.fqn]}


def _run(
    rule: Rule, shield: Shield, fqn: str, module: nn.Module, wanted: Sequence[Entry], poison: int, seed: int
) -> list[tuple[Entry, torch.Tensor]]:
    if sum(entry.tensor.nbytes for entry in wanted) >= _LARGE_BYTES:
        give_back_freed()  # else the last run's memory stays, where the C library had a large gap for it
    blanks = [(entry, _blank(entry, poison)) for entry in wanted]
    # Code that names no device means the host here, whatever the caller's default is.
    with shield.exposing(module, blanks), torch.no_grad(), seeded(seed), torch.device("cpu"):
        for call in rule.calls:
            try:
                call()
            except RuntimeError as error:
                raise _failure(fqn, module, wanted, error) from error
        found = ((entry, registered(entry)) for entry in wanted)
        return [(entry, value.detach()) for entry, value in found if value is not None and not value.is_meta]


def _failure(fqn: str, module: nn.Module, wanted: Sequence[Entry], error: RuntimeError) -> ModelError:
    return ModelError(
        f"{fqn or 'the model'} ({type(module).__name__}): expected its own code to make "
        f"{', '.join(entry.slots[0].name for entry in wanted)} from shapes and random numbers, got {error}. All other "
        "tensors are on meta while it runs. If it needs their values, load with load_pretrained(defer=False), or build the "
        "model with values."
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers on the host from a seed while the context is open; afterwards they go on as before."""
    # torch.manual_seed would seed the accelerators' generators too, and those are not brought back.
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def _blank(entry: Entry, poison: int) -> torch.Tensor:
    blank = torch.empty(entry.tensor.shape, dtype=entry.tensor.dtype, device="cpu")
    if blank.dtype == torch.bool:
        blank.fill_(poison == _POISON[0])
    else:
        _bytes_of(blank).fill_(poison)
    return nn.Parameter(blank, requires_grad=False) if entry.role == "parameter" else blank


def _digest_of(tensor: torch.Tensor) -> bytes:
    kind = f"{tensor.dtype} {tuple(tensor.shape)}"
    content: Any = _bytes_of(tensor).numpy()  # hashed in place: a copy would double the peak
    digest = hashlib.sha256(kind.encode())
    digest.update(content)
    return digest.digest()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
