"""A tensor that the model ties and that a checkpoint holds under several names: its values must be the same.

Ranks share the work by pieces of at most one staging buffer, so that neither a tensor's size nor their number matters
for memory. All ranks learn of every difference and raise the same error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch

from shardwise.checkpoint import Readable, Source, StoredTensor
from shardwise.errors import CheckpointError, listed
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.awaited_source import awaited
from shardwise.materialization.binding import Alias, Binding
from shardwise.materialization.placing import as_memory
from shardwise.materialization.sight import agreed_sights, is_in_memory
from shardwise.materialization.staging import read_bytes_of
from shardwise.tensors import dtype_name


def require_equal_aliases(
    binding: Binding, source: Source, *, agreement: Agreement, staging_bytes: int
) -> int:
    """Raise unless every tied tensor has the same values under all of its names in a checkpoint.

    All ranks call this together. Where two names have different floating point dtypes, the narrower is widened first.
    Names of one and the same extent are equal without a read.

    Args:
        binding: Of the model; equal on all ranks.
        source: Open.
        agreement: Of the call; no phase is open.
        staging_bytes: Bound of the host buffers, in bytes.

    Returns:
        Bytes that this rank requested from storage.

    Raises:
        CheckpointError: Values differ; on all ranks, with the same text.
        PeerError: Another rank could not read.
    """
    pairs = _pairs(binding)
    if not pairs:
        return 0
    with agreement.phase("compare tied tensors"):
        readers = agreed_sights([source], agreement, key="sight of ties")[0].readers
        most_bytes = read_bytes_of(staging_bytes) // 2
        requested_bytes, differing = 0, set()
        pieces = (
            (number, start, stop)
            for number, (alias, stored) in enumerate(pairs)
            for start, stop in _pieces(alias.stored, stored, most_bytes)
        )
        with awaited(source, agreement, name=source.name) as bounded:
            for turn, (number, start, stop) in enumerate(pieces):
                if readers[turn % len(readers)] != agreement.rank:
                    continue
                agreement.check()
                alias, stored = pairs[number]
                first, other = _read(bounded, stored, start, stop), _read(bounded, alias.stored, start, stop)
                requested_bytes += first.nbytes + other.nbytes
                if not _equal(first, other):
                    differing.add(number)
        gathered = agreement.gather("differing ties", json.dumps(sorted(differing)))
        found = sorted({number for text in gathered for number in json.loads(text)})
        if found:
            raise CheckpointError(_message(source, [pairs[number] for number in found]))
    return 0 if is_in_memory(source) else requested_bytes


def aliased_bytes(binding: Binding, source: Source | None) -> int:
    """Return the bytes that all ranks together request from storage in `require_equal_aliases`."""
    if source is None or is_in_memory(source):
        return 0
    return sum(alias.stored.nbytes + stored.nbytes for alias, stored in _pairs(binding))


def _pairs(binding: Binding) -> list[tuple[Alias, StoredTensor]]:
    """Return what has to be compared with the tensor that is bound."""
    pairs = [(alias, binding.bound[alias.of].stored[0]) for alias in binding.aliases]
    return [(alias, stored) for alias, stored in pairs if not _same_extent(alias.stored, stored)]


def _same_extent(one: StoredTensor, other: StoredTensor) -> bool:
    return (one.file, one.start, one.stop, one.dtype) == (other.file, other.start, other.stop, other.dtype)


def _pieces(one: StoredTensor, other: StoredTensor, most_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield half-open ranges of elements whose bytes fit, in either tensor."""
    itemsize = max(one.dtype.itemsize, other.dtype.itemsize)
    count, step = one.nbytes // one.dtype.itemsize, max(1, most_bytes // itemsize)
    for start in range(0, count, step):
        yield start, min(count, start + step)


def _read(source: Readable, stored: StoredTensor, start: int, stop: int) -> torch.Tensor:
    buffer = torch.empty(stop - start, dtype=stored.dtype, device="cpu")
    source.read_into(stored.file, stored.start + start * stored.dtype.itemsize, as_memory(buffer))
    return buffer


def _equal(first: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether elements are the same bit by bit: a comparison of numbers would not find -0.0, and never NaN."""
    if first.dtype != other.dtype:
        common = torch.promote_types(first.dtype, other.dtype)
        first, other = first.to(common), other.to(common)
    return torch.equal(first.view(torch.uint8), other.view(torch.uint8))


def _message(source: Source, pairs: list[tuple[Alias, StoredTensor]]) -> str:
    alias, stored = pairs[0]
    more = f" The same holds for {listed([pair[0].fqn for pair in pairs[1:]])}." if len(pairs) > 1 else ""
    return (
        f"{source.name}: expected one value of {alias.of} = {alias.fqn}, which the model ties, got different ones: "
        f"{stored.name} ({dtype_name(stored.dtype)}) in {stored.file} and {alias.stored.name} "
        f"({dtype_name(alias.stored.dtype)}) in {alias.stored.file}.{more} Choose: to keep both, build or load the model "
        f"untied (tie_word_embeddings=False); to use {stored.name} for both, call shardwise.materialize with "
        f"rename={{{alias.fqn!r}: {stored.name!r}}}, or the other way round."
    )
