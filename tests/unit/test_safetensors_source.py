"""Files and directories as sources, and every way in which they can be broken."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardwise as sw
from shardwise.checkpoint import SafetensorsSource, Source, locate
from shardwise.errors import (
    ChangedFileError,
    CheckpointError,
    DamagedFileError,
    UnsupportedFormatError,
)
from shardwise.profiling import own_node
from shardwise.testing.source_tests import SourceTests
from tests.unit.descriptors import open_in

INDEX = "model.safetensors.index.json"


def two_files(directory: Path) -> Path:
    save_file({"a": torch.ones(4, 2), "b": torch.zeros(3)}, directory / "one.safetensors")
    save_file({"c": torch.arange(5)}, directory / "two.safetensors")
    write_index(directory, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return directory


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


class TestOneFile(SourceTests):
    def make(self, values: Mapping[str, torch.Tensor], directory: Path) -> Source:
        save_file(dict(values), directory / "x.safetensors")
        return SafetensorsSource.open(directory / "x.safetensors")


class TestDirectIO(SourceTests):
    def make(self, values: Mapping[str, torch.Tensor], directory: Path) -> Source:
        save_file(dict(values), directory / "x.safetensors")
        return SafetensorsSource.open(directory, direct_io=True)


class TestDescribedByAnotherRank(SourceTests):
    def make(self, values: Mapping[str, torch.Tensor], directory: Path) -> Source:
        save_file({name: values[name] for name in values if name != "half"}, directory / "1.safetensors")
        save_file({"half": values["half"]}, directory / "2.safetensors")
        return SafetensorsSource.from_description(
            SafetensorsSource.open(directory).describe(rank=0), directory
        )


def test_direct_io_over_more_than_one_aligned_buffer(tmp_path: Path) -> None:
    values = torch.randint(0, 255, (9 * 2**20 + 13,), dtype=torch.uint8)
    save_file({"x": values}, tmp_path / "x.safetensors")
    source = SafetensorsSource.open(tmp_path, direct_io=True)
    stored = source.tensors["x"]
    got = bytearray(stored.nbytes - 7)
    source.read_into(stored.file, stored.start + 7, memoryview(got))
    assert torch.equal(torch.frombuffer(got, dtype=torch.uint8), values[7:])
    source.close()


def test_a_file_is_opened_when_something_of_it_is_wanted(tmp_path: Path) -> None:
    source = SafetensorsSource.open(two_files(tmp_path))
    assert source.opened_files == frozenset()
    source.read_into("two.safetensors", source.tensors["c"].start, memoryview(bytearray(8)))
    assert source.opened_files == {"two.safetensors"}
    if os.path.isdir("/proc/self/fd"):
        assert [path.name for path in open_in(tmp_path)] == ["two.safetensors"]
    source.close()
    assert open_in(tmp_path) == []


# --- directories ---


def no_index(directory: Path) -> Path:
    two_files(directory)
    (directory / INDEX).unlink()
    return directory


def test_files_without_an_index(tmp_path: Path) -> None:
    assert set(SafetensorsSource.open(no_index(tmp_path)).tensors) == {"a", "b", "c"}


def test_all_tensors_in_one_file_too_and_in_an_index_of_that_file(tmp_path: Path) -> None:
    both = two_files(tmp_path)
    values = {
        name: value
        for file in ("one", "two")
        for name, value in load_file(both / f"{file}.safetensors").items()
    }
    save_file(values, both / "model.safetensors")
    assert {t.file for t in SafetensorsSource.open(both).tensors.values()} == {
        "one.safetensors",
        "two.safetensors",
    }
    write_index(both, dict.fromkeys(values, "model.safetensors"))
    assert {t.file for t in SafetensorsSource.open(both).tensors.values()} == {"model.safetensors"}


def test_links_of_a_hub_cache_are_its_own(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/0123"))
    linked = tmp_path / "latest"
    linked.symlink_to(snapshot)
    for directory in (snapshot, linked):
        source = SafetensorsSource.open(directory)
        source.read_into("model.safetensors", source.tensors["a"].start, memoryview(bytearray(8)))
        source.close()


Breaker = Callable[[Path], None]


def edit_index(change: Callable[[dict[str, Any]], Any]) -> Breaker:
    def apply(directory: Path) -> None:
        document = json.loads((directory / INDEX).read_text())
        changed = change(document["weight_map"])
        write_index(directory, document["weight_map"] if changed is None else changed)

    return apply


def link_outside(directory: Path) -> None:
    target = directory.parent / "elsewhere.safetensors"
    (directory / "two.safetensors").rename(target)
    (directory / "two.safetensors").symlink_to(target)


def truncate(directory: Path) -> None:
    with open(directory / "one.safetensors", "r+b") as file:
        file.truncate(file.seek(0, 2) - 1)


def in_two_files(directory: Path) -> None:
    save_file({"c": torch.arange(5), "a": torch.ones(4, 2)}, directory / "two.safetensors")


def config(text: str) -> Breaker:
    return lambda directory: (directory / "config.json").write_text(text) and None  # type: ignore[return-value]


BROKEN: dict[str, tuple[Breaker, type[CheckpointError], list[str]]] = {
    "truncated": (truncate, DamagedFileError, ["one.safetensors", "truncated"]),
    "empty file": (
        lambda d: (d / "one.safetensors").write_bytes(b"") and None,
        DamagedFileError,
        ["one.safetensors"],
    ),  # type: ignore[return-value]
    "in the index, not in the file": (
        edit_index(lambda m: m.__setitem__("d", "two.safetensors")),
        DamagedFileError,
        ["expected d in two.safetensors", "no file"],
    ),
    "in another file": (
        edit_index(lambda m: m.__setitem__("a", "two.safetensors")),
        DamagedFileError,
        ["expected a in two.safetensors", "one.safetensors"],
    ),
    "file not on disk": (
        lambda d: (d / "two.safetensors").unlink(),
        CheckpointError,
        ["two.safetensors", "Is the download complete"],
    ),
    "in two files": (in_two_files, DamagedFileError, ["a in one.safetensors and two.safetensors"]),
    "a path upwards": (
        edit_index(lambda m: m.__setitem__("a", "../one.safetensors")),
        CheckpointError,
        ["'../one.safetensors'", "inside"],
    ),
    "an absolute path": (
        edit_index(lambda m: m.__setitem__("a", "/etc/passwd")),
        CheckpointError,
        ["'/etc/passwd'"],
    ),
    "a NUL": (
        edit_index(lambda m: m.__setitem__("a", "one\0.safetensors")),
        CheckpointError,
        ["inside the checkpoint"],
    ),
    "a backslash": (
        edit_index(lambda m: m.__setitem__("a", "..\\one.safetensors")),
        CheckpointError,
        ["inside the checkpoint"],
    ),
    "a number for a file": (edit_index(lambda m: m.__setitem__("a", 3)), CheckpointError, ["got 3"]),
    "no weight_map": (edit_index(lambda m: []), DamagedFileError, ["weight_map"]),
    "index not JSON": (lambda d: (d / INDEX).write_text("{") and None, DamagedFileError, ["index in JSON"]),  # type: ignore[return-value]
    "index with a key twice": (
        lambda d: (
            (d / INDEX).write_text('{"weight_map":{"a":"one.safetensors","a":"two.safetensors"}}') and None
        ),  # type: ignore[return-value]
        DamagedFileError,
        ["'a' twice"],
    ),
    "a stray file that transformers would take": (
        lambda d: save_file({"a": torch.ones(4, 3), "b": torch.zeros(3)}, d / "model.safetensors"),
        DamagedFileError,
        ["model.safetensors: expected no such file beside an index", "(a)", "Remove the one"],
    ),
    "a stray file that is none": (
        lambda d: (d / "model.safetensors").write_bytes(b"") and None,
        DamagedFileError,
        ["model.safetensors"],
    ),
    "a link that leaves": (link_outside, CheckpointError, ["two.safetensors", "elsewhere.safetensors"]),
    "config not JSON": (config("{"), DamagedFileError, ["config.json"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_refused_before_anything_is_allocated(tmp_path: Path, case: str) -> None:
    directory = _made(tmp_path)
    breaker, kind, texts = BROKEN[case]
    breaker(directory)
    model = model_of({"a": (4, 2), "b": (3,)})
    with pytest.raises(kind) as caught:
        sw.materialize(model, directory)
    for text in texts:
        assert text in str(caught.value)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert open_in(tmp_path) == []


def _made(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    return two_files(directory)


def model_of(shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
    model = torch.nn.Module()
    for name, shape in shapes.items():
        setattr(model, name, torch.nn.Parameter(torch.empty(shape, device="meta")))
    return model


def test_only_pickle_files(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedFormatError) as caught:
        SafetensorsSource.open(tmp_path)
    assert "pytorch_model.bin" in str(caught.value)
    assert "defer=False" in str(caught.value)


def test_a_config_in_place_of_its_directory(tmp_path: Path) -> None:
    config = two_files(tmp_path) / "config.json"
    config.write_text("{}")
    with pytest.raises(UnsupportedFormatError) as caught:
        SafetensorsSource.open(config)
    assert str(caught.value).startswith(f"{config}: expected a checkpoint's directory or a .safetensors file")
    assert str(caught.value).endswith(f"Give the directory: {tmp_path}")


def test_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected safetensors files, got none"):
        SafetensorsSource.open(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(tmp_path: Path) -> None:
    directory = _made(tmp_path)
    (directory / "one.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match="EACCES"):
        SafetensorsSource.open(directory)


# --- files that change ---


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path: save_file({"c": torch.arange(6)}, path), "got one of 112 bytes in place of 104. "),
        (lambda path: save_file({"d": torch.arange(5)}, path), "got one whose header is another: "),
        (
            lambda path: os.utime(path, ns=(1, 1)),
            "got one of the same size that was written at another time. ",
        ),
    ],
    ids=["size", "header", "time"],
)
def test_a_file_that_another_rank_has_otherwise(
    tmp_path: Path, change: Callable[[Path], object], told: str
) -> None:
    """Both paths are named, and what differs is said in words."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    described = SafetensorsSource.open(two_files(theirs)).describe(rank=3)
    shutil.copytree(theirs, ours)
    change(ours / "two.safetensors")
    source = SafetensorsSource.from_description(described, ours)
    with pytest.raises(ChangedFileError) as caught:
        source.read_into("two.safetensors", 0, memoryview(bytearray(1)))
    text = str(caught.value)
    assert text.startswith(
        f"{ours / 'two.safetensors'}: expected the file two.safetensors that rank 3 on {own_node()} has described in {theirs}, {told}"
    )
    assert text.endswith("Every rank must see the same files, and they must not change during a load.")


