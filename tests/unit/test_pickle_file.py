"""Pickle files: tensors by name, and no code."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.checkpoint import load_pickle
from shardwise.errors import CheckpointError, DamagedFileError, ShardwiseError, UnsupportedFormatError

INDEX = "pytorch_model.bin.index.json"


class Payload:
    """Makes a file when it is unpickled by something that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def saved(directory: Path, value: object, name: str = "pytorch_model.bin", *, legacy: bool = False) -> Path:
    torch.save(value, directory / name, _use_new_zipfile_serialization=not legacy)
    return directory / name


def write_index(directory: Path, weight_map: object) -> Path:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory / INDEX


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_tensors_by_name(tmp_path: Path, legacy: bool) -> None:
    values = OrderedDict(
        a=torch.arange(6.0).view(2, 3), b=torch.ones(2, dtype=torch.bfloat16), s=torch.tensor(3)
    )
    got = load_pickle(saved(tmp_path, values, legacy=legacy))
    assert type(got) is dict
    assert list(got) == ["a", "b", "s"]
    for name, value in values.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value)


def test_parameters_come_detached_and_keep_their_ties(tmp_path: Path) -> None:
    tied = torch.nn.Parameter(torch.ones(3))
    got = load_pickle(saved(tmp_path, {"a": tied, "b": tied}))
    assert not got["a"].requires_grad
    assert got["a"].data_ptr() == got["b"].data_ptr()


def resident_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here")
def test_a_zip_file_is_mapped_and_never_written(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.ones(16 * 2**20)})
    before = path.read_bytes()
    at_start = resident_bytes()
    got = load_pickle(path)
    assert resident_bytes() - at_start < 16 * 2**20  # a quarter of the file
    got["a"].zero_()
    assert path.read_bytes() == before


def test_compressed_entries_are_read_and_not_mapped(tmp_path: Path) -> None:
    values = {"a": torch.ones(1000), "b": torch.randn(50, generator=torch.Generator().manual_seed(0))}
    path, packed = saved(tmp_path, values), tmp_path / "packed.bin"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))
    got = load_pickle(packed)
    assert torch.equal(got["a"], values["a"])
    assert torch.equal(got["b"], values["b"])


