"""A state dict in memory as a source of tensor values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from shardwise.checkpoint.stored_tensor import StoredTensor
from shardwise.errors import CheckpointError, ShapeMismatchError
from shardwise.tensors import Region, TensorSpec


class StateDictSource:
    """Full tensors in memory, handed out by region and let go of one by one.

    Args:
        tensors: Full tensors by name; on the source rank all of them, elsewhere none.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

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
                "load_pretrained, or build it off meta on global rank 0."
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

    def tensor(self, fqn: str) -> torch.Tensor:
        """Return a full tensor as it is."""
        return self._tensors[fqn]

    @property
    def name(self) -> str:
        """What messages call it."""
        return "state dict"

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by name, each as a file of its own whose bytes are its elements in row-major order."""
        return {
            name: StoredTensor(
                name=name,
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                file=name,
                start=0,
                stop=tensor.numel() * tensor.element_size(),
            )
            for name, tensor in self._tensors.items()
        }

    def read_into(self, file: str, offset: int, into: memoryview) -> None:
        """Fill a buffer with the bytes of a tensor from an offset on; see `Source`."""
        tensor = self._tensors[file].detach()
        nbytes = tensor.numel() * tensor.element_size()
        if offset < 0 or offset + len(into) > nbytes:
            raise CheckpointError(
                f"{file}: expected a range within {nbytes} bytes, got [{offset}, {offset + len(into)}). Was the tensor changed "
                "during the load?"
            )
        if len(into):
            content = tensor.cpu().contiguous().view(-1).view(torch.uint8)[offset : offset + len(into)]
            torch.frombuffer(into, dtype=torch.uint8).copy_(content)

    def mapped(self, file: str, offset: int, *, dtype: torch.dtype, numel: int) -> torch.Tensor | None:
        """Nothing: the caller's tensors must not be the model's."""
        return None

    def require_unchanged(self) -> None:
        """Nothing to compare with."""

    def close(self) -> None:
        """Nothing to close."""
