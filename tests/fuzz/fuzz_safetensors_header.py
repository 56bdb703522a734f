"""Coverage-guided fuzzing of the header parser; a crash is any error but our own, or memory beyond the header's bound.

    python tests/fuzz/fuzz_safetensors_header.py [CORPUS] [-max_total_time=60]

`make fuzz` runs it. CORPUS is a folder that is made if need be, and keeps the inputs that reached new code. Options are those
of libFuzzer. The exit status is 0 only if nothing was found; the input that was is in a file that the output names.
"""

from __future__ import annotations

import platform
import sys
import tracemalloc
from pathlib import Path

try:
    import atheris
except ImportError:
    # The extra `dev` installs it wherever it has wheels; only elsewhere may nothing be fuzzed.
    on_linux = sys.platform == "linux" and platform.machine() == "x86_64" and sys.version_info < (3, 14)
    print(
        "nothing was fuzzed: atheris is not installed (pip install 'shardwise[dev]'; wheels for Linux x86-64)"
    )
    sys.exit(1 if on_linux else 0)

with atheris.instrument_imports(include=["shardwise.checkpoint.safetensors_header"]):
    from shardwise.checkpoint.safetensors_header import LENGTH_BYTES, header_length, parse_header

from shardwise.errors import CheckpointError

_SEEDS = (
    b"{}",
    b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"b":{"dtype":"BF16","shape":[1,2],"data_offsets":[1,5]}}  ',
    # Numbers that nothing may be allocated by.
    b'{"a":{"dtype":"F64","shape":[99999999999,0],"data_offsets":[0,0]}}',
    b'{"a":{"dtype":"U8","shape":[9999999999],"data_offsets":[0,9999999999]}}',
    b'{"a":{"dtype":"I8","shape":[' + b"1," * 60 + b'1],"data_offsets":[0,1]}}',
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
    arguments = list(sys.argv)
    if not any(a.startswith("-max_total_time") for a in arguments):
        arguments.append("-max_total_time=60")
    for folder in [Path(a) for a in arguments[1:] if not a.startswith("-")][:1]:
        folder.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(_SEEDS):
            (folder / f"seed-{number}").write_bytes(seed)
            (folder / f"seed-file-{number}").write_bytes(len(seed).to_bytes(LENGTH_BYTES, "little") + seed)
    tracemalloc.start()
    for seed in _SEEDS:
        parse_one(seed)
    atheris.Setup(arguments, parse_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
