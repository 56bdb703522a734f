"""Conversions that compute, and so must see whole tensors: values, the report, and the memory that it predicts."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.steps import every_rank

core = pytest.importorskip("transformers.core_model_loading", reason="transformers 4 converts nothing")
pytestmark = pytest.mark.distributed

MIB = 2**20
LAYERS = 3
RESULT_BYTES = 2048 * 1536 * 4


class AddPair(core.ConversionOps):
    """A weight that a checkpoint holds as two terms: nothing that moves elements can make it."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        """Return the sum of the two."""
        coarse, fine = (of[0] if isinstance(of, list) else of for of in input_dict.values())
        return {target_patterns[0]: coarse + fine}


def conversions() -> list[Any]:
    return [
        core.WeightConverter(
            source_patterns=["down_proj.coarse", "down_proj.fine"],
            target_patterns=["down_proj.weight"],
            operations=[AddPair()],
        )
    ]


def config_of(*, hidden: int, intermediate: int) -> Any:
    import transformers

    return transformers.Qwen3Config(
        vocab_size=97,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def model_of(config: Any) -> Any:
    import transformers

    return transformers.Qwen3ForCausalLM(config)


def write(directory: Path, *, hidden: int, intermediate: int, dtype: torch.dtype) -> str:
    """Save a checkpoint whose `down_proj` weights are sums, each of two stored tensors; return its directory."""
    directory.mkdir(exist_ok=True)
    config = config_of(hidden=hidden, intermediate=intermediate)
    config.save_pretrained(directory)
    torch.manual_seed(0)
    values = {}
    for name, value in model_of(config).state_dict().items():
        if name == "lm_head.weight":
            continue
        parts = ("coarse", "fine") if name.endswith("down_proj.weight") else ("weight",)
        for part in parts:
            values[name.removesuffix("weight") + part] = torch.randn(value.shape).to(dtype)
    save_file(values, directory / "model.safetensors")
    return str(directory)


def expected_of(directory: str) -> dict[str, torch.Tensor]:
    stored = load_file(Path(directory) / "model.safetensors")
    sums = {
        name.removesuffix("coarse") + "weight": value + stored[name.removesuffix("coarse") + "fine"]
        for name, value in stored.items()
        if name.endswith(".coarse")
    }
    return sums | {name: value for name, value in stored.items() if not name.endswith((".coarse", ".fine"))}


def sharded_on_meta(directory: str) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    with init_empty_weights(include_buffers=False):
        model = model_of(AutoConfig.from_pretrained(directory))
    model.tie_weights()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_values_are_those_of_the_operation_and_the_report_names_them(
    pool: RankPool, tmp_path: Path, ranks: int, dtype: torch.dtype
) -> None:
    directory = write(tmp_path / "model", hidden=12, intermediate=18, dtype=dtype)
    pool.run(fill_and_compare, directory, dtype, ranks=ranks)


def fill_and_compare(directory: str, dtype: torch.dtype) -> None:
    model = sharded_on_meta(directory)
    report = sw.materialize(model, directory, dtype="auto", conversions=conversions())
    expected = expected_of(directory)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter.full_tensor(), expected[name]), name
    names = tuple(f"model.layers.{index}.mlp.down_proj.weight" for index in range(LAYERS))
    assert report.converted == names
    assert {report.origins[name] for name in names} == {"checkpoint"}
    # Of one group at a time: two sources and their sum.
    assert report.predicted["whole_tensor_bytes"] == 3 * 12 * 18 * dtype.itemsize
    assert report.storage_bytes <= 1.02 * (Path(directory) / "model.safetensors").stat().st_size
    assert report.storage_bytes == report.predicted["storage_bytes"]
    assert len(set(every_rank(report.converted))) == 1
    assert sw.verify_shards(model, directory, conversions=conversions()).is_equal


def test_without_such_a_conversion_nothing_is_predicted(pool: RankPool, tmp_path: Path) -> None:
    directory = write(tmp_path / "model", hidden=12, intermediate=18, dtype=torch.float32)
    values = expected_of(directory)
    save_file(values, Path(directory) / "model.safetensors")
    pool.run(fill_unconverted, directory, ranks=2)


def fill_unconverted(directory: str) -> None:
    report = sw.materialize(sharded_on_meta(directory), directory)
    assert report.converted == ()
    assert report.predicted["whole_tensor_bytes"] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc for anonymous memory")
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_measured_peak_stays_below_what_was_predicted(pool: RankPool, tmp_path: Path, ranks: int) -> None:
    small = write(tmp_path / "small", hidden=12, intermediate=18, dtype=torch.float32)
    pool.run(measure, small, ranks=ranks)  # what a first call imports would count
    large = write(tmp_path / "large", hidden=2048, intermediate=1536, dtype=torch.float32)
    for peak, shard, predicted, staging in pool.run(measure, large, ranks=ranks):
        assert predicted == 3 * RESULT_BYTES  # two sources and their sum, of one layer of three
        assert peak <= shard + predicted + (staging if ranks > 1 else 0)  # alone, a rank exchanges nothing


def measure(directory: str) -> tuple[int, int, int, int]:
    """Return the anonymous peak of this rank, its shard, the prediction and the bound of staging, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed must not serve this one unseen
    staging = 8 * MIB
    model = sharded_on_meta(directory)
    report = sw.materialize(
        model, directory, conversions=conversions(), cpu_storage="copy", staging_bytes=staging
    )
    own = next(each for each in report.ranks if each.rank == dist.get_rank())
    return own.host_anon_peak_bytes, own.shard_bytes, int(report.predicted["whole_tensor_bytes"]), staging
