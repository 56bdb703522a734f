"""Reads past the page cache, and the pages of a file."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shardwise as sw
from shardwise.checkpoint import Run, SafetensorsSource, ranged_file
from shardwise.checkpoint.ranged_file import BounceBuffers, RangedFile

_MEBIBYTE = 2**20
needs_direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT")


@pytest.fixture
def content(tmp_path: Path) -> tuple[Path, bytes]:
    path, made = tmp_path / "x.bin", os.urandom(_MEBIBYTE)
    path.write_bytes(made)
    return path, made


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is in the page cache, although it has just been written."""
    monkeypatch.setattr(RangedFile, "_is_cached", lambda *_: False)


def opened(path: Path, *, bounce: BounceBuffers | None = None) -> RangedFile:
    return RangedFile(path, bounce=bounce or BounceBuffers(nbytes=64 * 1024))


def descriptors_of(path: Path) -> int:
    """Count the open descriptors of a file; what else is open may be another test's, and be collected meanwhile."""
    if not os.path.isdir("/proc/self/fd"):
        return 0
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{name}") == str(path.resolve())
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere pages may be reserved")
def test_a_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "sparse.bin"
    path.touch()
    os.truncate(path, 2**42)
    assert opened(path).map() is not None


@needs_direct
@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system does not tell what is cached")
def test_what_is_in_the_page_cache_comes_from_there(
    content: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = content
    file = opened(path)
    real, read_from = os.preadv, []

    def noted(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if not flags:
            read_from.append(fd)
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", noted)

    def read() -> set[int]:
        read_from.clear()
        got = bytearray(len(expected))
        file.read_into(0, memoryview(got))
        assert bytes(got) == expected
        return set(read_from)

    os.fsync(file.fileno())
    assert read() == {file.fileno()}
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if file._is_cached(0, len(expected)):
        pytest.skip("this file system keeps what it is told to forget")
    assert read() == {file._direct_fd}
    os.pread(file.fileno(), len(expected), 0)
    assert read() == {file.fileno()}
    file.close()


@needs_direct
@pytest.mark.usefixtures("cold")
def test_a_file_system_that_refuses_direct_reads_does_so_on_many_threads_at_once(
    content: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = content
    file = opened(path)
    assert file._direct_fd is not None
    assert descriptors_of(path) == (2 if os.path.isdir("/proc/self/fd") else 0)
    together = threading.Barrier(4, timeout=5)
    real, closed, refused = os.preadv, [], file._direct_fd
    real_close = os.close

    def refuse(fd: int, buffers: Any, offset: int) -> int:
        if fd != refused:
            return real(fd, buffers, offset)
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait()  # all have the descriptor before the first one hears of the refusal
        raise OSError(22, "Invalid argument")

    def close(fd: int) -> None:
        closed.append(fd)
        real_close(fd)

    monkeypatch.setattr(os, "preadv", refuse)
    monkeypatch.setattr(os, "close", close)

    def read(_: int) -> bytes:
        got = bytearray(len(expected))
        file.read_into(0, memoryview(got))
        return bytes(got)

    with ThreadPoolExecutor(4) as pool:
        assert all(got == expected for got in pool.map(read, range(4)))
    assert closed == []  # a descriptor that another thread reads from may not go
    file.close()
    file.close()
    assert sorted(closed) == sorted({*closed})
    assert descriptors_of(path) == 0


@needs_direct
@pytest.mark.usefixtures("cold")
def test_one_bounce_buffer_serves_all_files_of_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        save_file({str(number): torch.arange(3000)}, tmp_path / f"{number}.safetensors")
    made = []
    real = ranged_file.mmap.mmap

    def counted(fd: int, nbytes: int, *rest: Any, **options: Any) -> Any:
        if fd == -1:
            made.append(nbytes)
        return real(fd, nbytes, *rest, **options)

    source = SafetensorsSource.open(tmp_path, direct_io=True)
    monkeypatch.setattr(ranged_file.mmap, "mmap", counted)

    def read(name: str) -> bytes:
        stored, got = source.tensors[name], bytearray(24_000)
        source.read_into(stored.file, stored.start, memoryview(got))
        return bytes(got)

    with ThreadPoolExecutor(2) as pool:
        values = list(pool.map(read, [str(number % 6) for number in range(24)]))
    source.close()
    assert {bytes(value) for value in values} == {torch.arange(3000).numpy().tobytes()}
    assert 1 <= len(made) <= 2  # and not one for each of six files
    assert set(made) == {_MEBIBYTE}


@needs_direct
def test_the_direct_descriptor_must_be_of_the_same_file(
    content: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = content
    real = os.open

    def replace(name: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            path.unlink()
            path.write_bytes(b"other")
        return real(name, flags, *rest)

    monkeypatch.setattr(os, "open", replace)
    file = opened(path)
    assert file._direct_fd is None
    file.close()


@needs_direct
@pytest.mark.parametrize("direct_io", [False, True])
def test_materialize_reads_past_the_page_cache_where_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_io: bool
) -> None:
    save_file({"weight": torch.ones(64, 64)}, tmp_path / "model.safetensors")
    flags_seen = []
    real = os.open

    def noted(name: Any, flags: int, *rest: Any) -> int:
        if str(name).endswith(".safetensors"):
            flags_seen.append(bool(flags & os.O_DIRECT))
        return real(name, flags, *rest)

    monkeypatch.setattr(os, "open", noted)
    model = nn.Linear(64, 64, bias=False, device="meta")
    sw.materialize(model, tmp_path, direct_io=direct_io)
    assert any(flags_seen) is direct_io
    assert model.weight.eq(1).all()
    mapped = (
        str(tmp_path) in Path("/proc/self/maps").read_text()  # and not another test's
        if os.path.exists("/proc/self/maps")
        else None
    )
    assert mapped in (None, not direct_io)  # what is mapped passes through the page cache


def test_direct_io_where_it_cannot_be(tmp_path: Path) -> None:
    model = nn.Linear(2, 2, bias=False, device="meta")
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(sw.ConfigurationError, match="direct_io=True and cpu_storage='map'"):
        sw.materialize(model, tmp_path, direct_io=True, cpu_storage="map")
    for checkpoint in ({"weight": torch.ones(2, 2)}, SafetensorsSource.open(tmp_path), None):
        with pytest.raises(sw.ConfigurationError, match="direct_io=True: expected a directory"):
            sw.materialize(model, checkpoint, direct_io=True)
    assert model.weight.is_meta


# --- pages ---


def test_two_models_of_one_open_source_do_not_share_memory(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    source = SafetensorsSource.open(tmp_path)
    models = [nn.Linear(4, 4, bias=False, device="meta") for _ in range(3)]
    for model in models[:2]:
        sw.materialize(model, source)
    with torch.no_grad():
        models[0].weight.zero_()
    sw.materialize(models[2], source)
    assert models[0].weight.eq(0).all()
    assert models[1].weight.eq(1).all()
    assert models[2].weight.eq(1).all()
    source.close()


def test_one_mapping_for_each_file_and_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        save_file({f"{number}.{i}": torch.ones(8) for i in range(50)}, tmp_path / f"{number}.safetensors")
    source = SafetensorsSource.open(tmp_path)
    runs = [Run(file=t.file, start=t.start, dtype=t.dtype, numel=8) for t in source.tensors.values()]
    made = []
    real = RangedFile.map
    monkeypatch.setattr(RangedFile, "map", lambda self: made.append(self.path.name) or real(self))
    assert all(tensor is not None and tensor.eq(1).all() for tensor in source.mapped(runs))
    assert sorted(made) == ["0.safetensors", "1.safetensors"]
    source.close()


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system does not tell what is cached")
def test_what_was_read_past_the_page_cache_is_not_taken_for_cached_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking for a page may bring it into the cache. The cache is played: what a real one keeps is not ours to decide."""
    path, expected = tmp_path / "x.bin", os.urandom(16 * _MEBIBYTE)
    path.write_bytes(expected)
    monkeypatch.setattr(RangedFile, "_open_direct", lambda file: os.dup(file._fd))
    file = opened(path, bounce=BounceBuffers(nbytes=_MEBIBYTE))
    real, read_from, cached = os.preadv, [], set()

    def played(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        page = offset // mmap.PAGESIZE
        if flags == os.RWF_NOWAIT and page not in cached:
            cached.add(page)
            raise BlockingIOError(errno.EAGAIN, "not cached")
        if not flags:
            read_from.append(fd)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", played)
    got = bytearray(len(expected))
    for _ in range(3):
        file.read_into(0, memoryview(got))
        assert bytes(got) == expected
    assert cached
    assert set(read_from) == {file._direct_fd}
    file.close()
