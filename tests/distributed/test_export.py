"""What ranks write together is what one process would write: every layout, every rank its own bytes, nothing gathered."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import shardwise as sw
from shardwise.errors import CheckpointError, PeerError
from shardwise.export.directory import OutputDirectory
from shardwise.export.output_files import OutputFiles
from shardwise.testing import RankPool
from tests.distributed.facade import batch as step_batch
from tests.distributed.facade import facade, own, with_optimizer
from tests.distributed.layouts import EVEN, LAYOUTS, UNEVEN, mesh_of, tower, tower_on_meta, write_tower
from tests.distributed.models import CAUSAL_KINDS, check_equal, from_checkpoint
from tests.distributed.steps import (
    Checkpoint,
    by_strategy,
    every_rank,
    load,
    local_of,
    make_strategy,
    token_batch,
)

pytestmark = pytest.mark.distributed

STAGING_BYTES = 20 * 1024  # so that an exchange has rounds


def content_of(directory: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def stored_in(directory: Path | str) -> dict[str, torch.Tensor]:
    return {k: v for path in Path(directory).glob("*.safetensors") for k, v in load_file(path).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@by_strategy
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_load_and_export_gives_the_very_files(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, strategy: str, ranks: int
) -> None:
    directories = [checkpoint(kind) for kind in CAUSAL_KINDS]
    pool.run(load_and_export, strategy, directories, str(tmp_path), ranks=ranks)


def load_and_export(name: str, directories: list[str], target: str) -> None:
    for index, directory in enumerate(directories):
        strategy = make_strategy(name)
        model = strategy.wrap_model(load(strategy, directory, defer=index != 1, dtype="auto"))
        exported = Path(target) / str(index)
        report = sw.export_checkpoint(model, exported)
        assert content_of(exported) == content_of(directory)
        assert report.whole == ()
        written = sum(t.nbytes for t in stored_in(directory).values())
        assert report.written_bytes == sum(of.written_bytes for of in report.ranks) == written
        assert max(of.written_bytes for of in report.ranks) <= 1.5 * written / len(report.ranks) + 4096
        assert len(set(every_rank(str(report.to_json()["files"])))) == 1


@by_strategy
def test_trained_values_load_in_plain_from_pretrained_and_give_the_same_logits(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, strategy: str
) -> None:
    pool.run(train_and_export, strategy, checkpoint("qwen3_tied"), str(tmp_path / "saved"), ranks=2)


def train_and_export(name: str, source: str, directory: str) -> None:
    class Words:
        def save_pretrained(self, to: Any) -> None:
            (Path(to) / "words.txt").write_text("a b")

    model = with_optimizer(facade(source, name, tokenizer=Words()))
    model.forward_backward(own(step_batch(0)))
    model.clip_grad_and_step(max_grad_norm=1.0)
    report = model.export(directory, max_shard_size="20KB")
    assert len(report.files) > 1
    saved = from_checkpoint(directory)
    saved.train()
    check_equal(model.model, saved)
    assert (Path(directory) / "words.txt").is_file()
    ids = token_batch()
    with torch.no_grad():
        logits = model.eval().model(input_ids=ids).logits
        assert torch.equal(logits, saved.eval()(input_ids=ids).logits)
    model.train()
    model.forward_backward(own(step_batch(1)))  # the training goes on
    model.export(directory, dtype="bfloat16", overwrite=True)
    half = stored_in(directory)
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    whole = dict(saved.named_parameters())
    assert torch.equal(half["model.norm.weight"], whole["model.norm.weight"].to(torch.bfloat16))


@pytest.mark.parametrize("inner", [UNEVEN, EVEN])
def test_every_layout_of_the_tower(pool: RankPool, tmp_path: Path, inner: int) -> None:
    pool.run(export_towers, write_tower(tmp_path, inner), inner, str(tmp_path), ranks=4)


def export_towers(source: str, inner: int, target: str) -> None:
    for number, (name, lay_out) in enumerate(LAYOUTS.items()):
        model = tower_on_meta(inner)
        lay_out(model)
        sw.materialize(model, source)
        for staging in (None, STAGING_BYTES):
            out = Path(target) / f"{number}-{staging}"
            report = sw.export_checkpoint(model, out, staging_bytes=staging, max_shard_size="4KB")
            same(stored_in(out), load_file(source))
            assert report.world_size == 4, name
        assert report.network_bytes < 2 * report.written_bytes


class Odd(nn.Module):
    """Parameters of every awkward sort: columns, several dims, fewer rows than ranks, none, a scalar, mixed dtypes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.columns = nn.Parameter(torch.randn(40, 37))
        self.experts = nn.Parameter(torch.randn(3, 10, 14).to(torch.bfloat16))
        self.few = nn.Parameter(torch.randn(2, 5))
        self.scalar = nn.Parameter(torch.randn(()), requires_grad=False)
        self.none = nn.Parameter(torch.empty(0, 4), requires_grad=False)
        self.copies = nn.Parameter(torch.randn(33).to(torch.float64))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("bytes", torch.arange(5, dtype=torch.uint8))
        self.register_buffer("table", torch.arange(12).view(6, 2))


