"""LoRA adapters added to the weights that they adapt, on shards: one weight at a time, in a copy of this rank's shard of it.

What PEFT's `merge` makes of a whole weight is W + s·B·A. A shard of W needs rows of B and columns of A, which are small; ranks
hand these to each other, and no rank holds more of W than its shard.

Source: `peft.tuners.lora.layer.Linear.merge`, `Embedding.merge`, `get_delta_weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shardwise.errors import ConfigurationError
from shardwise.export.parts import LowRank, Part, Terms
from shardwise.materialization.data_plane import DataPlane
from shardwise.materialization.names import clean_fqn
from shardwise.plan import WantedTensor, dealt_layout

_BLOCK_BYTES = 8 * 2**20
"""Of a product at a time, in float32."""
_REMEDY = (
    "Export the adapter alone (adapters='alone'), and merge it with PEFT's merge_and_unload in one process."
)


def terms_of(model: Any) -> dict[str, tuple[LowRank, ...]]:
    """Return what the active adapters of a PEFT model add to its weights.

    Raises:
        ConfigurationError: An adapter is no plain LoRA of a linear layer or an embedding.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, tuple[LowRank, ...]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        fqn = clean_fqn(f"{name}.").removesuffix(".")
        active = [each for each in layer.active_adapters if each not in layer.merged_adapters]
        if not isinstance(layer, LoraLayer):
            _refuse(fqn, type(layer).__name__)
        terms = tuple(_term(layer, fqn, adapter) for adapter in active if _has(layer, adapter))
        if terms:
            found[f"{fqn}.base_layer.weight"] = terms
    return found


def _has(layer: Any, adapter: str) -> bool:
    return adapter in layer.lora_A or adapter in layer.lora_embedding_A


def _term(layer: Any, fqn: str, adapter: str) -> LowRank:
    weight: Any = getattr(layer.base_layer, "weight", None)
    plain = weight is not None and weight.ndim == 2 and not layer.lora_bias.get(adapter, False)
    if not plain or adapter in layer.lora_variant or adapter in layer.lora_magnitude_vector:
        _refuse(fqn, f"adapter {adapter!r} of {type(layer).__name__}")
    if adapter in layer.lora_embedding_A:
        a, b = f"{fqn}.lora_embedding_A.{adapter}", f"{fqn}.lora_embedding_B.{adapter}"
        return LowRank(a=a, b=b, scaling=layer.scaling[adapter], transposed=True)
    shape = (layer.lora_B[adapter].weight.shape[0], layer.lora_A[adapter].weight.shape[1])
    transposed = bool(getattr(layer, "fan_in_fan_out", False))
    if tuple(weight.shape) != (
        shape[::-1] if transposed else shape
    ):  # a stack of experts, and what else has a way of its own
        _refuse(
            fqn, f"adapter {adapter!r} of {type(layer).__name__} on a weight of shape {tuple(weight.shape)}"
        )
    return LowRank(
        a=f"{fqn}.lora_A.{adapter}.weight",
        b=f"{fqn}.lora_B.{adapter}.weight",
        scaling=layer.scaling[adapter],
        transposed=transposed,
    )


def _refuse(fqn: str, got: str) -> None:
    raise ConfigurationError(
        f"{fqn}: expected LoRA of a linear layer or an embedding, without DoRA and biases, to merge on shards, got {got}. {_REMEDY}"
    )


def grouped(
    wanted: Sequence[WantedTensor], fqn_of_key: Mapping[str, str], terms: Terms
) -> tuple[list[WantedTensor], list[tuple[tuple[str, ...], list[WantedTensor]]]]:
    """Divide what is to be written into what stays as it is, and groups that are merged and written one after the other.

    A tensor to be written that takes of several weights is written at once, so all of these are in one group.

    Args:
        wanted: Of the files.
        fqn_of_key: From a part's key to the fqn of its tensor.
        terms: What is added to weights.

    Returns:
        The first, and each group with the fqns of its weights that have terms.
    """
    stored_of: dict[str, set[str]] = {}
    fqns_of: dict[str, set[str]] = {}
    for tensor in wanted:
        for each in tensor.pieces:
            stored_of.setdefault(fqn_of_key[tensor.fqn], set()).add(each.stored.name)
            fqns_of.setdefault(each.stored.name, set()).add(fqn_of_key[tensor.fqn])
    group_of: dict[str, int] = {}
    members: list[tuple[str, ...]] = []
    for start in terms:
        if start in group_of or start not in stored_of:
            continue
        reached, waiting = {start}, [start]
        while waiting:
            near = {fqn for name in stored_of[waiting.pop()] for fqn in fqns_of[name]} - reached
            reached |= near
            waiting += near
        group_of |= dict.fromkeys(reached, len(members))
        members.append(tuple(sorted(fqn for fqn in reached if fqn in terms)))
    plain: list[WantedTensor] = []
    groups: list[tuple[tuple[str, ...], list[WantedTensor]]] = [(fqns, []) for fqns in members]
    for tensor in wanted:
        number = group_of.get(fqn_of_key[tensor.fqn])
        (plain if number is None else groups[number][1]).append(tensor)
    return plain, groups


