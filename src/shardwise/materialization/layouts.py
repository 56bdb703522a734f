"""How each tensor of a model lies over the ranks of a call, as all of them see it.

A rank knows the mesh that its own shard is on. With a mesh of `dp` and `fsdp`, `fully_shard(mesh=mesh["fsdp"])` gives ranks
different ones, each over a part of the ranks. Ranks that plan an exchange from different layouts would send each other what
nobody expects, so they agree on one: the meshes are the rows of a larger one that holds copies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from shardwise.errors import RankMismatchError
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.packed_text import packed, unpacked
from shardwise.materialization.structure import Entry
from shardwise.plan import Layout


def layout_of(tensor: torch.Tensor, ranks: Sequence[int]) -> Layout:
    """Return how a parameter lies over the ranks: a DTensor as its placements say, anything else whole on each."""
    if not isinstance(tensor, DTensor):
        return _replicated(tuple(ranks))
    return _layout_on(tensor.device_mesh, tuple(tensor.placements))


_layouts: WeakKeyDictionary[DeviceMesh, dict[tuple[Placement, ...], Layout]] = WeakKeyDictionary()
"""A model has few layouts and many parameters. A mesh keeps its groups, and so their threads and connections: it is not kept here."""


@lru_cache(maxsize=64)
def _replicated(ranks: tuple[int, ...]) -> Layout:
    return Layout.replicated(ranks)


def _layout_on(mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Layout:
    of_mesh = _layouts.setdefault(mesh, {})
    if placements not in of_mesh:
        of_mesh[placements] = Layout(
            mesh_shape=tuple(mesh.shape),
            mesh_ranks=tuple(mesh.mesh.flatten().tolist()),
            placements=placements,
        )
    return of_mesh[placements]


def agreed_layouts(entries: Sequence[Entry], *, agreement: Agreement) -> dict[str, Layout]:
    """Return how every parameter and buffer lies over the ranks, the same on all of them. All ranks call this together.

    Args:
        entries: Of the model; equal in names on all ranks.
        agreement: Of the call; a phase of it is open.

    Returns:
        Layouts by fqn.

    Raises:
        RankMismatchError: Ranks have a tensor in layouts that do not fit together.
    """
    tensors = [entry for entry in entries if entry.role != "attribute"]
    kinds: dict[str, Layout] = {}  # most models have two or three
    known: dict[int, int] = {}
    kind_of_tensor: list[int] = []
    for entry in tensors:
        layout = layout_of(entry.tensor, agreement.ranks)
        if id(layout) not in known:
            kinds.setdefault(json.dumps(_as_data(layout)), layout)
            known[id(layout)] = list(kinds).index(json.dumps(_as_data(layout)))
        kind_of_tensor.append(known[id(layout)])
    own = list(kinds.values())
    text = json.dumps([[_as_data(layout) for layout in own], kind_of_tensor])
    digests = agreement.gather("layouts", hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) > 1:  # only then is the text itself worth sending
        texts = agreement.gather("layouts in full", packed(text))
        return _joined([json.loads(unpacked(each)) for each in texts], tensors, agreement.ranks)
    return {entry.fqn: own[kind] for entry, kind in zip(tensors, kind_of_tensor, strict=True)}


def _joined(described: list[Any], tensors: Sequence[Entry], ranks: Sequence[int]) -> dict[str, Layout]:
    known: dict[tuple[int, ...], Layout] = {}
    layouts: dict[str, Layout] = {}
    for entry, kinds in zip(tensors, zip(*(of_rank[1] for of_rank in described), strict=True), strict=True):
        if kinds not in known:
            of_ranks = [of_rank[0][kind] for of_rank, kind in zip(described, kinds, strict=True)]
            known[kinds] = _join(dict(zip(ranks, of_ranks, strict=True)), entry.fqn)
        layouts[entry.fqn] = known[kinds]
    return layouts


def _join(of_rank: dict[int, Any], fqn: str) -> Layout:
    """Return the one layout of which every rank sees its own mesh."""
    different: list[Any] = []
    for data in of_rank.values():
        if data not in different:
            different.append(data)
    different.sort(key=lambda data: data[1])
    shape, _, placements = different[0]
    members = [rank for data in different for rank in data[1]]
    fits = all(data[0] == shape and data[2] == placements for data in different)
    is_own = all(rank not in members or rank in data[1] for rank, data in of_rank.items())
    if not fits or len(set(members)) < len(members) or not is_own:
        seen = "; ".join(f"{data[2]} on a mesh of shape {data[0]} over ranks {data[1]}" for data in different)
        raise RankMismatchError(
            f"{fqn}: expected one layout on all ranks, or meshes of one shape that no two share a rank of, got {seen}. Shard the "
            "model in the same way on every rank, or fill the parts in calls of their own with group=."
        )
    as_placements = tuple(map(_placement, placements))
    if len(different) == 1:
        return Layout(mesh_shape=tuple(shape), mesh_ranks=tuple(members), placements=as_placements)
    return Layout(
        mesh_shape=(len(different), *shape),
        mesh_ranks=tuple(members),
        placements=(Replicate(), *as_placements),
    )


def _as_data(layout: Layout) -> list[Any]:
    return [list(layout.mesh_shape), list(layout.mesh_ranks), [_described(p) for p in layout.placements]]


def _described(placement: Placement) -> list[Any]:
    if isinstance(placement, _StridedShard):
        return ["strided shard", placement.dim, placement.split_factor]
    return ["shard", placement.dim] if isinstance(placement, Shard) else ["replicate"]


def _placement(described: list[Any]) -> Placement:
    kind, *arguments = described
    if kind == "strided shard":
        return _StridedShard(arguments[0], split_factor=arguments[1])
    return Shard(arguments[0]) if kind == "shard" else Replicate()