def test_odd_tensors_columns_and_both_dims(pool: RankPool, tmp_path: Path) -> None:
    pool.run(export_odd, str(tmp_path), ranks=4)


def export_odd(target: str) -> None:
    expected = {name: tensor.clone() for name, tensor in Odd().state_dict().items()}
    one, two = mesh_of(dp_shard=4), mesh_of(dp_shard=2, tp=2)
    for name, (mesh, columns, experts) in {
        "columns": (one, [Shard(1)], [Shard(1)]),
        "last dim": (one, [Shard(1)], [Shard(2)]),
        "both": (two, [Shard(0), Shard(1)], [Shard(2), Shard(0)]),
    }.items():
        model = Odd()
        for fqn, placements in {"columns": columns, "experts": experts}.items():
            value = distribute_tensor(getattr(model, fqn).data, mesh, placements)
            setattr(model, fqn, nn.Parameter(value))
        model.few = nn.Parameter(distribute_tensor(model.few.data, mesh, [Shard(0)] * mesh.ndim))
        report = sw.export_checkpoint(model, Path(target) / name, staging_bytes=STAGING_BYTES)
        same(stored_in(Path(target) / name), expected)
        assert report.network_bytes > 0


# --- ranks that do not see the directory ---


@pytest.mark.parametrize("seers", [(0,), (0, 2), (0, 1, 2, 3)], ids=str)
def test_ranks_that_do_not_see_the_directory_send_what_they_keep(
    pool: RankPool, tmp_path: Path, checkpoint: Checkpoint, seers: tuple[int, ...]
) -> None:
    pool.run(export_unseen, checkpoint("qwen3_moe"), str(tmp_path / "out"), seers, ranks=4)


def export_unseen(source: str, target: str, seers: tuple[int, ...]) -> None:
    strategy = make_strategy("native_fsdp")
    model = strategy.wrap_model(load(strategy, source, defer=True, dtype="auto"))
    sees = dist.get_rank() in seers
    opened: list[str] = []
    real = OutputFiles._descriptor

    def note(self: OutputFiles, file: str) -> int:
        opened.append(file)
        return real(self, file)

    with (
        mock.patch.object(OutputDirectory, "is_seen", return_value=sees),
        mock.patch.object(OutputFiles, "_descriptor", note),
    ):
        report = sw.export_checkpoint(model, target, staging_bytes=STAGING_BYTES)
    assert content_of(target) == content_of(source)
    assert report.writers == seers
    assert bool(opened) == sees
    assert (report.network_bytes > 0) == (len(seers) < 4)
    assert all(of.written_bytes == 0 for of in report.ranks if of.rank not in seers)


