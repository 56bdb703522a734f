"""A tied tensor that lies on disk under both of its names: equal values are one, different ones are an error."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.checkpoint import Run, SafetensorsSource, StoredTensor
from shardwise.testing import RankPool
from tests.distributed.models import TiedNet, check_equal, from_checkpoint
from tests.distributed.steps import STRATEGIES, Checkpoint, load, make_strategy

pytestmark = pytest.mark.distributed

FIRST, SECOND = "embed.weight", "head.weight"
SIZE_BYTES = 13 * 8 * 4


def write(directory: Path, other: torch.Tensor) -> str:
    """Save `TiedNet` in two files, its tied tensor in the first and another value of it in the second."""
    values = dict(TiedNet().state_dict())
    values.pop(SECOND)
    save_file({name: value.clone() for name, value in values.items()}, directory / "one.safetensors")
    save_file({SECOND: other.contiguous()}, directory / "two.safetensors")
    return str(directory)


def tied_value() -> torch.Tensor:
    return TiedNet().embed.weight.detach().clone()


def meta_net() -> TiedNet:
    with torch.device("meta"):
        return TiedNet()


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("staging_bytes", [128, 2**20])
def test_equal_values_are_tied_and_read_once_more(
    pool: RankPool, tmp_path: Path, ranks: int, staging_bytes: int
) -> None:
    pool.run(fill_equal, write(tmp_path, tied_value()), staging_bytes, ranks=ranks)


def fill_equal(directory: str, staging_bytes: int) -> None:
    of_one_name, model = meta_net(), meta_net()
    fully_shard(of_one_name)
    fully_shard(model)
    options: dict[str, Any] = {"staging_bytes": staging_bytes, "cpu_storage": "copy"}
    once = sw.materialize(of_one_name, directory, rename={SECOND: FIRST}, **options)
    report = sw.materialize(model, directory, **options)
    check_equal(model, TiedNet())
    assert model.head.weight is model.embed.weight
    assert report.origins[SECOND] == "tied"
    assert report.storage_bytes == once.storage_bytes + 2 * SIZE_BYTES  # in the job, and not on each rank
    assert report.predicted["storage_bytes"] == report.storage_bytes
    verified = sw.verify_shards(model, directory)
    assert verified.is_equal
    assert verified.tensors == len(report.origins)


def test_a_difference_of_one_byte_is_an_error_with_both_places_and_the_choice(
    pool: RankPool, tmp_path: Path
) -> None:
    other = tied_value()
    other.view(torch.uint8)[12, 31] ^= 1
    for text in pool.run(fill_different, write(tmp_path, other), ranks=3):
        assert text.startswith(
            f"CheckpointError: {tmp_path}: expected one value of {FIRST} = {SECOND}, which the model ties, got different "
            f"ones: {FIRST} (float32) in one.safetensors and {SECOND} (float32) in two.safetensors."
        )
        assert "tie_word_embeddings=False" in text
        assert f"rename={{'{SECOND}': '{FIRST}'}}" in text


def fill_different(directory: str) -> str:
    with pytest.raises(sw.CheckpointError) as caught:  # on every rank, and not a PeerError on some
        sw.materialize(meta_net(), directory, staging_bytes=256)
    # The remedies work.
    for name in (FIRST, SECOND):
        model = meta_net()
        sw.materialize(model, directory, rename={FIRST: name, SECOND: name})
        file = "one" if name == FIRST else "two"
        assert torch.equal(model.head.weight, load_file(Path(directory) / f"{file}.safetensors")[name])
        # What was loaded is not what the other name holds.
        (mismatch,) = sw.verify_shards(model, directory).mismatches[:1]
        assert mismatch.fqn == (SECOND if name == FIRST else FIRST)
        assert mismatch.elements == 1
    untied = meta_net()
    untied.head.weight = nn.Parameter(torch.empty(13, 8, device="meta"))
    sw.materialize(untied, directory)
    assert not torch.equal(untied.head.weight, untied.embed.weight)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_zeros_of_two_signs_differ_and_a_nan_equals_itself(pool: RankPool, tmp_path: Path) -> None:
    model = nn.ParameterDict({"a": nn.Parameter(torch.empty(2, device="meta"))})
    model.register_parameter("b", model["a"])
    nan = torch.tensor([float("nan"), 0.0])
    save_file({"a": nan, "b": nan.clone()}, tmp_path / "equal.safetensors")
    sw.materialize(model, tmp_path / "equal.safetensors")
    save_file({"a": nan, "b": torch.tensor([float("nan"), -0.0])}, tmp_path / "other.safetensors")
    with pytest.raises(sw.CheckpointError, match="expected one value of a = b"):
        sw.materialize(model, tmp_path / "other.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("equal", [True, False])
def test_names_of_other_dtypes_are_compared_by_value(
    pool: RankPool, tmp_path: Path, dtype: torch.dtype, equal: bool
) -> None:
    value = tied_value().bfloat16().float()
    values = {name: tensor.clone() for name, tensor in TiedNet().state_dict().items()} | {FIRST: value}
    other = value.to(dtype)
    if not equal:
        other[12, 7] *= 2
    save_file(values | {SECOND: other}, tmp_path / "model.safetensors")
    pool.run(fill_other_dtype, str(tmp_path), value, dtype, equal, ranks=3)


def fill_other_dtype(directory: str, value: torch.Tensor, dtype: torch.dtype, equal: bool) -> None:
    model = meta_net()
    if equal:
        sw.materialize(model, directory, staging_bytes=64)
        assert torch.equal(model.head.weight, value)
        return
    with pytest.raises(sw.CheckpointError, match=f"{SECOND} \\({str(dtype).removeprefix('torch.')}\\)"):
        sw.materialize(model, directory, staging_bytes=64)


@pytest.mark.parametrize(
    "other", [torch.ones(8, 13), torch.ones(13, 8, dtype=torch.int32)], ids=["shape", "kind"]
)
def test_names_that_cannot_be_one_tensor(pool: RankPool, tmp_path: Path, other: torch.Tensor) -> None:
    errors = pool.run_to_errors(fill, write(tmp_path, other), ranks=2)
    for error in errors:
        assert isinstance(error, sw.CheckpointError)
        assert (
            f"{SECOND} {tuple(other.shape)} {str(other.dtype).removeprefix('torch.')} in two.safetensors"
            in str(error)
        )


def fill(directory: str) -> None:
    sw.materialize(meta_net(), directory)


def test_the_state_dict_of_a_tied_model(pool: RankPool) -> None:
    """It holds both names; only the first rank can read its values."""
    pool.run(fill_from_state_dict, ranks=3)


def fill_from_state_dict() -> None:
    model = meta_net()
    fully_shard(model)
    values = TiedNet().state_dict() if dist.get_rank() == 0 else {}
    report = sw.materialize(model, values)
    check_equal(model, TiedNet())
    assert report.storage_bytes == report.predicted["storage_bytes"] == 0
    with pytest.raises(sw.CheckpointError, match="expected one value"):
        sw.materialize(meta_net(), {**values, SECOND: torch.zeros(13, 8)} if values else {})


class OneExtent:
    """A file that is known under two names; it counts what is read."""

    def __init__(self, path: Path) -> None:
        self._source = SafetensorsSource.open(path)
        self.name = str(path)
        stored = self._source.tensors["a"]
        again = StoredTensor(
            name="b",
            shape=stored.shape,
            dtype=stored.dtype,
            file=stored.file,
            start=stored.start,
            stop=stored.stop,
        )
        self.tensors: Mapping[str, StoredTensor] = {"a": stored, "b": again}
        self.bytes = 0

    def read_into(self, file: str, offset: int, into: memoryview) -> None:
        self.bytes += len(into)
        self._source.read_into(file, offset, into)

    def mapped(self, runs: Sequence[Run]) -> list[torch.Tensor | None]:
        return [None] * len(runs)

    def require_unchanged(self) -> None:
        self._source.require_unchanged()

    def close(self) -> None:
        self._source.close()


def tied_pair(numel: int) -> Any:
    model = nn.Module()
    model.a = nn.Parameter(torch.empty(numel, device="meta"))
    model.b = model.a
    return model


def test_names_of_one_extent_are_not_read_to_be_compared(tmp_path: Path) -> None:
    save_file({"a": torch.arange(5.0)}, tmp_path / "model.safetensors")
    source = OneExtent(tmp_path / "model.safetensors")
    model = tied_pair(5)
    report = sw.materialize(model, source)
    assert torch.equal(model.b, torch.arange(5.0))
    assert report.storage_bytes == source.bytes == 20
    source.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc for anonymous memory")
def test_the_comparison_takes_one_staging_buffer(tmp_path: Path) -> None:
    numel = 12 * 2**20
    save_file({"a": torch.zeros(numel), "b": torch.zeros(numel)}, tmp_path / "model.safetensors")
    sw.materialize(tied_pair(numel), tmp_path)  # what a first call imports would count
    report = sw.materialize(tied_pair(numel), tmp_path, staging_bytes=8 * 2**20)
    assert report.storage_bytes == 3 * 4 * numel
    assert report.ranks[0].host_anon_peak_bytes <= 8 * 2**20 < 4 * numel


def test_a_deferred_model(pool: RankPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = Path(checkpoint("qwen3_tied"))
    values = load_file(source / "model.safetensors")
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    (tied,) = [name for name in names if name in values]
    for folder, change in (("equal", 0), ("different", 1)):
        (tmp_path / folder).mkdir()
        for file in source.glob("*.json"):
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
        both = {name: values[tied].clone() for name in names}
        both[names[1]].view(torch.uint8)[96, 63] ^= change
        save_file(values | both, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    pool.run(load_both, str(source), str(tmp_path / "equal"), str(tmp_path / "different"), ranks=3)


def load_both(original: str, equal: str, different: str) -> None:
    for name in STRATEGIES:
        strategy = make_strategy(name)
        model = load(strategy, equal, defer=True)
        check_equal(strategy.wrap_model(model), from_checkpoint(original))
    strategy = make_strategy("native_fsdp")
    with pytest.raises(sw.CheckpointError, match=r"model\.embed_tokens\.weight = lm_head\.weight"):
        load(strategy, different, defer=True)
    untied = strategy.wrap_model(load(strategy, different, defer=True, tie_word_embeddings=False))
    head, embedding = untied.lm_head.weight.full_tensor(), untied.model.embed_tokens.weight.full_tensor()
    assert int((head != embedding).sum()) == 1
