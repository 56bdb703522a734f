"""The header of a safetensors file, parsed as untrusted input.

A file is 8 bytes with the header's length (little-endian), the header (a JSON object), and the tensors' bytes. The header
is decoded entry by entry with json's own scanner, so that memory follows the number of real entries and not what a
hostile header nests, and no number in it leads to an allocation.

Source: format specification of safetensors (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, NoReturn

import torch

from shardwise.checkpoint.stored_tensor import StoredTensor
from shardwise.errors import DamagedFileError, UnsupportedFormatError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 64
_MAX_OFFSET = 2**63 - 1
_REMEDY = "Get the file again; compare its size or checksum with the origin's."

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_GIT_LFS_POINTER = b"version "  # as a length it would be beyond every file
_PACKED = ("F4", "F6_E2M3", "F6_E3M2")

_SPACE = re.compile(r"[ \t\n\r]*")
# An entry holds a name, numbers in brackets and three keys: nothing in it nests or needs braces.
_ENTRY = re.compile(r"\{[^{}]{1,8192}\}")
# An entry as every known writer has it; anything else takes the slower way, which says what is wrong with it. Numbers of
# at most 18 digits are below 2^63.
_NUMBER = "(?:0|[1-9][0-9]{0,17})"
_USUAL_ENTRY = re.compile(
    rf'\{{"dtype":"([A-Z0-9_]{{1,16}})","shape":\[((?:{_NUMBER}(?:,{_NUMBER})*)?)\],'
    rf'"data_offsets":\[({_NUMBER}),({_NUMBER})\]\}}'
)
_WHOLE_NUMBERS = re.compile(r"(?:0|[1-9][0-9]{0,18})")


def header_length(start: bytes, *, file: str, file_bytes: int) -> int:
    """Return the header's length in bytes.

    Args:
        start: The first 8 bytes of the file, fewer if it is shorter.
        file: Its name, for messages.
        file_bytes: Its size.

    Raises:
        DamagedFileError: The length cannot be right.
    """
    if len(start) < LENGTH_BYTES:
        _damaged(file, f"at least {LENGTH_BYTES} bytes", f"{file_bytes}")
    if start[:LENGTH_BYTES] == _GIT_LFS_POINTER:
        raise DamagedFileError(
            f"{file}: expected a safetensors file, got the pointer that Git LFS keeps in its place ({file_bytes} bytes). Run git lfs "
            "pull in the checkpoint's repository, or download it again."
        )
    length: int = struct.unpack("<Q", start[:LENGTH_BYTES])[0]
    if length < 2:
        _damaged(file, "a header of at least 2 bytes", f"a length of {length}")
    if length > MAX_HEADER_BYTES:
        _damaged(file, f"a header of at most {MAX_HEADER_BYTES:,} bytes, as the format allows", f"{length:,}")
    if length > file_bytes - LENGTH_BYTES:
        _damaged(file, f"a header of {length:,} bytes", f"a file of {file_bytes:,} bytes: it is truncated")
    return length


def parse_header(header: bytes, *, file: str, file_bytes: int) -> tuple[StoredTensor, ...]:
    """Return the tensors that a header describes.

    Args:
        header: Its bytes, without the length.
        file: Name of the file, for the tensors and messages.
        file_bytes: Size of the file.

    Returns:
        The tensors in the order of their bytes.

    Raises:
        DamagedFileError: The header contradicts the format, itself or the file's size.
        UnsupportedFormatError: A tensor is of a dtype that torch has no elements for.
    """
    data_start = LENGTH_BYTES + len(header)
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as error:
        _damaged(file, "a header in UTF-8", str(error))
    found: dict[str, StoredTensor] = {}
    for name, value in _entries(text, file):
        if name in found:
            _damaged(file, "each tensor once", f"{name!r} twice")
        found[name] = _tensor(name, value, file=file, data_start=data_start, file_bytes=file_bytes)
    tensors = tuple(sorted(found.values(), key=lambda tensor: (tensor.start, tensor.stop)))
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            what = "a hole" if tensor.start > position else "an overlap"
            _damaged(file, f"{tensor.name!r} to begin at byte {position}", f"{tensor.start}: {what}")
        position = tensor.stop
    if position != file_bytes:
        what = "it is truncated" if position > file_bytes else "bytes that no tensor owns"
        _damaged(file, f"a file of {position:,} bytes from its header", f"{file_bytes:,}: {what}")
    return tensors


def _entries(text: str, file: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of each entry; the metadata is skipped without being built."""
    if not text.startswith("{"):
        _damaged(file, "a header that starts with '{'", repr(text[:20]))
    position = _skip(text, 1)
    if text[position : position + 1] == "}":
        _require_end(text, position + 1, file)
        return
    seen_metadata = False
    while True:
        name, position = _string(text, position, file)
        position = _skip(text, _expect(text, position, ":", file))
        if name == "__metadata__":
            if seen_metadata:
                _damaged(file, "the metadata once", "it twice")
            seen_metadata = True
            position = _skip_metadata(text, position, file)
        else:
            match = _ENTRY.match(text, position)
            if match is None:
                _damaged(file, f"dtype, shape and data_offsets of {name!r} in braces", _near(text, position))
            yield name, match.group()
            position = match.end()
        position = _skip(text, position)
        if text[position : position + 1] == "}":
            _require_end(text, position + 1, file)
            return
        position = _skip(text, _expect(text, position, ",", file))