@pytest.mark.parametrize("how", ["written", "replaced", "removed"])
def test_a_file_that_changes_during_the_load(tmp_path: Path, how: str) -> None:
    source = SafetensorsSource.open(two_files(tmp_path))
    source.read_into("two.safetensors", 0, memoryview(bytearray(1)))
    source.require_unchanged()
    path = tmp_path / "two.safetensors"
    if how == "written":
        os.utime(path, ns=(1, 1))
    else:
        path.unlink()
        if how == "replaced":
            save_file({"c": torch.arange(5)}, path)
    with pytest.raises(ChangedFileError, match=r"two\.safetensors: expected the"):
        source.require_unchanged()
    source.close()


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    source = SafetensorsSource.open(two_files(tmp_path))
    stored = source.tensors["c"]
    source.read_into(stored.file, stored.start, memoryview(bytearray(1)))
    with open(tmp_path / stored.file, "r+b") as file:
        file.truncate(stored.start + 8)
    with pytest.raises(ChangedFileError, match="has become shorter"):
        source.read_into(stored.file, stored.start, memoryview(bytearray(stored.nbytes)))
    source.close()


def test_a_disk_error_names_file_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SafetensorsSource.open(two_files(tmp_path))
    stored = source.tensors["c"]
    source.read_into(stored.file, stored.start, memoryview(bytearray(1)))

    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError) as caught:
        source.read_into(stored.file, stored.start, memoryview(bytearray(1)))
    assert "two.safetensors" in str(caught.value)
    assert f"byte {stored.start} failed: EIO" in str(caught.value)


