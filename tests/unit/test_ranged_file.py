"""Reads past the page cache, and the pages of a file."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import sys
import threading
from collections.abc import Iterable
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
from tests.unit.descriptors import open_in

_MEBIBYTE = 2**20
needs_direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT")
tells_what_is_cached = pytest.mark.skipif(
    not hasattr(os, "RWF_NOWAIT"), reason="the system does not tell what is cached"
)


@pytest.fixture
def content(tmp_path: Path) -> tuple[Path, bytes]:
    path, made = tmp_path / "x.bin", os.urandom(_MEBIBYTE)
    path.write_bytes(made)
    return path, made


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is in the page cache, although it has just been written."""
    monkeypatch.setattr(RangedFile, "_is_cached", lambda *_: False)


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a descriptor for reads past the page cache, also on a file system that gives none."""
    monkeypatch.setattr(RangedFile, "_open_direct", lambda file: os.dup(file._fd))


class PlayedCache:
    """`os.preadv` with a page cache that is played: what a real one keeps is not ours to decide.

    Attributes:
        pages: In it, by number. Looking for a page brings it in.
        read_from: Descriptors of the reads that were no looks.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pages: set[int] = set()
        self.read_from: list[int] = []
        self._preadv = os.preadv
        monkeypatch.setattr(os, "preadv", self.preadv)
        monkeypatch.setattr(ranged_file.secrets, "randbelow", random.Random(0).randrange)

    def preadv(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        page = offset // mmap.PAGESIZE
        if flags and page not in self.pages:
            self.pages.add(page)
            raise BlockingIOError(errno.EAGAIN, "not cached")
        if not flags:
            self.read_from.append(fd)
        return self._preadv(fd, buffers, offset)


def opened(path: Path, *, bounce: BounceBuffers | None = None) -> RangedFile:
    return RangedFile(path, bounce=bounce or BounceBuffers(nbytes=64 * 1024))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere pages may be reserved")
def test_a_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "sparse.bin"
    path.touch()
    os.truncate(path, 2**42)
    assert opened(path).map() is not None


@tells_what_is_cached
@pytest.mark.usefixtures("direct")
def test_what_is_in_the_page_cache_comes_from_there(
    content: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = content
    file, cache = opened(path), PlayedCache(monkeypatch)
    every_page = range(len(expected) // mmap.PAGESIZE)

    def read(pages: Iterable[int]) -> set[int]:
        cache.pages = set(pages)
        cache.read_from.clear()
        got = bytearray(len(expected))
        file.read_into(0, memoryview(got))
        assert bytes(got) == expected
        return set(cache.read_from)

    assert read(every_page) == {file.fileno()}
    assert read(()) == {file._direct_fd}
    assert read(every_page) == {file.fileno()}
    file.close()


@pytest.mark.usefixtures("cold", "direct")
def test_a_file_system_that_refuses_direct_reads_does_so_on_many_threads_at_once(
    content: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = content
    file = opened(path)
    own = {file.fileno(), file._direct_fd}
    assert open_in(path) == ([path.resolve()] * 2 if os.path.isdir("/proc/self/fd") else [])
    together = threading.Barrier(4, timeout=30)
    real, closed, refused = os.preadv, [], file._direct_fd
    real_close = os.close

    def refuse(fd: int, buffers: Any, offset: int) -> int:
        if fd != refused:
            return real(fd, buffers, offset)
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait()  # all have the descriptor before the first one hears of the refusal
        raise OSError(22, "Invalid argument")

    def close(fd: int) -> None:
        closed.extend({fd} & own)  # and not what the collector closes meanwhile
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
    assert sorted(closed) == sorted(own)
    assert open_in(path) == []


@pytest.mark.usefixtures("cold", "direct")
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


@tells_what_is_cached
@pytest.mark.usefixtures("direct")
def test_what_was_read_past_the_page_cache_is_not_taken_for_cached_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = tmp_path / "x.bin", os.urandom(16 * _MEBIBYTE)
    path.write_bytes(expected)
    file, cache = opened(path, bounce=BounceBuffers(nbytes=_MEBIBYTE)), PlayedCache(monkeypatch)
    got = bytearray(len(expected))
    for _ in range(3):
        file.read_into(0, memoryview(got))
        assert bytes(got) == expected
    assert cache.pages
    assert set(cache.read_from) == {file._direct_fd}
    file.close()
