"""Ranks that keep copies of the same shards compare them after a load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from shardwise.errors import RankMismatchError, listed
from shardwise.materialization.data_plane import DataPlane

_CHUNK_ELEMENTS = 2**20  # of 8 bytes


def require_equal_replicas(
    fqns: Sequence[str],
    targets: Mapping[str, torch.Tensor],
    *,
    ranks: Sequence[int],
    rank: int,
    plane: DataPlane,
) -> None:
    """Raise unless all ranks of a group hold the same bytes. They call this together.

    Args:
        fqns: Of the tensors that they keep copies of.
        targets: This rank's shards by fqn.
        ranks: Of the group, in its order.
        rank: This one.
        plane: Of the group.

    Raises:
        RankMismatchError: Naming the tensors.
    """
    digests_of_own = [digest_of_shard(targets[fqn]) for fqn in fqns]
    own = torch.tensor(digests_of_own, dtype=torch.int64, device="cpu")
    message = own.view(torch.uint8).to(plane.device)
    lengths = [message.numel()] * len(ranks)
    received = torch.empty(sum(lengths), dtype=torch.uint8, device=plane.device)
    work = plane.all_to_all(received, message.repeat(len(ranks)), receive_bytes=lengths, send_bytes=lengths)
    plane.wait(work, what="the comparison of replicas")
    found = received.cpu().view(torch.int64).view(len(ranks), len(fqns))
    differs = (found != own).any(0)
    if bool(differs.any()):
        names = [fqn for fqn, differ in zip(fqns, differs.tolist(), strict=True) if differ]
        others = [r for r, digests in zip(ranks, found, strict=True) if not torch.equal(digests, own)]
        raise RankMismatchError(
            f"rank {rank}: expected the same shards as its replicas on ranks {others} after the load, got others of "
            f"{listed(names)}. Memory or the network has changed bytes: load again."
        )


def digest_of_shard(shard: torch.Tensor) -> int:
    """Return 64 bits of a shard's bytes that depend on their order; small temporary memory, on the shard's device."""
    total = 0
    for number, words in enumerate(_words(shard)):
        odd = torch.arange(1, 2 * words.numel() + 1, 2, dtype=torch.int64, device=words.device)
        total += int((words * odd).sum()) * (2 * number + 1)  # wraps around in torch
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


def _words(shard: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = shard.detach().contiguous().view(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    if whole and flat.storage_offset() % 8 == 0:
        yield from torch.split(flat[:whole].view(torch.int64), _CHUNK_ELEMENTS)
    elif whole:
        for part in torch.split(flat[:whole], 8 * _CHUNK_ELEMENTS):
            yield part.clone().view(torch.int64)
    if whole < flat.numel():
        rest = torch.zeros(8, dtype=torch.uint8, device=flat.device)
        rest[: flat.numel() - whole] = flat[whole:]
        yield rest.view(torch.int64)
