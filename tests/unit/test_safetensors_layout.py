"""The layout of a file that is to be written is that of safetensors' own writer, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardwise.checkpoint.safetensors_header import DTYPES
from shardwise.checkpoint.safetensors_layout import laid_out
from shardwise.errors import UnsupportedFormatError


def written(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> bytes:
    save_file(tensors, path, metadata=metadata)
    return path.read_bytes()


def composed(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    kinds = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    header, stored = laid_out(kinds, file="x", metadata=metadata)
    content = bytearray(max([len(header), *(s.stop for s in stored.values())]))
    content[: len(header)] = header
    for name, of in stored.items():
        content[of.start : of.stop] = tensors[name].view(-1).view(torch.uint8).numpy().tobytes()
    return bytes(content)


def test_every_dtype_lies_where_safetensors_puts_it(tmp_path: Path) -> None:
    import safetensors.torch

    known = set(safetensors.torch._SIZE)  # an older package lacks some
    tensors = {
        f"{i}.{name.lower()}": torch.arange(3 + i, dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)
        for i, (name, dtype) in enumerate(DTYPES.items())
        if dtype in known
    }
    assert len(tensors) >= 12
    assert composed(tensors, {"format": "pt"}) == written(tensors, tmp_path / "a", {"format": "pt"})


def test_names_shapes_and_padding_are_those_of_safetensors(tmp_path: Path) -> None:
    for length in range(1, 10):  # of a name: every padding
        tensors = {
            "é" * length: torch.ones(2, 3),
            "Z": torch.ones(()),
            "a.10": torch.ones(1, 0, 4),
            "a.9": torch.arange(4.0),
            'q"\\\n': torch.ones(1),
            "half": torch.ones(3, dtype=torch.bfloat16),
        }
        assert composed(tensors, {"format": "pt"}) == written(tensors, tmp_path / "a", {"format": "pt"})


def test_a_dtype_that_the_format_lacks_is_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedFormatError, match=r"w: expected a dtype that safetensors has, got complex128"
    ):
        laid_out({"w": ((2,), torch.complex128)}, file="x", metadata={})
