"""A state dict in memory as a source of tensor values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.distributed.tensor import DTensor

from shardwise.checkpoint.source import Run
from shardwise.checkpoint.stored_tensor import StoredTensor
from shardwise.errors import CheckpointError, ShapeMismatchError
from shardwise.tensors import Region, TensorSpec


class StateDictSource:
    """Full tensors in memory, handed out by region or by bytes (see `Source`), and let go of one by one.

    Args:
        tensors: Full tensors by name; on the source rank all of them, elsewhere none.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)
        self._stored: dict[str, StoredTensor] | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def require(self, spec: TensorSpec) -> None:
        """Raise unless the tensor is here, with values, in the shape and dtype that the model expects.

        Raises:
            CheckpointError: No such tensor, or one without values, or of another dtype.
            ShapeMismatchError: Its shape differs.
        """
        tensor = self._tensors.get(spec.fqn)
        if tensor is None:
            raise CheckpointError(
                f"{spec.fqn}: expected a tensor in the source rank's state, got none. "
                "Load the model with load_pretrained, or give the source rank every parameter."
            )
        if tensor.is_meta:
            raise CheckpointError(
                f"{spec.fqn}: expected values on the source rank, got a tensor on meta. Load the model with "
                "load_pretrained of the strategy that wraps it, or build it off meta on global rank 0."
            )
        if tuple(tensor.shape) != spec.shape:
            raise ShapeMismatchError(
                f"{spec.fqn}: expected {spec.shape} from the model, got {tuple(tensor.shape)} in the source rank's "
                "state. Build the model from the same config on every rank."
            )
        if tensor.dtype != spec.dtype:
            raise CheckpointError(
                f"{spec.fqn}: expected {spec.dtype} from the model, got {tensor.dtype} in the source "
                "rank's state. Load the model with the same dtype on every rank."
            )

    def read(self, fqn: str, region: Region, into: torch.Tensor) -> None:
        """Copy a region of a tensor.

        Args:
            fqn: Name of the tensor.
            region: In the full tensor, in elements.
            into: Destination of the region's shape and the tensor's dtype, on any device.
        """
        with torch.no_grad():
            into.copy_(self._tensors[fqn][region.slices()])

    def release(self, fqn: str) -> None:
        """Let go of a tensor that will not be read again."""
        self._tensors.pop(fqn, None)
        if self._stored is not None:
            self._stored.pop(fqn, None)

    def tensor(self, fqn: str) -> torch.Tensor:
        """Return a full tensor as it is."""
        return self._tensors[fqn]

    @property
    def name(self) -> str:
        """What messages call it."""
        return "state dict"

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by name, each as a file of its own whose bytes are its elements in row-major order.

        Raises:
            CheckpointError: A value is not a full tensor with values.
        """
        if self._stored is None:  # described once: callers look names up one by one
            self._stored = {name: _describe(name, value) for name, value in self._tensors.items()}
        return self._stored

    def read_into(self, file: str, offset: int, into: memoryview) -> None:
        """Fill a buffer with the bytes of a tensor from an offset on; see `Source`.

        Bytes of a contiguous tensor in host memory are copied straight from it. Of any other, only the elements asked for are
        brought together first, so that a read takes at most its own size in addition.
        """
        tensor = self._tensors[file].detach()
        itemsize = tensor.element_size()
        nbytes = tensor.numel() * itemsize
        if offset < 0 or offset + len(into) > nbytes:
            raise CheckpointError(
                f"{file}: expected a range within {nbytes} bytes, got [{offset}, {offset + len(into)}). Was the tensor changed "
                "during the load?"
            )
        if not len(into):
            return
        target = torch.frombuffer(into, dtype=torch.uint8)
        start, stop = offset // itemsize, -(-(offset + len(into)) // itemsize)
        done = 0
        skipped = offset - start * itemsize  # a range may begin, and end, inside of an element
        for box in _boxes(tensor, start, stop):
            content = _flat_bytes(box.contiguous().cpu())[skipped:][: len(into) - done]
            target[done : done + len(content)].copy_(content)
            done += len(content)
            skipped = 0

    def mapped(self, runs: Sequence[Run]) -> list[torch.Tensor | None]:
        """Nothing: the caller's tensors must not be the model's."""
        return [None] * len(runs)

    def require_unchanged(self) -> None:
        """Nothing to compare with."""

    def close(self) -> None:
        """Nothing to close."""


def _describe(name: object, value: object) -> StoredTensor:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise CheckpointError(
            f"state dict: expected tensors by name, got {type(value).__name__} under {name!r}. If the state dict lies inside, pass "
            "that one; leave out what is not a tensor."
        )
    got, remedy = None, "Make it dense and plain before."
    if isinstance(value, DTensor):
        got = f"a DTensor ({value.placements})"
        remedy = "Pass full tensors on the first rank: torch.distributed.checkpoint.state_dict with full_state_dict=True."
    elif value.is_meta:
        got, remedy = "one on meta", "Pass tensors that have values."
    elif value.layout != torch.strided:
        got = f"one of layout {value.layout}"
    elif value.is_quantized or value.is_conj() or value.is_neg():
        got = "a quantised one" if value.is_quantized else "a lazily conjugated or negated one"
    if got is not None:
        raise CheckpointError(
            f"{name}: expected a full tensor with values in the state dict, got {got}. {remedy}"
        )
    return StoredTensor(
        name=name,
        shape=tuple(value.shape),
        dtype=value.dtype,
        file=name,
        start=0,
        stop=value.numel() * value.element_size(),
    )


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a contiguous tensor as uint8 of one dim."""
    # A dim of one element may have any stride in a contiguous tensor, so that view(-1) does not do.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _boxes(tensor: torch.Tensor, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Cut a run of elements into boxes, in order; at most two per dim and one more. Those of a contiguous tensor are contiguous.

    Args:
        tensor: Of any strides.
        start: First element in row-major order, inclusive.
        stop: Last element, exclusive; more than `start`.

    Yields:
        Views whose elements, in row-major order, are those of the run.
    """
    if start == 0 and stop == tensor.numel():
        yield tensor
        return
    row = math.prod(tensor.shape[1:])  # elements
    first, last = -(-start // row), stop // row  # rows that are whole in the run
    if first > last:
        index = start // row
        yield from _boxes(tensor[index], start - index * row, stop - index * row)
        return
    if start < first * row:
        yield from _boxes(tensor[first - 1], start - (first - 1) * row, row)
    if first < last:
        yield tensor[first:last]
    if last * row < stop:
        yield from _boxes(tensor[last], 0, stop - last * row)