def merged(
    shard: torch.Tensor,
    part: Part,
    terms: tuple[LowRank, ...],
    whole: Mapping[str, torch.Tensor],
    *,
    rank: int,
) -> torch.Tensor:
    """Return a copy of what this rank holds of a part of a weight, with terms added to it.

    Args:
        shard: What it holds.
        part: Of the weight.
        terms: To add.
        whole: A and B of all terms, by fqn.
        rank: This one, global.
    """
    result = shard.detach().clone()
    for box in part.layout.parts(part.region.shape, rank):
        first_row, first_column = part.region.start
        for low in range(0, box.region.shape[0], rows_of_block(box.region.shape[1])):
            high = min(low + rows_of_block(box.region.shape[1]), box.region.shape[0])
            rows = slice(first_row + box.region.start[0] + low, first_row + box.region.start[0] + high)
            columns = slice(first_column + box.region.start[1], first_column + box.region.stop[1])
            into = result[
                box.local.start[0] + low : box.local.start[0] + high, box.local.start[1] : box.local.stop[1]
            ]
            for term in terms:
                a, b = whole[term.a], whole[term.b]
                computed = torch.float32 if b.dtype.itemsize < 4 else b.dtype
                if term.transposed:
                    product = (b[columns].to(computed) @ a[:, rows].to(computed)).t()
                else:
                    product = b[rows].to(computed) @ a[:, columns].to(computed)
                into += (product * term.scaling).to(device=result.device, dtype=b.dtype)
    return result


def rows_of_block(columns: int) -> int:
    """Return how many rows of a product are made at a time."""
    return max(1, _BLOCK_BYTES // (4 * max(1, columns)))


def gathered_small(
    shards: Mapping[str, torch.Tensor],
    parts: Sequence[Part],
    *,
    ranks: tuple[int, ...],
    rank: int,
    plane: DataPlane | None,
) -> torch.Tensor:
    """Return a small tensor whole, in host memory, on every rank. All ranks call this together.

    Args:
        shards: What this rank holds, by the parts' keys.
        parts: Of the tensor.
        ranks: Of the call, in order.
        rank: This one.
        plane: Carries it; None where there is one rank.
    """
    shape = tuple(max(ends) for ends in zip(*(part.region.stop for part in parts), strict=True))
    result = torch.empty(shape, dtype=shards[parts[0].key].dtype, device="cpu")
    for part in parts:
        shard, into = shards[part.key].detach(), result[part.region.slices()]
        if part.layout.copies == len(ranks) or plane is None:
            into.copy_(shard)
            continue
        layout, size = dealt_layout(part.layout), part.region.shape  # each element from one rank
        boxes = {owner: layout.parts(size, owner) for owner in ranks}
        counts = [sum(box.region.numel for box in boxes[owner]) * shard.dtype.itemsize for owner in ranks]
        own = [shard[box.local.slices()].reshape(-1).view(torch.uint8) for box in boxes[rank]]
        message = torch.cat(own) if own else torch.empty(0, dtype=torch.uint8, device="cpu")
        send = message.to(plane.device).repeat(len(ranks))
        receive = torch.empty(sum(counts), dtype=torch.uint8, device=plane.device)
        work = plane.all_to_all(receive, send, receive_bytes=counts, send_bytes=[len(message)] * len(ranks))
        plane.wait(work, what="the parts of an adapter")
        received, at = receive.cpu().view(shard.dtype), 0
        for owner in ranks:
            for box in boxes[owner]:
                values = received[at : at + box.region.numel]
                into[box.region.slices()] = values.view(box.region.shape)
                at += box.region.numel
    return result
