"""Export in one process: the files are those of save_pretrained, and the directory is there whole or not at all."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import shardwise as sw
from shardwise.export.directory import OutputDirectory
from shardwise.export.output_files import OutputFiles
from tests.distributed.models import causal_model
from tests.unit.models import Tied, tiny


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return causal_model("qwen3_tied").to(torch.bfloat16)


def content_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("kind", ["qwen3_tied", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_every_file_is_byte_for_byte_that_of_save_pretrained(
    tmp_path: Path, kind: str, max_shard_size: str
) -> None:
    torch.manual_seed(0)
    causal_model(kind).to(torch.bfloat16).save_pretrained(tmp_path / "first")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype="auto")
    size = (
        "5GB" if kind == "qwen3_moe" else max_shard_size
    )  # experts that share storage go to one file upstream
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    report = sw.export_checkpoint(model, tmp_path / "ours", max_shard_size=size)
    assert content_of(tmp_path / "ours") == content_of(tmp_path / "theirs")
    assert {
        name: len(text) for name, text in content_of(tmp_path / "ours").items()
    }.items() >= report.files.items()
    assert len(report.files) > 1 or size == "5GB"
    assert report.whole == ()


def test_the_report_says_what_was_written(tmp_path: Path, model: Any) -> None:
    report = sw.export_checkpoint(model, tmp_path / "out")
    nbytes = sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert report.written_bytes == report.ranks[0].written_bytes == nbytes
    assert report.to_json()["schema"] == "shardwise.export_report/1"
    assert report.summary().startswith(f"{tmp_path / 'out'}: model, {report.tensors} tensors")
    assert report.dtypes == {"bfloat16": report.tensors}


def test_a_plain_module_with_scalars_empty_tensors_and_several_dtypes(tmp_path: Path) -> None:
    model = Tied()
    model.register_buffer("none", torch.empty(0, 3, dtype=torch.int64))
    model.register_buffer("mask", torch.tensor([True, False, True]))
    model.half_weight = nn.Parameter(torch.randn(3, 5).to(torch.float16).t())  # not contiguous
    model.wide = nn.Parameter(torch.randn((), dtype=torch.float64))
    report = sw.export_checkpoint(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected = {name: t for name, t in model.state_dict().items() if name != "head.weight"}
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor), name
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    assert report.dtypes == {"float32": 5, "float64": 1, "float16": 1, "int64": 2, "bool": 1}


def test_a_buffer_that_one_of_two_modules_saves_is_loaded_and_exported_by_that_name(tmp_path: Path) -> None:
    """The first module kept it to itself, so that the stored values were passed over, and an export had none."""
    model = nn.ModuleList([nn.Module(), nn.Module()])
    table = torch.zeros(3)
    model[0].register_buffer("table", table, persistent=False)
    model[1].register_buffer("table", table)
    sw.materialize(model, {"1.table": torch.arange(3.0)})
    assert model[0].table is model[1].table
    assert model[0].table.tolist() == [0.0, 1.0, 2.0]
    sw.export_checkpoint(model, tmp_path / "out")
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == list(model.state_dict()) == ["1.table"]


def test_dtype_casts_all_but_what_the_class_keeps(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    model = transformers.T5ForConditionalGeneration(config)
    before = model.config.to_dict()
    sw.export_checkpoint(model, tmp_path / "out", dtype="float16")
    assert model.config.to_dict() == before
    kept = {
        n for n, t in load_file(tmp_path / "out" / "model.safetensors").items() if t.dtype == torch.float32
    }
    assert kept
    assert all("DenseReluDense.wo.weight" in name for name in kept)
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.shared.weight.dtype == loaded.config.dtype == torch.float16
    assert torch.equal(loaded.shared.weight, model.shared.weight.to(torch.float16))
    assert model.shared.weight.dtype == torch.float32


def test_a_tokenizer_is_saved_beside_the_weights(tmp_path: Path, model: Any) -> None:
    class Words:
        def save_pretrained(self, directory: str) -> None:
            (Path(directory) / "words.txt").write_text("a b")

    sw.export_checkpoint(model, tmp_path / "out", tokenizer=Words())
    assert (tmp_path / "out" / "words.txt").read_text() == "a b"
    with pytest.raises(sw.ConfigurationError, match="tokenizer: expected"):
        sw.export_checkpoint(model, tmp_path / "other", tokenizer="a name")
    assert not (tmp_path / "other").exists()


def test_a_model_without_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        sw.LeftOnMetaError, match=r"export_checkpoint: expected a model with values, got none for .*embed"
    ):
        sw.export_checkpoint(tiny("qwen3"), tmp_path / "out")
    with pytest.raises(sw.ConfigurationError, match="ReLU with none"):
        sw.export_checkpoint(nn.ReLU(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"max_shard_size": "5 potatoes"},
            r"max_shard_size: expected bytes as a number or a text such as '5GB'",
        ),
        ({"dtype": "int8"}, r"dtype: expected None or a floating point torch dtype"),
    ],
)
def test_arguments_are_refused_by_name(
    tmp_path: Path, model: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(sw.ConfigurationError, match=message):
        sw.export_checkpoint(model, tmp_path / "out", **arguments)
    assert os.listdir(tmp_path) == []


def test_an_existing_directory_is_replaced_on_request_alone(tmp_path: Path, model: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    sw.export_checkpoint(model, out)  # empty
    before = content_of(out)
    (out / "notes.txt").write_text("of the old one")
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    with pytest.raises(sw.CheckpointError, match=r"out: expected a directory that is empty .*overwrite=True"):
        sw.export_checkpoint(model, out)
    assert content_of(out).keys() == {*before, "notes.txt"}
    sw.export_checkpoint(model, out, overwrite=True)
    after = content_of(out)
    assert after.keys() == before.keys()
    assert after["model.safetensors"] != before["model.safetensors"]
    # The one file of before would be an invalid stray beside several.
    sw.export_checkpoint(model, out, overwrite=True, max_shard_size="10KB")
    assert "model.safetensors" not in os.listdir(out)
    loaded = type(model).from_pretrained(out).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    assert os.listdir(tmp_path) == ["out"]


def test_overwrite_removes_nothing_but_models(tmp_path: Path, model: Any) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    with pytest.raises(sw.CheckpointError, match="one without a model in it"):
        sw.export_checkpoint(model, tmp_path / "home", overwrite=True)
    (tmp_path / "runs" / "step-1").mkdir(parents=True)
    (tmp_path / "runs" / "config.json").write_text("{}")
    with pytest.raises(sw.CheckpointError, match=r"directories in it \(step-1\)"):
        sw.export_checkpoint(model, tmp_path / "runs", overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(sw.CheckpointError, match="got a file"):
        sw.export_checkpoint(model, tmp_path / "file", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "home")
    with pytest.raises(sw.CheckpointError, match="got a link"):
        sw.export_checkpoint(model, tmp_path / "link", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "home", "link", "runs"]
    assert os.listdir(tmp_path / "home") == ["letter.txt"]


def test_what_a_killed_export_left_is_cleaned_or_put_back(tmp_path: Path, model: Any) -> None:
    sw.export_checkpoint(model, tmp_path / "out")
    before = content_of(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")  # killed between two renames
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "old.bin").write_text("x")
    with pytest.raises(sw.CheckpointError, match="overwrite=True"):
        sw.export_checkpoint(model, tmp_path / "out")
    assert content_of(tmp_path / "out") == before
    sw.export_checkpoint(model, tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert content_of(tmp_path / "out") == before


def during_finish(monkeypatch: pytest.MonkeyPatch, act: Callable[[OutputDirectory], None]) -> None:
    finish = OutputDirectory.finish

    def then_finish(self: OutputDirectory, plan: Any, doing: Any) -> None:
        act(self)
        finish(self, plan, doing)

    monkeypatch.setattr(OutputDirectory, "finish", then_finish)


def test_another_export_that_lives_is_refused_and_keeps_its_files(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def export_too(output: OutputDirectory) -> None:
        monkeypatch.undo()
        with pytest.raises(
            sw.CheckpointError, match=r"\.out\.unfinished: expected no other export"
        ) as raised:
            sw.export_checkpoint(model, tmp_path / "out", overwrite=True)
        refused.append(raised.value)

    during_finish(monkeypatch, export_too)
    sw.export_checkpoint(model, tmp_path / "out")
    assert refused
    assert os.listdir(tmp_path) == ["out"]
    assert ".shardwise" not in os.listdir(tmp_path / "out")
    sw.export_checkpoint(model, tmp_path / "out", overwrite=True)  # the lock is given up


def test_an_unfinished_directory_that_is_not_its_own_gets_no_name(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_over(output: OutputDirectory) -> None:
        (output.unfinished / ".shardwise").write_text("another")

    during_finish(monkeypatch, take_over)
    with pytest.raises(sw.CheckpointError, match=r"as rank 0 .* has made it, got that of another export"):
        sw.export_checkpoint(model, tmp_path / "out")
    assert os.listdir(tmp_path) == [".out.unfinished"]  # of the other one


def test_it_is_looked_at_again_after_the_headers(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardwise.export import directory

    sync = directory.sync

    def take_over(path: Path) -> None:
        if path.name == ".out.unfinished":
            (path / ".shardwise").write_text("another")
        sync(path)

    monkeypatch.setattr(directory, "sync", take_over)
    with pytest.raises(sw.CheckpointError, match="got that of another export"):
        sw.export_checkpoint(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_appears_at_the_place_meanwhile_is_refused(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def appear(output: OutputDirectory) -> None:
        output.path.mkdir()
        (output.path / "letter.txt").write_text("x")

    during_finish(monkeypatch, appear)
    with pytest.raises(sw.CheckpointError, match="overwrite=True"):
        sw.export_checkpoint(model, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["letter.txt"]


def test_what_was_discarded_gets_no_name_and_what_has_one_stays(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sw.export_checkpoint(model, tmp_path / "out")
    before = content_of(tmp_path / "out")
    replace_directory, late = os.replace, []

    def rename(old: Path, new: Path) -> None:
        if Path(new).name == ".out.replaced":  # the moment in which neither is in place
            thread = threading.Thread(target=made[0].discard)
            thread.start()
            thread.join(0.2)
            late.append(thread)
            assert thread.is_alive()  # it waits for the renames
        replace_directory(old, new)

    made: list[OutputDirectory] = []
    during_finish(monkeypatch, made.append)
    monkeypatch.setattr(os, "replace", rename)
    sw.export_checkpoint(model, tmp_path / "out", overwrite=True)
    late[0].join()
    assert os.listdir(tmp_path) == ["out"]
    assert content_of(tmp_path / "out") == before
    monkeypatch.undo()

    during_finish(monkeypatch, OutputDirectory.discard)
    with pytest.raises(sw.CheckpointError):
        sw.export_checkpoint(model, tmp_path / "out", overwrite=True)
    late_one = OutputDirectory(tmp_path / "out", rank=0)
    late_one.discard()
    late_one.begin("by a thread that nobody waits for")
    assert os.listdir(tmp_path) == ["out"]
    assert content_of(tmp_path / "out") == before


def test_files_are_closed_when_the_last_write_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = OutputDirectory(tmp_path / "out", rank=0)
    output.unfinished.mkdir()
    (output.unfinished / "x").write_bytes(bytes(4))
    files, pwritev = OutputFiles(output), os.pwritev

    def close_meanwhile(descriptor: int, parts: Any, offset: int) -> int:
        files.close()
        os.fstat(descriptor)  # still open
        seen.append(descriptor)
        return pwritev(descriptor, parts, offset)

    seen: list[int] = []
    monkeypatch.setattr(os, "pwritev", close_meanwhile)
    files.write("x", 0, [memoryview(b"1234")])
    assert (output.unfinished / "x").read_bytes() == b"1234"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(seen[0])
    with pytest.raises(sw.CheckpointError, match="Bad file descriptor"):
        files.write("x", 0, [memoryview(b"5678")])  # a thread that comes late opens nothing


def test_a_file_system_without_locks_is_written_to(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    sw.export_checkpoint(model, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_no_reader_takes_an_unfinished_file_for_a_whole_one(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(self: OutputDirectory, plan: Any, doing: Any) -> None:
        path = self.unfinished / "model.safetensors"
        assert path.stat().st_size == plan.files[0].nbytes
        with pytest.raises(SafetensorError):
            load_file(path)
        seen.append(path)
        raise OSError(5, "a fault")

    monkeypatch.setattr(OutputDirectory, "finish", look)
    with pytest.raises(OSError, match="a fault"):
        sw.export_checkpoint(model, tmp_path / "out")
    assert seen
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, model: Any) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(sw.CheckpointError, match=re.escape(str(tmp_path / "out"))):
        sw.export_checkpoint(model, tmp_path / "out")


def test_no_room_is_named_for_what_it_is(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(file: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shardwise.export.directory._allocate", full)
    with pytest.raises(
        sw.CheckpointError,
        match=r"making room for [\d,]+ bytes in model.safetensors .*rank 0 .*No space left.*Free space",
    ):
        sw.export_checkpoint(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_bytes_that_nobody_has_written_are_noticed_before_the_directory_has_its_name(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardwise.export import execution

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        plan = plan_writes(*args, **kwargs)
        return replace(plan, writes=plan.writes[1:])

    plan_writes = execution.plan_writes
    monkeypatch.setattr(execution, "plan_writes", forgetful)
    with pytest.raises(
        sw.CheckpointError, match=r"expected [\d,]+ bytes of tensors from all ranks, got [\d,]+"
    ):
        sw.export_checkpoint(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []
