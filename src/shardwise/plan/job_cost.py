"""What a load costs on every rank of a job, without planning each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shardwise.plan.division import JobDivision, Sharing
from shardwise.plan.exchange_plan import plan_exchange
from shardwise.plan.load_plan import Read, buffers_wanted, mapped_of_reader, plan_reads
from shardwise.plan.sight import Sight
from shardwise.plan.slices import Counts
from shardwise.plan.slicing import slices_of
from shardwise.plan.wanted import WantedTensor

_FEW_RANKS = 16
"""So many ranks that keep the same are planned one by one: each reads, and so does not receive, a large part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """How large the buffers of a load are.

    Args:
        ring_buffers: Number of buffers that reads go through.
        read_bytes: Size of each, and of the largest read.
        scratch_bytes: Of device memory that reads are placed from; 0 where shards are in host memory.
        exchange_bytes: Size of each buffer of an exchange.
        in_place: Whether a read can go straight into a shard: host memory, in the stored dtype.
    """

    ring_buffers: int
    read_bytes: int
    scratch_bytes: int
    exchange_bytes: int
    in_place: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class JobCost:
    """Costs by rank, in the order of the job's ranks.

    Args:
        storage_bytes: Requested from storage, mapped pages included.
        network_bytes: Received from other ranks.
        reads: Calls that read; mapped pages are read when they are touched, and are not among them.
        read_bytes: By these calls.
        mapped_bytes: Of shards that are pages of the files.
        staging_bytes: Most that the buffers in host memory hold at a time.
        device_staging_bytes: The same in device memory.
        sent_bytes: Handed to other ranks; of several readers each is taken to hand out as much as it reads of the whole.
        opened: Of shape (ranks, files): which files of the source a rank reads or maps.
    """

    storage_bytes: Counts
    network_bytes: Counts
    reads: Counts
    read_bytes: Counts
    mapped_bytes: Counts
    staging_bytes: Counts
    device_staging_bytes: Counts
    sent_bytes: Counts
    opened: NDArray[np.bool_]

    @classmethod
    def of_nothing(cls, ranks: int, *, files: int) -> JobCost:
        """Return zeros, to be added to.

        Args:
            ranks: Of the job, or of a part of it.
            files: Of the source.
        """
        names = [name for name in cls.__dataclass_fields__ if name != "opened"]
        counts = {name: np.zeros(ranks, dtype=np.int64) for name in names}
        return cls(**counts, opened=np.zeros((ranks, files), dtype=np.bool_))


def cost_of_job(
    wanted: Sequence[WantedTensor],
    division: JobDivision,
    sight: Sight,
    classes: Sequence[Sequence[int]],
    *,
    staging: Staging,
    files: Mapping[str, int],
) -> JobCost:
    """Return what each rank reads and receives.

    One rank of each class is planned as it would plan itself. What the ranks read of an exchange is counted for each of them.

    Args:
        wanted: What of a model comes from a source.
        division: Of its reading.
        sight: Of the source.
        classes: As `rank_classes` returned them.
        staging: Sizes of the buffers.
        files: Number of each file of the source, from 0 on.
    """
    cost = JobCost.of_nothing(len(sight.ranks), files=len(files))
    position_of = {rank: position for position, rank in enumerate(sight.ranks)}
    class_of = {rank: number for number, members in enumerate(classes) for rank in members}
    direct = [wanted[index] for index in division.direct]
    dtype_of = {tensor.fqn: tensor.dtype for tensor in direct}
    for members in classes if direct else ():
        plan = plan_reads(
            direct,
            rank=members[0],
            max_read_bytes=staging.read_bytes,
            joins_runs=not staging.in_place,
            node_of=sight.node_of,
        )
        at = np.array([position_of[rank] for rank in members])
        cost.storage_bytes[at] += plan.storage_bytes
        cost.reads[at] += len(plan.reads)
        cost.read_bytes[at] += sum(read.nbytes for read in plan.reads)
        cost.mapped_bytes[at] += sum(mapped.nbytes for mapped in plan.mapped)
        names = {read.file for read in plan.reads} | {run.file for each in plan.mapped for run in each.runs}
        cost.opened[np.ix_(at, np.array([files[name] for name in names], dtype=np.int64))] = True
        if staging.in_place:
            through = sorted(read.nbytes for read in plan.reads if not _fits_in_place(read, dtype_of))
            cost.staging_bytes[at] = sum(through[-staging.ring_buffers :])
        else:  # pinned at once, whatever each read takes of its buffer
            buffers = buffers_wanted([plan], most=staging.ring_buffers, nbytes=staging.read_bytes)
            cost.staging_bytes[at] = buffers * staging.read_bytes
            cost.device_staging_bytes[at] = staging.scratch_bytes if plan.reads else 0
    for groups in division.sharings:
        known: dict[tuple[tuple[int, ...], tuple[int, ...]], JobCost] = {}
        for sharing in groups:
            key = (
                tuple(class_of[rank] for rank in sharing.ranks),
                tuple(sharing.ranks.index(reader) for reader in sharing.readers)
                if len(sharing.readers) < len(sharing.ranks)
                else (),
            )
            if key not in known:
                known[key] = _cost_of_sharing(wanted, sharing, class_of, staging=staging, files=files)
            add_cost(cost, known[key], np.array([position_of[rank] for rank in sharing.ranks]))
    return cost