def test_short_reads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SafetensorsSource.open(two_files(tmp_path))
    stored = source.tensors["c"]
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:3]], offset))
    got = bytearray(stored.nbytes)
    source.read_into(stored.file, stored.start, memoryview(got))
    assert torch.equal(torch.frombuffer(got, dtype=torch.int64), torch.arange(5))


# Four reads of two headers, two more of the file that is opened again, and one of its tensors.
@pytest.mark.parametrize("good_reads", range(7))
def test_a_failed_load_leaves_no_thread_and_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good_reads: int
) -> None:
    directory = _made(tmp_path)
    threads = set(threading.enumerate())
    real = os.preadv
    calls = []

    def fail_later(fd: int, buffers: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > good_reads:
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail_later)
    with pytest.raises(CheckpointError, match="EIO"):
        sw.materialize(model_of({"a": (4, 2), "b": (3,)}), directory, cpu_storage="copy")
    assert set(threading.enumerate()) <= threads
    assert open_in(tmp_path) == []
    assert open_in(Path("/proc/self")) == []  # where a profile reads
    monkeypatch.setattr(os, "preadv", real)
    model = model_of({"a": (4, 2), "b": (3,)})
    sw.materialize(model, directory, cpu_storage="copy")
    assert model.a.eq(1).all()


# --- names, shapes, dtypes ---


