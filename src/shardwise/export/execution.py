"""Carry out an export: begin the directory, find out who sees it, write, sync, give it its name."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch

from shardwise.errors import CheckpointError
from shardwise.export.collecting import Collecting
from shardwise.export.content import Content
from shardwise.export.directory import OutputDirectory
from shardwise.export.merging import gathered_small, grouped, merged
from shardwise.export.output_files import OutputFiles
from shardwise.export.whole import plan_whole, write_whole
from shardwise.export.writing import Writing
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.awaited_call import Doing, on_thread
from shardwise.materialization.collector import resting_collector
from shardwise.materialization.data_plane import DataPlane, open_data_plane
from shardwise.materialization.freed import give_back_freed
from shardwise.materialization.source_plan import EXCHANGE_BUFFERS
from shardwise.materialization.staging import RING_BUFFERS, StagingRing, read_bytes_of
from shardwise.plan import dealt, plan_writes


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What an export did on this rank.

    Args:
        written_bytes: Of tensors.
        network_bytes: Received from other ranks.
        writers: Ranks that wrote.
    """

    written_bytes: int
    network_bytes: int
    writers: tuple[int, ...]


def write_content(
    content: Content,
    output: OutputDirectory,
    *,
    beside: Callable[[Path], None],
    overwrite: bool,
    device: torch.device,
    staging_bytes: int,
    agreement: Agreement,
) -> Written:
    """Write everything. All ranks call this together; where one fails, nothing is left.

    Args:
        content: Equal on all ranks but for the shards.
        output: Where to.
        beside: Writes what lies beside the weights into a directory; called on the first rank.
        overwrite: Whether a directory of that name may be replaced.
        device: Of the mesh, on this rank.
        staging_bytes: Bound of the staging buffers.
        agreement: Of the call.

    Raises:
        CheckpointError: A file cannot be written.
        PeerError: Another rank failed.
    """
    is_first = agreement.rank == agreement.ranks[0]
    files = OutputFiles(output)
    with ExitStack() as stack:
        stack.callback(files.close)
        with agreement.phase("begin"):
            marker = agreement.publish("marker", secrets.token_hex(16) if is_first else None)
            if is_first:
                on_thread(
                    lambda _: output.refuse(overwrite=overwrite),
                    agreement,
                    what=f"{output.path}: looking at it",
                )
                stack.callback(output.discard)  # finds nothing once the directory has its name

                def begin(doing: Doing) -> None:
                    output.begin(marker)
                    output.create(content.files, doing)

                on_thread(begin, agreement, what=f"{output.path}: making it")
                beside(output.unfinished)
        with agreement.phase("plan"):
            is_seen = on_thread(
                lambda _: output.is_seen(marker), agreement, what=f"{output.path}: looking for it"
            )
            sees = agreement.gather("sees", json.dumps(is_seen))
            pairs = zip(agreement.ranks, sees, strict=True)
            writers = tuple(rank for rank, text in pairs if json.loads(text))
            buffer_bytes = staging_bytes // EXCHANGE_BUFFERS
            with resting_collector():
                wanted = dealt(content.wanted(), ranks=agreement.ranks, writers=writers)
                plain, groups = grouped(wanted, content.fqn_of_key, content.terms)
                plans = [
                    plan_writes(
                        of_group,
                        ranks=agreement.ranks,
                        rank=agreement.rank,
                        writers=writers,
                        max_write_bytes=read_bytes_of(staging_bytes),
                        buffer_bytes=buffer_bytes,
                    )
                    for of_group in (plain, *(tensors for _, tensors in groups))
                ]
                steps = plan_whole(
                    content,
                    ranks=agreement.ranks,
                    writers=writers,
                    rank=agreement.rank,
                    buffer_bytes=buffer_bytes,
                )
            if agreement.rank in writers:
                try:
                    for name in dict.fromkeys(write.file for plan in plans for write in plan.writes):
                        files.open(name)
                except CheckpointError:
                    # Where another rank has failed, the first one takes the files away.
                    agreement.check(now=True)
                    raise
        network_bytes = 0
        with agreement.phase("write"), ExitStack() as planes:
            plane = None
            exchanges = bool(steps) or bool(groups) or any(len(plan.exchange) > 0 for plan in plans)
            if len(agreement.ranks) > 1 and exchanges:
                plane = planes.enter_context(
                    open_data_plane(agreement.ranks, device=device, agreement=agreement)
                )
            for plan, (fqns, _) in zip(plans, [((), []), *groups], strict=True):
                shards = {**content.shards, **_merged(content, fqns, agreement, plane)}
                ring = StagingRing(count=RING_BUFFERS, nbytes=read_bytes_of(staging_bytes), device=device)
                with closing(ring):
                    Writing(plan.writes, files=files, shards=shards, ring=ring, agreement=agreement).run()
                del ring
                give_back_freed()
                collecting = Collecting(
                    plan.exchange, sink=files, shards=shards, plane=plane, agreement=agreement
                )
                collecting.run()
                network_bytes += collecting.received_bytes
                del collecting, shards
            network_bytes += write_whole(steps, content, files=files, plane=plane, agreement=agreement)
            give_back_freed()
        with agreement.phase("sync"):
            on_thread(files.sync, agreement, what=f"{output.path}: storing it")
            counts = agreement.gather("written", str(files.written_bytes))
            if sum(map(int, counts)) != content.nbytes:
                raise CheckpointError(
                    f"{output.path}: expected {content.nbytes:,} bytes of tensors from all ranks, got {sum(map(int, counts)):,}. "
                    "Nothing was changed there; report this layout to shardwise."
                )
        with agreement.phase("finish"):
            if is_first:
                on_thread(
                    lambda doing: output.finish(content.files, doing),
                    agreement,
                    what=f"{output.path}: finishing it",
                )
    return Written(written_bytes=files.written_bytes, network_bytes=network_bytes, writers=writers)


def _merged(
    content: Content, fqns: Sequence[str], agreement: Agreement, plane: DataPlane | None
) -> dict[str, torch.Tensor]:
    """Return copies of what this rank holds of some weights, with their terms added, by the parts' keys."""
    found: dict[str, torch.Tensor] = {}
    for fqn in fqns:
        whole = {}
        for name in dict.fromkeys(name for term in content.terms[fqn] for name in (term.a, term.b)):
            whole[name] = gathered_small(
                content.shards,
                content.parts_of_fqn[name],
                ranks=agreement.ranks,
                rank=agreement.rank,
                plane=plane,
            )
        for part in content.parts_of_fqn[fqn]:
            shard = content.shards[part.key]
            found[part.key] = merged(shard, part, content.terms[fqn], whole, rank=agreement.rank)
        agreement.step()
    return found
