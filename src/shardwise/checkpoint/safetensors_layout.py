"""The header of a safetensors file that is to be written, and where each tensor's bytes will lie, before there are any.

Tensors lie as safetensors' own writer puts them: by dtype, the widest first, then by name; the header is padded with spaces to
a multiple of 8 bytes. So every tensor begins at a multiple of its element size.

Source: format specification of safetensors (https://github.com/huggingface/safetensors#format); the order is that of
`prepare` and of `Dtype` in `safetensors/src/tensor.rs`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping

import torch

from shardwise.checkpoint.safetensors_header import DTYPES, LENGTH_BYTES
from shardwise.checkpoint.stored_tensor import StoredTensor
from shardwise.errors import UnsupportedFormatError
from shardwise.tensors import dtype_name

_ALIGNMENT_BYTES = 8
# In the order in which they lie in a file.
_ORDER = (
    "U64",
    "I64",
    "F64",
    "C64",
    "F32",
    "U32",
    "I32",
    "BF16",
    "F16",
    "U16",
    "I16",
    "F8_E5M2FNUZ",
    "F8_E4M3FNUZ",
    "F8_E8M0",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
    "BOOL",
)
_NAMES = {DTYPES[name]: name for name in _ORDER}
_PLACES = {name: place for place, name in enumerate(_ORDER)}


def laid_out(
    kinds: Mapping[str, tuple[tuple[int, ...], torch.dtype]], *, file: str, metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, StoredTensor]]:
    """Return the bytes before the tensors of a file, and where each tensor lies.

    Args:
        kinds: Shape, in elements, and dtype by checkpoint name.
        file: Its name within its directory.
        metadata: Texts by name, kept in the header.

    Raises:
        UnsupportedFormatError: A dtype that the format does not have.
    """
    for name, (_, dtype) in kinds.items():
        if dtype not in _NAMES:
            raise UnsupportedFormatError(
                f"{name}: expected a dtype that safetensors has, got {dtype_name(dtype)}. Convert it first, for example to real "
                "and imaginary parts."
            )
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0  # from the end of the header
    extents: dict[str, tuple[int, int]] = {}
    for name in sorted(kinds, key=lambda n: (_PLACES[_NAMES[kinds[n][1]]], n.encode())):
        shape, dtype = kinds[name]
        extents[name] = offset, offset + math.prod(shape) * dtype.itemsize
        offset = extents[name][1]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": list(extents[name])}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    base = LENGTH_BYTES + len(text)
    return struct.pack("<Q", len(text)) + text, {
        name: StoredTensor(
            name=name,
            shape=kinds[name][0],
            dtype=kinds[name][1],
            file=file,
            start=base + start,
            stop=base + stop,
        )
        for name, (start, stop) in extents.items()
    }
