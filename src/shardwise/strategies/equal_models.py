"""What ranks must have alike before a model is sharded: its structure, its units, and its values where every rank holds them."""

from __future__ import annotations

from shardwise.errors import CheckpointError, listed
from shardwise.materialization import (
    Comparable,
    Entry,
    Structure,
    clean_fqn,
    comparable_digests,
    comparable_structure,
    digest_of,
)
from shardwise.strategies.wrap_options import WrapOptions
from shardwise.strategies.wrapping import Unit

_SAMPLED_ELEMENTS = 64  # per parameter, in the comparison of values between ranks


def structure_of_units(structure: Structure, units: tuple[Unit, ...], options: WrapOptions) -> Comparable:
    """Return a model's tensors, the units it is sharded in, and how, for ranks to compare."""
    # Units decide which collectives a forward runs: ranks that differ in them would hang in the first one.
    unit_lines = (f"unit {' + '.join(map(clean_fqn, unit.fqns))}" for unit in units)
    return comparable_structure(
        structure,
        (*unit_lines, *options.lines()),
        remedy=(
            "Build the model from the same config, with the same dtype, and make the strategy with the same "
            "arguments on every rank."
        ),
    )


def sampled_values(entries: tuple[Entry, ...]) -> Comparable:
    """Sample every tensor's values: ranks that were seeded or loaded differently would train a mixture of models."""
    samples: dict[str, str] = {}
    for entry in entries:
        if entry.role == "attribute":
            continue
        if entry.tensor.is_meta:
            raise CheckpointError(
                f"memory_efficient_init=False: expected values of {entry.fqn} on every rank, got a tensor on meta. Load "
                "the model with this strategy's load_pretrained, or use memory_efficient_init=True, where global rank "
                "0 alone needs values."
            )
        flat = entry.tensor.detach().reshape(-1)
        samples[entry.fqn] = digest_of(flat[:: max(1, flat.numel() // _SAMPLED_ELEMENTS)])
    return comparable_digests(
        "the values of the model",
        samples,
        explain=_differing_names,
        remedy=(
            "Without memory_efficient_init every rank's own values count, so they must be equal: seed all ranks alike "
            "before building the model, or use memory_efficient_init=True, where global rank 0's values win."
        ),
    )


def _differing_names(names: list[str]) -> str:
    return f"values differ in {listed(names)}"
