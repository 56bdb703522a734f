"""The header parser: what the format allows, and everything that it does not."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from shardwise.checkpoint.safetensors_header import (
    DTYPES,
    LENGTH_BYTES,
    header_length,
    parse_header,
)
from shardwise.checkpoint.stored_tensor import StoredTensor
from shardwise.errors import CheckpointError, DamagedFileError, UnsupportedFormatError


def parse(header: bytes | str | dict[str, Any], data_bytes: int = 0) -> tuple[StoredTensor, ...]:
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return parse_header(raw, file="f.safetensors", file_bytes=LENGTH_BYTES + len(raw) + data_bytes)


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def parse_file(content: bytes) -> tuple[StoredTensor, ...]:
    length = header_length(content[:LENGTH_BYTES], file="f", file_bytes=len(content))
    return parse_header(content[LENGTH_BYTES : LENGTH_BYTES + length], file="f", file_bytes=len(content))


# --- what is allowed ---

tensors_by_name = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool]),
        st.lists(st.integers(0, 4), max_size=3),
    ),
    max_size=5,
)


@given(
    described=tensors_by_name,
    metadata=st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
def test_what_the_safetensors_package_writes(
    described: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str] | None
) -> None:
    if not described:
        metadata = None  # the package writes a header that is not JSON then
    try:
        content = save(
            {n: torch.zeros(shape, dtype=dtype) for n, (dtype, shape) in described.items()}, metadata
        )
    except UnicodeEncodeError:  # a lone surrogate, which the package cannot write
        return
    found = {tensor.name: tensor for tensor in parse_file(content)}
    assert {n: (t.dtype, list(t.shape)) for n, t in found.items()} == described


def test_values_lie_where_the_header_says(tmp_path: Path) -> None:
    values = {"b": torch.arange(6.0).view(2, 3), "a": torch.arange(5, dtype=torch.int16)}
    save_file(values, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    for tensor in parse_file(content):
        data = bytearray(content[tensor.start : tensor.stop])
        assert torch.equal(torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape), values[tensor.name])


@given(
    described=st.lists(
        st.tuples(
            st.sampled_from([*sorted(DTYPES), "F4", "X9"]),
            st.lists(st.integers(0, 5) | st.integers(2**62, 2**64), max_size=3),
            st.integers(-1, 1) | st.integers(2**62, 2**64),
        ),
        max_size=4,
    )
)
def test_spaces_change_nothing(described: list[tuple[str, list[int], int]]) -> None:
    """The usual spelling of an entry is read in a shorter way than any other."""
    header: dict[str, Any] = {}
    position = 0
    for index, (dtype, shape, off_by) in enumerate(described):
        nbytes = math.prod(shape) * (DTYPES[dtype].itemsize if dtype in DTYPES else 1)
        header[f"t{index}"] = entry(dtype, shape, (position, position + nbytes + off_by))
        position += nbytes
    results = []
    for separators in ((",", ":"), (", ", ": ")):
        text = json.dumps(header, separators=separators).ljust(
            2000
        )  # of one length, so that offsets are the same
        try:
            results.append(repr(parse(text, min(position, 10_000))))
        except CheckpointError as error:
            results.append(f"{type(error).__name__}: {error}")
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype(dtype: str) -> None:
    size = DTYPES[dtype].itemsize
    assert parse({"x": entry(dtype, (3,), (0, 3 * size))}, 3 * size)[0].dtype == DTYPES[dtype]


@pytest.mark.parametrize(
    "header",
    [
        "{}",
        '{"__metadata__":{}}   ',
        '{ "__metadata__" : { "a{" : "}\\"" , "b":"" } , "x" : { "shape" : [ ] , "dtype":"U8","data_offsets":[0,1] } }\n',
        '{"x\\u00e9":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}',
    ],
)
def test_spaces_escapes_and_metadata(header: str) -> None:
    parse(header, 1 if "U8" in header else 0)


# --- what is not ---

HUGE = 2**63
BAD = {
    "empty": (b"", 0, "starts with '{'"),
    "not json": (b"{]", 0, "in the header"),
    "an array": (b"[]", 0, "starts with '{'"),
    "a space first": (b" {}", 0, "starts with '{'"),
    "not utf-8": (b'{"\xff":1}', 0, "UTF-8"),
    "cut short": (b'{"x":{"dtype":"U8"', 0, "in braces"),
    "more after it": (b"{}x", 0, "last brace"),
    "a control character": (b'{"a\n":1}', 0, "string"),
    "nested in an entry": (b'{"x":{"dtype":{"a":1},"shape":[],"data_offsets":[0,0]}}', 0, "in braces"),
    "deep nesting": (b'{"x":' + b"[" * 100_000, 0, "in braces"),
    "deep nesting in an entry": (b'{"x":{"dtype":' + b"[" * 8000 + b"}}", 0, "JSON"),
    "nested metadata": (b'{"__metadata__":{"a":{}}}', 0, "in the header"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', 0, "twice"),
    "a tensor twice": (
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        2,
        "twice",
    ),
    "a key twice": (b'{"x":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1, "each once"),
    "a key missing": (b'{"x":{"dtype":"U8","shape":[]}}', 0, "each once"),
    "a key too many": (b'{"x":{"dtype":"U8","shape":[],"data_offsets":[0,1],"y":1}}', 1, "each once"),
    "an overlap": ({"x": entry(), "y": entry(offsets=(4, 12))}, 12, "an overlap"),
    "a hole": ({"x": entry(), "y": entry(offsets=(12, 20))}, 20, "a hole"),
    "a hole at the start": ({"x": entry(offsets=(4, 12))}, 12, "a hole"),
    "past the end": ({"x": entry()}, 7, "truncated"),
    "bytes left over": ({"x": entry()}, 9, "no tensor owns"),
    "stop before start": ({"x": entry(offsets=(8, 0))}, 8, "8 bytes for 'x'"),
    "negative": ({"x": entry(offsets=(-8, 0))}, 8, "whole numbers"),
    "beyond 2^63": ({"x": entry(shape=(HUGE // 4,), offsets=(0, HUGE))}, 8, "below 2^63"),
    "a million digits": (
        b'{"x":{"dtype":"U8","shape":[' + b"9" * 8000 + b'],"data_offsets":[0,1]}}',
        1,
        "below 2^63",
    ),
    "a product beyond 2^63": ({"x": entry(shape=(2**40, 2**40), offsets=(0, 8))}, 8, "bytes for 'x'"),
    "a fraction": ({"x": entry(shape=(2.0,))}, 8, "whole numbers"),
    "a truth value": ({"x": entry(shape=(True,))}, 8, "whole numbers"),
    "a text for a number": ({"x": entry(shape=("x",))}, 8, "whole numbers"),
    "infinity": (b'{"x":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', 8, "whole numbers"),
    "three offsets": ({"x": entry(offsets=(0, 4, 8))}, 8, "two data_offsets"),
    "too many dims": ({"x": entry("U8", (1,) * 65, (0, 1))}, 1, "64 dims"),
    "too few bytes for the shape": ({"x": entry(shape=(3,))}, 8, "12 bytes for 'x'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str) -> None:
    header, data_bytes, text = BAD[case]
    with pytest.raises(DamagedFileError) as caught:
        parse(header, data_bytes)
    message = str(caught.value)
    assert message.startswith("f.safetensors: expected ")
    assert text in message
    assert len(message) < 600
    assert "Get the file again" in message


@pytest.mark.parametrize(
    ("dtype", "text"), [("F4", "packs several"), ("Q9", "expected one of the dtypes"), (7, "dtypes")]
)
def test_dtypes_that_are_not_read(dtype: Any, text: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=text):
        parse({"x": entry(dtype)}, 8)


@pytest.mark.parametrize(
    ("start", "file_bytes", "text"),
    [
        (b"", 0, "at least 8 bytes"),
        (b"\0\0\0", 3, "at least 8 bytes"),
        (struct.pack("<Q", 0), 100, "a length of 0"),
        (struct.pack("<Q", 93), 100, "truncated"),
        (struct.pack("<Q", 2**64 - 1), 100, "100,000,000"),
        (struct.pack("<Q", 100_000_001), 10**12, "100,000,000"),
    ],
)
def test_lengths_that_cannot_be(start: bytes, file_bytes: int, text: str) -> None:
    with pytest.raises(DamagedFileError, match=text):
        header_length(start, file="f", file_bytes=file_bytes)


def test_a_pointer_of_git_lfs_is_called_one() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n"
    with pytest.raises(DamagedFileError, match=r"pointer that Git LFS keeps.*Run git lfs pull"):
        header_length(pointer[:LENGTH_BYTES], file="f", file_bytes=len(pointer))


@given(
    position=st.integers(0, 400),
    replacement=st.binary(max_size=6),
    removed=st.integers(0, 6),
)
@settings(max_examples=400)
def test_a_changed_file_is_the_same_or_refused(position: int, replacement: bytes, removed: int) -> None:
    content = save({"a": torch.ones(3), "b.c": torch.ones(2, 2, dtype=torch.bfloat16)}, {"format": "pt"})
    position %= len(content)
    changed = content[:position] + replacement + content[position + removed :]
    try:
        tensors = parse_file(changed)
    except CheckpointError:
        return
    assert all(0 <= t.start <= t.stop <= len(changed) for t in tensors)


@pytest.mark.parametrize(
    "hostile",
    [
        b'{"__metadata__":{' + b'"":"",' * 50_000,
        b'{"x":{"dtype":"F32","shape":[' + b"1," * 150_000,
        b'{"x":' + b"{" * 300_000,
        b'{"' + b"a" * 300_000,
        b"{" + b"[" * 300_000,
    ],
    ids=["metadata", "shape", "braces", "name", "brackets"],
)
def test_memory_stays_near_the_headers_size(hostile: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFileError):
            parse(hostile)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(hostile)


def test_a_real_header_costs_a_small_multiple_of_its_size() -> None:
    header = json.dumps(
        {f"layers.{i}.weight": entry(offsets=(8 * i, 8 * i + 8)) for i in range(5000)}
    ).encode()
    tracemalloc.start()
    try:
        assert len(parse(header, 40_000)) == 5000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * len(header)