def test_a_missing_tensor_is_listed_and_a_shape_is_compared(tmp_path: Path) -> None:
    directory = _made(tmp_path)
    with pytest.raises(CheckpointError, match=r"got none for zz"):
        sw.materialize(model_of({"a": (4, 2), "zz": (3,)}), directory)
    with pytest.raises(sw.ShapeMismatchError) as caught:
        sw.materialize(model_of({"a": (2, 4)}), directory)
    assert "a: expected (2, 4) float32 from the model, got (4, 2) float32 of a in one.safetensors" in str(
        caught.value
    )
    with pytest.raises(CheckpointError, match="got \\(5,\\) int64 of c"):
        sw.materialize(model_of({"c": (5,)}), directory)


def test_names_that_only_the_checkpoint_has_are_shown_with_those_that_are_missing(tmp_path: Path) -> None:
    save_file({"module.a": torch.ones(4, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"got none for a.*It holds module\.a.*rename="):
        sw.materialize(model_of({"a": (4, 2)}), tmp_path)
    model = model_of({"a": (4, 2)})
    sw.materialize(model, tmp_path, rename={"a": "module.a"})
    assert model.a.eq(1).all()


def test_a_plain_attribute_on_meta_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    model = model_of({"w": (2,)})
    model.scale = torch.empty(3, device="meta")
    model.__dict__["same"] = model.w  # follows the parameter
    with pytest.raises(
        sw.LeftOnMetaError,
        match=r"got scale on meta.*register_buffer.*load_pretrained\(defer=False\)",
    ):
        sw.materialize(model, tmp_path)
    assert model.w.is_meta
    model.scale = torch.ones(3)
    sw.materialize(model, tmp_path)
    assert model.w.eq(1).all()
    assert model.same is model.w


def test_buffers_are_given_made_again_or_listed(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")

    class Rotary(torch.nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.register_buffer("inv_freq", torch.arange(4.0), persistent=False)
            if again:
                self.reset_buffers = lambda: self.inv_freq.copy_(torch.arange(4.0))

    def model(again: bool) -> torch.nn.Module:
        with torch.device("meta"):
            made = torch.nn.Module()
            made.w = torch.nn.Parameter(torch.empty(2))
            made.rotary = Rotary(again)
        return made

    with pytest.raises(sw.LeftOnMetaError, match=r"rotary\.inv_freq"):
        sw.materialize(model(False), tmp_path)
    again = model(True)
    report = sw.materialize(again, tmp_path)
    assert torch.equal(again.rotary.inv_freq, torch.arange(4.0))
    assert report.origins == {"w": "checkpoint", "rotary.inv_freq": "recomputed"}
    given = model(False)
    sw.materialize(given, tmp_path, buffers={"rotary.inv_freq": torch.full((4,), 2.0)})
    assert given.rotary.inv_freq.eq(2).all()
    by_function = model(False)
    sw.materialize(by_function, tmp_path, buffers=lambda name, like: torch.full(like.shape, 3.0))
    assert by_function.rotary.inv_freq.eq(3).all()
    with pytest.raises(sw.ConfigurationError, match="buffers: expected names"):
        sw.materialize(model(False), tmp_path, buffers={"nothing": torch.ones(1)})
    with pytest.raises(sw.ShapeMismatchError, match="got \\(5,\\)"):
        sw.materialize(model(False), tmp_path, buffers={"rotary.inv_freq": torch.ones(5)})


def test_a_module_that_does_not_write_what_it_should_is_found(tmp_path: Path) -> None:
    class Half(torch.nn.Linear):
        def reset_parameters(self) -> None:
            torch.nn.init.ones_(self.weight)

    model = Half(2, 2, device="meta")
    with pytest.raises(CheckpointError, match=r"got none for bias"):
        sw.materialize(model, None)


# --- what a user's text means ---


def test_places(tmp_path: Path) -> None:
    assert locate(tmp_path).kind == "local"
    assert locate("org/name").kind == "hub"
    assert locate("ms://org/name").repo_id == "org/name"
    for text in ("./gone", "/no/such/path", "a/b/c", "gone.safetensors", "with space"):
        with pytest.raises(CheckpointError, match="does not exist"):
            locate(text)


def test_a_hub_id_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        sw.materialize(model_of({"a": (1,)}), "no-such-organisation/no-such-model")
    assert "expected a directory or file, or a model on the hub, got neither" in str(caught.value)
    assert "HF_HUB_OFFLINE" in str(caught.value)


# --- pickle ---


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def test_a_pickle_file_that_is_named_is_read_without_running_it(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    model = model_of({"a": (3,)})
    sw.materialize(model, tmp_path / "pytorch_model.bin")
    assert model.a.eq(1).all()
    torch.save({"a": Payload(str(tmp_path / "ran"))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedFormatError, match="can run code"):
        sw.materialize(model_of({"a": (3,)}), tmp_path / "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()
