"""The published bound on host memory, over load and wrap, of a model that is larger than the bound on every rank."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shardwise as sw
from shardwise.compare.generated import generate_checkpoint
from shardwise.tensors import dtype_name
from shardwise.testing import RankPool
from tests.distributed.models import transformers_fuses_experts
from tests.distributed.steps import Checkpoint, load, local_of, make_strategy

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc for anonymous memory"),
]

MIB = 2**20
STAGING_BYTES, META_MODEL_BYTES = 64 * MIB, 64 * MIB
SEEN = 0.95  # of what is kept: a process may give something back meanwhile
WHOLE_BYTES = 528 * MIB  # of which a fourth is more than staging and the meta model together
CODES = {torch.bfloat16: "BF16", torch.float32: "F32"}
Large = Callable[[torch.dtype], str]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Large]:
    """Checkpoints of zeros, nearly all of them in two tensors; the files are sparse, and take no time to write."""
    folder = tmp_path_factory.mktemp("large")

    def directory_of(dtype: torch.dtype) -> str:
        directory = folder / dtype_name(dtype)
        if not directory.is_dir():
            write_zeros(directory, dtype)
        return str(directory)

    yield directory_of
    shutil.rmtree(folder)


def write_zeros(directory: Path, dtype: torch.dtype) -> None:
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=WHOLE_BYTES // (2 * 1024 * dtype.itemsize),
        hidden_size=1024,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(config)
    config.dtype = dtype
    config.save_pretrained(directory)
    described, position = {}, 0
    for name, tensor in model.state_dict().items():
        nbytes = tensor.numel() * dtype.itemsize
        described[name] = {
            "dtype": CODES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + position)


@pytest.mark.parametrize("cpu_storage", ["auto", "copy"], ids=["mapped", "copied"])
@pytest.mark.parametrize("dtype", CODES, ids=dtype_name)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_anonymous_memory_over_load_and_wrap(
    pool: RankPool, checkpoint: Checkpoint, large: Large, ranks: int, dtype: torch.dtype, cpu_storage: str
) -> None:
    # A first load imports modules, which would count here.
    pool.run(load_and_wrap, checkpoint("qwen3_untied"), dtype, cpu_storage, ranks=ranks)
    for peak, shard, read in pool.run(load_and_wrap, large(dtype), dtype, cpu_storage, ranks=ranks):
        assert WHOLE_BYTES / ranks < shard < 1.05 * WHOLE_BYTES / ranks
        assert shard > STAGING_BYTES + META_MODEL_BYTES  # so a second copy would not fit into the bound
        assert read >= shard  # the values came from the file
        kept = shard if cpu_storage == "copy" else 0
        assert SEEN * kept <= peak <= kept + STAGING_BYTES + META_MODEL_BYTES


def test_a_cast_takes_the_shard_in_its_new_dtype_and_no_more(
    pool: RankPool, checkpoint: Checkpoint, large: Large
) -> None:
    pool.run(load_and_wrap, checkpoint("qwen3_untied"), torch.float32, "auto", ranks=4)
    for peak, shard, _ in pool.run(load_and_wrap, large(torch.bfloat16), torch.float32, "auto", ranks=4):
        assert shard > 2 * WHOLE_BYTES / 4
        assert SEEN * shard <= peak <= shard + STAGING_BYTES + META_MODEL_BYTES


@pytest.fixture(scope="module")
def of_kind(tmp_path_factory: pytest.TempPathFactory, large: Large) -> Iterator[Callable[[str], str]]:
    """Checkpoints of a model with a head of its own, one whose embedding is its head, and a mixture of experts."""
    folder = tmp_path_factory.mktemp("kinds")

    def directory_of(kind: str) -> str:
        if kind == "untied":
            return large(torch.bfloat16)
        generate_checkpoint(
            folder / kind,
            config_kind="moe" if kind == "experts" else "dense",
            parameters=130_000_000,
            dtype=torch.bfloat16,
            seed=0,
            files=2,
        )
        return str(folder / kind)

    yield directory_of
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["untied", "tied", "experts"])
def test_a_nodes_memory_stays_as_ranks_are_added(
    pool: RankPool, checkpoint: Checkpoint, of_kind: Callable[[str], str], kind: str
) -> None:
    directory = of_kind(kind)
    whole_bytes = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
    peaks = {}
    for ranks in (2, 4):
        pool.run(load_and_wrap, checkpoint("qwen3_moe"), torch.bfloat16, "copy", ranks=ranks)
        found = pool.run(load_and_wrap, directory, torch.bfloat16, "copy", ranks=ranks)
        peaks[ranks] = sum(peak for peak, _, _ in found)
        # Beside the shards less than one layer's experts, which are 144 MiB and lie in both files.
        most_bytes = STAGING_BYTES + META_MODEL_BYTES * (1 if transformers_fuses_experts() else 2)
        assert all(peak <= shard + most_bytes for peak, shard, _ in found)
        assert sum(read for _, _, read in found) <= 1.02 * whole_bytes
    assert peaks[2] >= SEEN * whole_bytes > 3 * STAGING_BYTES
    # transformers 4.57 keeps a module for each expert, on every rank.
    added_bytes = STAGING_BYTES + (0 if transformers_fuses_experts() else META_MODEL_BYTES)
    assert peaks[4] <= 1.05 * peaks[2] + 2 * added_bytes < peaks[2] + 2 * whole_bytes


def load_and_wrap(directory: str, dtype: torch.dtype, cpu_storage: Any) -> tuple[int, int, int]:
    """Return the anonymous peak, this rank's shard and what this rank requested, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed must not serve this one unseen
    with sw.profile_memory() as profile:
        strategy = make_strategy("native_fsdp", cpu_storage=cpu_storage)
        model = strategy.wrap_model(load(strategy, directory, dtype=dtype, defer=True))
    shard = sum(local_of(parameter).nbytes for parameter in model.parameters())
    (own,) = (each for each in strategy.last_report.ranks if each.rank == torch.distributed.get_rank())
    return profile.anon_peak_bytes, shard, own.storage_bytes