# --- conversions that compute ---


def test_what_computes_is_made_of_whole_tensors(
    pool: RankPool, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    pytest.importorskip("transformers.core_model_loading", reason="transformers 4 converts nothing")
    for ranks in (1, 3):
        pool.run(export_computed, checkpoint("qwen3_tied"), str(tmp_path / str(ranks)), ranks=ranks)


def export_computed(source: str, target: str) -> None:
    from transformers import core_model_loading as core

    class Halve(core.ConversionOps):
        def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
            (values,) = input_dict.values()
            return {target_patterns[0]: (values[0] if isinstance(values, list) else values) * 0.5}

    class Double(core.ConversionOps):
        def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
            raise NotImplementedError

        @property
        def reverse_op(self) -> Any:
            return Halve()

    strategy = make_strategy("native_fsdp")
    model = strategy.wrap_model(load(strategy, source, defer=True, dtype="auto"))
    model._weight_conversions = [
        core.WeightConverter("mlp.up.w", "mlp.up_proj.weight", operations=[Double()])
    ]
    report = sw.export_checkpoint(model, target, staging_bytes=STAGING_BYTES)
    expected = {
        name.replace("mlp.up_proj.weight", "mlp.up.w"): value * 0.5 if "up_proj" in name else value
        for name, value in stored_in(source).items()
    }
    same(stored_in(target), expected)
    assert report.whole == tuple(name for name in expected if "mlp.up.w" in name)
    assert report.written_bytes == sum(value.nbytes for value in expected.values())


# --- failures ---


def refuse_to_open(self: OutputFiles, file: str) -> int:
    raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def full_disk(self: OutputFiles, file: str, offset: int, parts: Any) -> None:
    raise self._directory.failure(f"writing {file}", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


FAULTS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "may not be opened": ("_descriptor", refuse_to_open, r"rank 1 .*Permission denied.*every rank's user"),
    "disk full": ("write", full_disk, r"rank 1 .*No space left on device.*Free space"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_on_one_rank_is_raised_on_all_and_nothing_is_left(
    pool: RankPool, tmp_path: Path, checkpoint: Checkpoint, fault: str
) -> None:
    pool.run(export_with_fault, checkpoint("qwen3_tied"), str(tmp_path), fault, ranks=3)


def export_with_fault(source: str, folder: str, fault: str) -> None:
    strategy = make_strategy("native_fsdp")
    model = strategy.wrap_model(load(strategy, source, defer=True, dtype="auto"))
    target = Path(folder) / "out"
    method, replacement, message = FAULTS[fault]
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(OutputFiles, method, replacement)
        expected = CheckpointError if dist.get_rank() == 1 else PeerError
        with pytest.raises(expected, match=rf"(?s)out: .*{message}"):
            sw.export_checkpoint(model, target, timeout=60.0)
    dist.barrier()
    assert os.listdir(folder) == []
    dist.barrier()
    sw.export_checkpoint(model, target)  # in the same processes
    assert content_of(target) == content_of(source)


def test_a_rank_that_finds_the_files_gone_names_the_failure_that_took_them(
    pool: RankPool, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    """The first rank takes the files away once a rank has failed; a late one blamed the disk for it."""
    pool.run(export_late, checkpoint("qwen3_tied"), str(tmp_path), ranks=3)


def export_late(source: str, folder: str) -> None:
    strategy = make_strategy("native_fsdp")
    model = strategy.wrap_model(load(strategy, source, defer=True, dtype="auto"))
    target = Path(folder) / "out"
    rank, real = dist.get_rank(), OutputFiles._descriptor

    def late(self: OutputFiles, file: str) -> int:
        deadline = time.monotonic() + 20
        while os.listdir(folder) and time.monotonic() < deadline:
            time.sleep(0.01)
        return real(self, file)

    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr(OutputFiles, "_descriptor", refuse_to_open if rank == 1 else late)
        with pytest.raises(
            CheckpointError if rank == 1 else PeerError, match=r"(?s)out: .*rank 1 .*Permission denied"
        ):
            sw.export_checkpoint(model, target, timeout=60.0)
    dist.barrier()


def test_an_existing_directory_and_different_arguments_are_refused_on_every_rank(
    pool: RankPool, tmp_path: Path
) -> None:
    pool.run(export_refused, str(tmp_path), ranks=2)


def export_refused(folder: str) -> None:
    model = nn.Linear(3, 5)
    fully_shard(model, mesh=mesh_of(dp_shard=2))
    target = Path(folder) / "out"
    sw.export_checkpoint(model, target)
    expected = CheckpointError if dist.get_rank() == 0 else PeerError
    with pytest.raises(expected, match="overwrite=True"):
        sw.export_checkpoint(model, target)
    assert os.listdir(target) == ["model.safetensors"]
    with pytest.raises(sw.RankMismatchError, match="option max_shard_size"):
        sw.export_checkpoint(model, target, overwrite=True, max_shard_size=f"{dist.get_rank() + 1}GB")
    assert os.listdir(folder) == ["out"]


def test_a_group_of_some_ranks_exports_its_own_model(pool: RankPool, tmp_path: Path) -> None:
    pool.run(export_in_groups, str(tmp_path), ranks=4)


def export_in_groups(folder: str) -> None:
    mesh = mesh_of(stage=2, dp=2)
    stage = mesh.get_local_rank("stage")
    torch.manual_seed(stage)
    model = tower(EVEN) if stage else nn.Linear(3, 5)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    fully_shard(model, mesh=mesh["dp"])
    out = Path(folder) / str(stage)
    report = sw.export_checkpoint(model, out, group=mesh["dp"].get_group())
    same(stored_in(out), expected)
    assert [of.rank for of in report.ranks] == [2 * stage, 2 * stage + 1]


def test_values_of_dtensors_are_never_gathered(pool: RankPool, tmp_path: Path) -> None:
    pool.run(export_ungathered, write_tower(tmp_path, EVEN), str(tmp_path / "out"), ranks=2)


def export_ungathered(source: str, target: str) -> None:
    model = tower_on_meta(EVEN)
    LAYOUTS["one axis"](model)
    sw.materialize(model, source)
    before = {name: local_of(parameter).data_ptr() for name, parameter in model.named_parameters()}
    with (
        mock.patch.object(DTensor, "full_tensor", side_effect=AssertionError("gathered")),
        mock.patch.object(DTensor, "redistribute", side_effect=AssertionError("gathered")),
    ):
        sw.export_checkpoint(model, target)
    same(stored_in(target), load_file(source))
    assert before == {name: local_of(p).data_ptr() for name, p in model.named_parameters()}


def test_copies_that_ranks_do_not_keep_equal_are_those_of_one_rank(pool: RankPool, tmp_path: Path) -> None:
    """Statistics of batches and ignored parameters are each rank's own: the mean was one rank's, the variance another's."""
    pool.run(export_own_copies, str(tmp_path), ranks=2)
    for sharded in (True, False):
        written = load_file(tmp_path / str(sharded) / "model.safetensors")
        own = [written[name].flatten()[0].item() for name in ("1.running_mean", "1.running_var")]
        if sharded:
            own += [written[name].flatten()[0].item() for name in ("2.weight", "2.bias")]
        assert own == [0.0] * len(own)


def export_own_copies(folder: str) -> None:
    for sharded in (True, False):
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params=set(model[2].parameters()))
        own = [model[1].running_mean, model[1].running_var, *(model[2].parameters() if sharded else ())]
        with torch.no_grad():
            for tensor in own:
                tensor.fill_(dist.get_rank())
        sw.export_checkpoint(model, f"{folder}/{sharded}")
