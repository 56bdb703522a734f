"""What no checkpoint holds is initialised on shards: equal for any number of ranks, within its bound of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.materialization import entries_of, take_values
from shardwise.materialization.freed import give_back_freed
from shardwise.testing import RankPool
from tests.distributed.models import causal_model, check_equal, from_checkpoint, transformers_fuses_experts
from tests.distributed.steps import Checkpoint, by_strategy, by_way, load, make_strategy

pytestmark = pytest.mark.distributed
_MEBIBYTE = 2**20


# --- equal on all ranks ---


def test_an_adapter_starts_the_same_on_any_number_of_ranks(pool: RankPool, checkpoint: Checkpoint) -> None:
    pytest.importorskip("peft")
    sums = [pool.run(start_adapter, checkpoint("qwen3_untied"), ranks=ranks) for ranks in (1, 2, 3)]
    assert len({value for of_ranks in sums for value in of_ranks}) == 1


def start_adapter(directory: str) -> str:
    import warnings

    from peft import LoraConfig, get_peft_model

    base = causal_model("qwen3_untied").to(torch.bfloat16)
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a property under its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=5))
    take_values(entries_of(model), keep=False)
    fully_shard(model)
    torch.manual_seed(7 if dist.get_rank() == 0 else 99 + dist.get_rank())
    sw.materialize(model, directory, missing=["*lora_*"])
    started = {name: p.full_tensor() for name, p in model.named_parameters() if "lora_" in name}
    assert started
    for name, value in started.items():
        assert value.eq(0).all() if "lora_B" in name else value.std() > 0.01
    return str([value.double().sum().item() for value in started.values()])


# --- nothing else changes ---


class Around(nn.Module):
    """A head with values, and a parent whose buffer is made by a method that writes the head as well."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(6, 7, dtype=torch.bfloat16)
        self.register_buffer("table", torch.empty(3, device="meta"), persistent=False)

    def reset_buffers(self) -> None:
        """Make the table again, and more."""
        self.table.copy_(torch.arange(3.0))
        nn.init.zeros_(self.head.weight)


@by_strategy
def test_making_a_buffer_leaves_held_parameters_alone(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    pool.run(wrap_around, strategy, checkpoint("qwen3_tied"), ranks=2)


def wrap_around(name: str, directory: str) -> None:
    strategy = make_strategy(name)
    torch.manual_seed(0)
    model = Around(load(strategy, directory, defer=True))
    expected = model.head.weight.detach().clone()
    strategy.wrap_model(model)
    assert torch.equal(model.head.weight.full_tensor(), expected)
    assert model.table.tolist() == [0, 1, 2]
    check_equal(model.inner, from_checkpoint(directory))
    report = strategy.last_report
    assert report.route == "direct + rank0"
    assert report.origins["head.weight"] == "kept"
    assert report.origins["table"] == "recomputed"
    assert report.origins["inner.model.norm.weight"] == "checkpoint"


# --- origins of what a strategy loads ---


@by_strategy
@by_way
def test_origins_of_each_way(pool: RankPool, checkpoint: Checkpoint, strategy: str, way: str) -> None:
    answers = pool.run(load_with_new_head, strategy, checkpoint("qwen3_tied"), way, ranks=2)
    assert answers[0] == answers[1]
    origins = answers[0]
    assert origins["score.weight"] == "kept"  # made by the user after the load
    assert origins["model.norm.weight"] == "checkpoint"
    made_again = transformers_fuses_experts() or way != "direct"  # 4.57 computes buffers while it builds
    assert origins["model.rotary_emb.inv_freq"] == ("recomputed" if made_again else "kept")


def load_with_new_head(name: str, directory: str, way: str) -> dict[str, str]:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    strategy = make_strategy(name, memory_efficient_init=way != "eager")
    model = strategy.load_pretrained(
        AutoModelForSequenceClassification,
        directory,
        missing="init",
        num_labels=3,
        pad_token_id=0,
        defer=way == "direct",
    )
    model.score = nn.Linear(32, 3, bias=False, dtype=torch.bfloat16)
    strategy.wrap_model(model)
    origins: dict[str, str] = strategy.last_report.origins
    return origins


# --- the price ---


@pytest.mark.parametrize("with_gaps", [False, True], ids=["", "in a heap with gaps"])
def test_initialising_keeps_one_copy_of_one_module(pool: RankPool, with_gaps: bool) -> None:
    for peak_bytes, shard_bytes in pool.run(initialise_wide, with_gaps, ranks=2):
        assert shard_bytes >= 2 * 32 * _MEBIBYTE
        assert peak_bytes <= 64 * _MEBIBYTE + shard_bytes + 24 * _MEBIBYTE


def initialise_wide(with_gaps: bool) -> tuple[int, int]:
    kept = heap_with_gaps() if with_gaps else []
    with torch.device("meta"):  # two modules of 64 MiB: the second starts when the first is gone
        model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(2)))
    fully_shard(model)
    report = sw.materialize(model, None)
    own = report.ranks[dist.get_rank()]
    del kept
    return own.host_anon_peak_bytes, own.shard_bytes


