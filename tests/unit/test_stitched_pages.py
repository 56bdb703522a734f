"""Pages of files side by side as one tensor."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shardwise.checkpoint import Run, SafetensorsSource, StateDictSource, stitched, stitched_pages
from shardwise.checkpoint.ranged_file import RangedFile
from shardwise.checkpoint.stitched_pages import stitched_pages as stitch

PAGE = mmap.PAGESIZE
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are stitched on Linux")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[RangedFile, bytes]:
    path, content = tmp_path_factory.mktemp("stitched") / "x.bin", os.urandom(64 * PAGE)
    path.write_bytes(content)
    return RangedFile(path, bounce=None), content


@given(data=st.data(), shift=st.integers(0, PAGE - 1))
@settings(max_examples=300)
def test_runs_of_any_length_follow_each_other(
    file: tuple[RangedFile, bytes], data: st.DataObject, shift: int
) -> None:
    """Also runs within a page, over an end of one, and of whole pages alone."""
    opened, content = file
    lengths = data.draw(
        st.lists(
            st.one_of(
                st.integers(1, 64),
                st.integers(PAGE - 2, PAGE + 2),
                st.integers(1, 5 * PAGE),
                st.just(2 * PAGE),
            ),
            min_size=1,
            max_size=6,
        )
    )
    parts, at = [], shift
    for length in lengths:
        first_page = data.draw(st.integers(0, (len(content) - length - at % PAGE) // PAGE))
        parts.append((opened, first_page * PAGE + at % PAGE, length))
        at += length
    found = stitch(parts, torch.uint8)
    assert found is not None
    assert found.numpy().tobytes() == b"".join(content[start : start + n] for _, start, n in parts)


def test_what_is_written_stays_private(file: tuple[RangedFile, bytes]) -> None:
    opened, content = file
    parts = [(opened, 100, 3 * PAGE), (opened, 10 * PAGE + 100, 3 * PAGE), (opened, 100, PAGE)]  # one twice
    first, second = stitch(parts, torch.uint8), stitch(parts, torch.uint8)
    assert first is not None
    assert second is not None
    first[: 3 * PAGE] = 7
    expected = content[100 : 100 + 3 * PAGE] + content[10 * PAGE + 100 :][: 3 * PAGE] + content[100:][:PAGE]
    assert second.numpy().tobytes() == expected
    assert (
        first[3 * PAGE :].numpy().tobytes() == expected[3 * PAGE :]
    )  # the same bytes of the file, elsewhere
    assert opened.path.read_bytes() == content


def test_runs_that_do_not_fit_to_each_other_are_not_stitched(file: tuple[RangedFile, bytes]) -> None:
    opened, _ = file
    assert stitch([(opened, 0, 3 * PAGE), (opened, 5 * PAGE + 8, 3 * PAGE)], torch.uint8) is None
    assert stitch([], torch.uint8) is None


@pytest.mark.skipif(not os.path.exists("/proc/self/pagemap"), reason="the system does not tell pages apart")
def test_almost_nothing_is_anonymous(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(64 * 2**20))
    opened = RangedFile(path, bounce=None)
    size = 2**19
    parts = [(opened, 100 + 2 * number * size, size) for number in range(60)]
    found = stitch(parts, torch.uint8)
    assert found is not None
    assert int(found.sum()) == 0  # every page was touched
    assert anonymous_pages_of(found) <= 61
    found.fill_(1)
    assert anonymous_pages_of(found) >= found.nbytes // PAGE


def test_a_source_stitches_what_its_files_hold(tmp_path: Path) -> None:
    values = {f"w{number}": torch.randn(64, 512) for number in range(4)}
    save_file(values, tmp_path / "model.safetensors")
    source = SafetensorsSource.open(tmp_path / "model.safetensors", name="x")
    stored = [source.tensors[name] for name in ("w3", "w0")]
    runs = [Run(file=s.file, start=s.start, dtype=s.dtype, numel=64 * 512) for s in stored]
    beyond = [Run(file=s.file, start=s.start, dtype=s.dtype, numel=4 * 64 * 512) for s in stored]
    found, nothing = stitched(source, [runs, beyond])
    assert nothing is None
    assert found is not None
    source.close()  # pages stay
    assert torch.equal(found, torch.cat([values["w3"], values["w0"]]).view(-1))


def test_a_source_without_files_stitches_nothing() -> None:
    source = StateDictSource({"w": torch.zeros(4)})
    run = Run(file=source.tensors["w"].file, start=0, dtype=torch.float32, numel=4)
    assert stitched(source, [[run, run]]) == [None]


def test_nothing_is_stitched_where_the_system_cannot(
    file: tuple[RangedFile, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stitched_pages, "_map_over", lambda: lambda *_: False)  # as at the limit of mappings
    assert stitch([(file[0], 0, 3 * PAGE)], torch.uint8) is None
    monkeypatch.setattr(stitched_pages, "_map_over", lambda: None)
    assert stitch([(file[0], 0, 3 * PAGE)], torch.uint8) is None


def anonymous_pages_of(tensor: torch.Tensor) -> int:
    """Return how many of a tensor's pages no file backs; what the rest of the process has in memory changes at any time.

    Source: `Documentation/admin-guide/mm/pagemap.rst` of the Linux kernel; bits 61: of a file, 62: swapped, 63: present.
    """
    first, last = tensor.data_ptr() // PAGE, (tensor.data_ptr() + tensor.nbytes - 1) // PAGE
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        pages = np.frombuffer(file.read(8 * (last - first + 1)), dtype=np.uint64)
    assert len(pages) == last - first + 1
    return int(np.count_nonzero((pages >> 62 != 0) & (pages >> 61 & 1 == 0)))