def add_cost(cost: JobCost, more: JobCost, at: Counts) -> None:
    """Add the cost of some ranks; what they stage at different times is not added up.

    Args:
        cost: Of the job.
        more: Of some ranks, for something that they do after the rest.
        at: Positions of these ranks in the job.
    """
    cost.storage_bytes[at] += more.storage_bytes
    cost.network_bytes[at] += more.network_bytes
    cost.reads[at] += more.reads
    cost.read_bytes[at] += more.read_bytes
    cost.mapped_bytes[at] += more.mapped_bytes
    cost.sent_bytes[at] += more.sent_bytes
    cost.opened[at] |= more.opened
    cost.staging_bytes[at] = np.maximum(cost.staging_bytes[at], more.staging_bytes)
    cost.device_staging_bytes[at] = np.maximum(cost.device_staging_bytes[at], more.device_staging_bytes)


def _cost_of_sharing(
    wanted: Sequence[WantedTensor],
    sharing: Sharing,
    class_of: dict[int, int],
    *,
    staging: Staging,
    files: Mapping[str, int],
) -> JobCost:
    cost = JobCost.of_nothing(len(sharing.ranks), files=len(files))
    slices = slices_of(
        wanted,
        sharing.chosen,
        ranks=sharing.ranks,
        buffer_bytes=staging.exchange_bytes,
        readers=sharing.readers,
        reader_of=None,
    )
    position_of = {rank: position for position, rank in enumerate(sharing.ranks)}
    first = sharing.readers[0]
    mapped = mapped_of_reader(
        wanted, sharing.chosen, ranks=sharing.ranks, readers=sharing.readers, rank=first
    )
    cost.mapped_bytes[position_of[first]] = sum(each.nbytes for each in mapped)
    readers = np.array([position_of[reader] for reader in sharing.readers])
    cost.storage_bytes[readers] = cost.read_bytes[readers] = slices.bytes_of_reader
    cost.reads[readers] = slices.extents_of_reader
    file_of_strip = np.array([files[strip.stored.file] for strip in slices.strips], dtype=np.int64)
    cost.opened[readers[slices.reader], file_of_strip[slices.strip]] = True
    if len(sharing.ranks) > 1:
        received_of_class: dict[tuple[int, int | bool], int] = {}
        each = sharing.keep_the_same and len(sharing.ranks) <= _FEW_RANKS
        for position, rank in enumerate(sharing.ranks):
            number = (class_of[rank], position if each else rank in sharing.readers)
            if number not in received_of_class:
                plan = plan_exchange(
                    wanted,
                    sharing.chosen,
                    ranks=sharing.ranks,
                    rank=rank,
                    buffer_bytes=staging.exchange_bytes,
                    readers=sharing.readers,
                    slices=slices,
                )
                received_of_class[number] = plan.network_bytes
            cost.network_bytes[position] = received_of_class[number]
    read_bytes = int(slices.bytes_of_reader.sum())
    if read_bytes:
        share = slices.bytes_of_reader / read_bytes
        cost.sent_bytes[readers] = (share * cost.network_bytes.sum()).astype(np.int64)
    sent = slices.most_sent_bytes if len(sharing.ranks) > 1 else 0
    received = np.full(len(sharing.ranks), slices.most_received_bytes)
    if len(sharing.readers) == 1:
        received[readers] = 0
        sent *= slices.rounds_in_flight
    cost.staging_bytes[:] = received
    cost.device_staging_bytes[:] = received
    cost.staging_bytes[readers] += slices.two_extents_bytes
    reads = readers[slices.bytes_of_reader > 0]
    cost.staging_bytes[reads] += sent
    cost.device_staging_bytes[reads] += sent
    cost.device_staging_bytes[:] += staging.scratch_bytes // 2  # of an exchange there is one
    return cost


def _fits_in_place(read: Read, dtype_of: Mapping[str, torch.dtype]) -> bool:
    fragment = read.fragments[0]
    same = fragment.stored.dtype == dtype_of[fragment.fqn]
    return same and len(read.fragments) == 1 and fragment.piece.is_one_run