def heap_with_gaps() -> list[torch.Tensor]:
    """Leave free memory in the C library's heap, as a long-lived process has it; what is returned keeps it there."""
    kept = []
    for _ in range(3):  # glibc puts such sizes into the heap once it has freed one
        large = [torch.zeros(20 * _MEBIBYTE, dtype=torch.uint8) for _ in range(16)]
        kept.append(torch.zeros(2**16, dtype=torch.uint8))
        del large
    give_back_freed()
    return kept


# --- what a class keeps in float32 ---


@pytest.fixture(scope="module")
def t5_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 in float16 that lacks one of the weights that its class keeps in float32."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64)
    directory = tmp_path_factory.mktemp("t5")
    T5ForConditionalGeneration(config).half().save_pretrained(directory)
    file = directory / "model.safetensors"
    stored = {name: value for name, value in load_file(file).items() if name != _GONE}
    save_file(stored, file, metadata={"format": "pt"})
    return directory


_GONE = "encoder.block.0.layer.1.DenseReluDense.wo.weight"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "auto"], ids=str)
@pytest.mark.parametrize("strict", [False, True], ids=["keep", "keep strict"])
def test_dtypes_are_those_of_from_pretrained(
    pool: RankPool, t5_checkpoint: Path, dtype: Any, strict: bool
) -> None:
    pool.run(load_t5, str(t5_checkpoint), dtype, strict, ranks=2)


def load_t5(directory: str, dtype: Any, strict: bool) -> None:
    from transformers import T5ForConditionalGeneration

    class Strict(T5ForConditionalGeneration):
        _keep_in_fp32_modules_strict = ("layer_norm", "final_layer_norm")

    cls = Strict if strict else T5ForConditionalGeneration
    expected = cls.from_pretrained(directory, dtype=dtype)
    strategy = make_strategy("native_fsdp")
    model = strategy.load_pretrained(cls, directory, dtype=dtype, missing="init")
    model.requires_grad_(False)  # FSDP2 wants one dtype in a unit of trainable parameters
    strategy.wrap_model(model)
    wanted = {name: parameter.dtype for name, parameter in expected.named_parameters()}
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == wanted
    if dtype != torch.bfloat16:
        assert wanted[_GONE.replace("block.0", "block.1")] == torch.float32
        assert wanted[_GONE] == (torch.float16 if transformers_fuses_experts() else torch.float32)
    if strict:
        assert wanted["encoder.final_layer_norm.weight"] == torch.float32
    for name, parameter in expected.named_parameters():
        if name != _GONE:
            assert torch.equal(dict(model.named_parameters())[name].full_tensor(), parameter), name
    assert strategy.last_report.origins[_GONE] == "initialised"