def _skip_metadata(text: str, position: int, file: str) -> int:
    position = _skip(text, _expect(text, position, "{", file))
    if text[position : position + 1] == "}":
        return position + 1
    while True:
        _, position = _string(text, position, file)
        position = _skip(text, _expect(text, position, ":", file))
        _, position = _string(text, position, file)
        position = _skip(text, position)
        if text[position : position + 1] == "}":
            return position + 1
        position = _skip(text, _expect(text, position, ",", file))


def _fields(name: str, value: str, file: str) -> tuple[str, list[int], list[int]]:
    """Return dtype, shape and offsets of an entry."""
    usual = _USUAL_ENTRY.fullmatch(value)
    if usual is not None and usual[1] in DTYPES:
        return usual[1], [int(size) for size in usual[2].split(",") if size], [int(usual[3]), int(usual[4])]
    try:
        # Digits stay text: a number of a million digits would cost time to convert.
        fields = json.loads(
            value, object_pairs_hook=list, parse_int=str, parse_float=_Other, parse_constant=_Other
        )
    except (ValueError, RecursionError) as error:
        _damaged(file, f"JSON for {name!r}", str(error))
    keys = sorted(key for key, _ in fields)
    if keys != ["data_offsets", "dtype", "shape"]:
        _damaged(file, f"dtype, shape and data_offsets of {name!r}, each once", ", ".join(keys[:10]))
    of = dict(fields)
    dtype = of["dtype"]
    if dtype in _PACKED:
        raise UnsupportedFormatError(
            f"{file}: {name!r}: {dtype} packs several elements into a byte, and reading it needs its scales. Use an "
            "unquantised checkpoint."
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnsupportedFormatError(
            f"{file}: {name!r}: expected one of the dtypes {', '.join(DTYPES)}, got {str(dtype)[:40]!r}. Save the checkpoint in "
            "one of these."
        )
    shape = _numbers(of["shape"], f"the shape of {name!r}", file)
    return dtype, shape, _numbers(of["data_offsets"], f"the data_offsets of {name!r}", file)


def _tensor(name: str, value: str, *, file: str, data_start: int, file_bytes: int) -> StoredTensor:
    dtype, shape, offsets = _fields(name, value, file)
    if len(shape) > MAX_DIMS:
        _damaged(file, f"at most {MAX_DIMS} dims in the shape of {name!r}", f"{len(shape)}")
    if len(offsets) != 2:
        _damaged(file, f"two data_offsets of {name!r}", f"{len(offsets)}")
    start, stop = offsets
    nbytes = DTYPES[dtype].itemsize
    for size in shape:
        nbytes *= size
    if stop - start != nbytes:
        _damaged(
            file, f"{nbytes} bytes for {name!r}, {dtype} of shape {tuple(shape)}", f"data_offsets {offsets}"
        )
    if data_start + stop > file_bytes:
        _damaged(
            file,
            f"{name!r} to end at byte {data_start + stop:,}",
            f"a file of {file_bytes:,} bytes: it is truncated",
        )
    return StoredTensor(
        name=name,
        shape=tuple(shape),
        dtype=DTYPES[dtype],
        file=file,
        start=data_start + start,
        stop=data_start + stop,
    )


class _Other:
    """A number that is not whole; it has no place in a header."""

    def __init__(self, text: str) -> None:
        pass


def _numbers(value: Any, what: str, file: str) -> list[int]:
    whole = (
        isinstance(value, list)
        and len(value) <= 4096
        and all(isinstance(item, str) and _WHOLE_NUMBERS.fullmatch(item) for item in value)
    )
    if not whole:
        _damaged(file, f"{what} to be a list of whole numbers below 2^63", str(value)[:80])
    numbers = [int(item) for item in value]
    if any(number > _MAX_OFFSET for number in numbers):
        _damaged(file, f"{what} to be a list of whole numbers below 2^63", str(value)[:80])
    return numbers


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match is not None else position


def _expect(text: str, position: int, character: str, file: str) -> int:
    position = _skip(text, position)
    if text[position : position + 1] != character:
        _damaged(file, f"{character!r} in the header", _near(text, position))
    return position + 1


def _string(text: str, position: int, file: str) -> tuple[str, int]:
    start = _expect(text, position, '"', file)
    try:
        found: tuple[str, int] = scanstring(text, start, True)
    except ValueError as error:
        _damaged(file, "a string in the header", str(error))
    return found


def _require_end(text: str, position: int, file: str) -> None:
    if _skip(text, position) != len(text):
        _damaged(file, "nothing but spaces after the header's last brace", _near(text, position))


def _near(text: str, position: int) -> str:
    return f"{text[position : position + 40]!r} at byte {position}" if position < len(text) else "its end"


def _damaged(file: str, expected: str, got: str) -> NoReturn:
    raise DamagedFileError(f"{file}: expected {expected}, got {got}. {_REMEDY}")