@pytest.mark.parametrize("where", ["top", "value", "raw"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, legacy: bool
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    made = tmp_path / "made"
    path = tmp_path / "pytorch_model.bin"
    if where == "raw":
        path.write_bytes(pickle.dumps(Payload(made), protocol=2))
    else:
        payload: object = Payload(made) if where == "top" else {"a": torch.ones(1), "b": Payload(made)}
        saved(tmp_path, payload, legacy=legacy)
    with pytest.raises(UnsupportedFormatError) as caught:
        load_pickle(path)
    assert not made.exists()
    message = str(caught.value)
    assert message.startswith(
        f"{path}: expected tensors only, got a pickle that torch.load(weights_only=True) refuses"
    )
    assert f"since it can run code: it calls {os.name}.mkdir. " in message
    assert "Convert it to safetensors on a machine you trust" in message
    assert "Re-running" not in message
    # The payload is a real one.
    if where != "raw":
        torch.load(path, weights_only=False)
        assert made.exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedFormatError, match=r"it calls torch\.nn\.modules\.linear\.Linear"):
        load_pickle(path)


def test_tar_files_of_early_torch_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with tarfile.open(path, "w") as archive:
        for name in ("pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(UnsupportedFormatError, match=r"does not read \(TorchScript, or a torch 0\.1"):
        load_pickle(path)


def test_torchscript_is_refused_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"constants.pkl": b"", "version": b"3", "data.pkl": b""}.items():
            archive.writestr(f"archive/{name}", content)
    with pytest.raises(UnsupportedFormatError, match="TorchScript"):
        load_pickle(path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([torch.ones(1)], "expected tensors by name, got list. Save model.state_dict() in its place."),
        (torch.ones(1), "expected tensors by name, got Tensor."),
        ({"epoch": 3}, "got int under 'epoch'. Save a dictionary of tensors alone."),
        ({0: torch.ones(1)}, "got Tensor under 0."),
        (
            {"state_dict": {"a": torch.ones(1)}},
            "got dict under 'state_dict'. The state dict lies inside: save torch.load(file, weights_only=True)['state_dict'] alone",
        ),
        (
            {"model": {"a": torch.ones(1)}, "optimizer": {}},
            "got dict under 'model'. The state dict lies inside",
        ),
        ({"a": torch.ones(2, device="meta")}, "expected dense tensors, got a on meta, without values."),
        ({"a": torch.eye(2).to_sparse()}, "expected dense tensors, got a of layout torch.sparse_coo."),
    ],
    ids=["list", "tensor", "number", "key", "state_dict", "model", "meta", "sparse"],
)
def test_what_is_not_tensors_by_name(tmp_path: Path, value: object, expected: str) -> None:
    path = saved(tmp_path, value)
    with pytest.raises(CheckpointError) as caught:
        load_pickle(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0.0, 0.03, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, legacy: bool, kept: float) -> None:
    path = saved(tmp_path, {"a": torch.ones(500)}, legacy=legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises((DamagedFileError, UnsupportedFormatError)) as caught:
        load_pickle(path)
    assert str(caught.value).startswith(f"{path}: expected ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_pickle(tmp_path / "gone.bin")
    assert str(caught.value) == (
        f"{tmp_path / 'gone.bin'}: expected a readable file, got No such file or directory. Check the path and its permissions."
    )
    with pytest.raises(CheckpointError) as caught:
        load_pickle(tmp_path / INDEX)
    assert str(caught.value) == (
        f"{tmp_path / INDEX}: reading it failed: ENOENT (No such file or directory). Check its permissions, the disk and the mount."
    )
    (tmp_path / "x.bin").mkdir()
    with pytest.raises(CheckpointError, match="got a directory"):
        load_pickle(tmp_path / "x.bin")


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, bytes]:
    directory = tmp_path_factory.mktemp("contents")
    value = {"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    return {legacy: saved(directory, value, legacy=legacy).read_bytes() for legacy in (False, True)}


@given(data=st.data(), legacy=st.booleans())
def test_damaged_bytes_give_tensors_or_one_of_our_errors(
    contents: dict[bool, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, legacy: bool
) -> None:
    content = bytearray(contents[legacy])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(content)
    try:
        found = load_pickle(path)
    except ShardwiseError:
        return
    for value in found.values():
        value.clone()


# --- several files ---


def test_all_files_of_an_index(tmp_path: Path) -> None:
    saved(tmp_path, {"a": torch.ones(2)}, "one.bin")
    saved(tmp_path, {"b": torch.zeros(3), "unlisted": torch.ones(1)}, "two.bin", legacy=True)
    got = load_pickle(write_index(tmp_path, {"a": "one.bin", "b": "two.bin"}))
    assert {name: value.tolist() for name, value in got.items()} == {
        "a": [1, 1],
        "b": [0, 0, 0],
        "unlisted": [1],
    }


@pytest.mark.parametrize("name", ["../x.bin", "/x.bin", "a\0.bin", "C:x.bin", "..", "", 3, None])
def test_an_index_may_not_lead_out_of_its_folder(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    saved(tmp_path, {"a": torch.ones(2)}, "x.bin")
    path = write_index(folder, {"a": name})
    with pytest.raises(CheckpointError, match="tensor 'a': expected the name of a file inside"):
        load_pickle(path)


def test_nor_may_a_link_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    saved(tmp_path, {"a": torch.ones(2)}, "x.bin")
    (folder / "x.bin").symlink_to("../x.bin")
    with pytest.raises(CheckpointError, match="expected a file inside"):
        load_pickle(write_index(folder, {"a": "x.bin"}))


def test_a_file_of_the_index_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.bin: expected a file of the checkpoint, got none"):
        load_pickle(write_index(tmp_path, {"a": "gone.bin"}))


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({"a": "two.bin", "b": "two.bin", "c": "one.bin"}, "expected a in two.bin, got it in one.bin"),
        ({"a": "one.bin", "b": "two.bin", "gone": "one.bin"}, "expected gone in one.bin, got it in no file"),
    ],
)
def test_an_index_of_other_files(tmp_path: Path, weight_map: dict[str, str], expected: str) -> None:
    saved(tmp_path, {"a": torch.ones(2), "c": torch.ones(1)}, "one.bin")
    saved(tmp_path, {"b": torch.ones(2)}, "two.bin")
    path = write_index(tmp_path, weight_map)
    with pytest.raises(DamagedFileError) as caught:
        load_pickle(path)
    assert str(caught.value).startswith(f"{path}: {expected}. The index belongs to other files")


def test_one_tensor_in_two_files(tmp_path: Path) -> None:
    saved(tmp_path, {"a": torch.ones(2)}, "one.bin")
    saved(tmp_path, {"a": torch.zeros(2), "b": torch.ones(1)}, "two.bin")
    path = write_index(tmp_path, {"a": "one.bin", "b": "two.bin"})
    with pytest.raises(
        DamagedFileError, match=r"expected each tensor in one file, got a in one\.bin and two\.bin"
    ):
        load_pickle(path)


def test_a_payload_in_the_second_file(tmp_path: Path) -> None:
    saved(tmp_path, {"a": torch.ones(2)}, "one.bin")
    saved(tmp_path, {"b": Payload(tmp_path / "made")}, "two.bin")
    with pytest.raises(UnsupportedFormatError, match=r"two\.bin: expected tensors only"):
        load_pickle(write_index(tmp_path, {"a": "one.bin", "b": "two.bin"}))
    assert not (tmp_path / "made").exists()
