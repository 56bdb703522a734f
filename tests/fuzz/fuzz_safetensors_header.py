"""Coverage-guided fuzzing of the header parser; a crash is any error but our own, or memory beyond the header's bound.

    python tests/fuzz/fuzz_safetensors_header.py [-max_total_time=60]

Needs atheris (pip install atheris; Linux). Options are those of libFuzzer.
"""

from __future__ import annotations

import sys
import tracemalloc

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed: pip install atheris (Linux only). Nothing was fuzzed.")

with atheris.instrument_imports(include=["shardwise.checkpoint.safetensors_header"]):
    from shardwise.checkpoint.safetensors_header import LENGTH_BYTES, header_length, parse_header

from shardwise.errors import CheckpointError

_SEEDS = (
    b"{}",
    b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"b":{"dtype":"BF16","shape":[1,2],"data_offsets":[1,5]}}  ',
)


def parse_one(data: bytes) -> None:
    """Parse bytes as a file whose first 8 bytes are the header's length, and as a bare header."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    for header, file_bytes in _readings(data):
        try:
            for tensor in parse_header(header, file="f", file_bytes=file_bytes):
                if not LENGTH_BYTES <= tensor.start <= tensor.stop <= file_bytes:
                    raise RuntimeError(f"{tensor} lies outside of a file of {file_bytes} bytes")
        except CheckpointError:
            pass
    peak = tracemalloc.get_traced_memory()[1] - before
    if peak > 64 * len(data) + 100_000:
        raise RuntimeError(f"{peak} bytes for an input of {len(data)}")


def _readings(data: bytes) -> list[tuple[bytes, int]]:
    readings = [(data, LENGTH_BYTES + len(data) + extra) for extra in (0, 1, 5, 8)]
    try:
        length = header_length(data[:LENGTH_BYTES], file="f", file_bytes=len(data))
    except CheckpointError:
        return readings
    return [*readings, (data[LENGTH_BYTES : LENGTH_BYTES + length], len(data))]


def main() -> None:
    """Fuzz until libFuzzer's options say to stop; one minute without any."""
    arguments = (
        sys.argv
        if any(a.startswith("-max_total_time") for a in sys.argv)
        else [*sys.argv, "-max_total_time=60"]
    )
    tracemalloc.start()
    for seed in _SEEDS:
        parse_one(seed)
    atheris.Setup(arguments, parse_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
