"""Dtypes, optimizers, adapters and further models of one job: what users saw, by number of the case."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import CPUOffloadPolicy

from shardwise.testing import RankPool
from tests.distributed.models import PlainNet, causal_model, check_equal, from_checkpoint, gathered, raw_bytes
from tests.distributed.steps import (
    Checkpoint,
    backward,
    by_efficient,
    by_strategy,
    by_way,
    check_gradients,
    language_loss,
    load,
    make_strategy,
    own_rows,
    token_batch,
)

pytestmark = pytest.mark.distributed


@by_strategy
@by_way
def test_case_47_48_the_stored_dtype_is_the_one_asked_for_and_each_dtype_is_reported(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, way: str
) -> None:
    """An upcast to float32 did nothing; an optimizer quietly kept its moments in bfloat16."""
    pool.run(check_dtypes, checkpoint("qwen3_tied"), strategy, way, ranks=2)


def check_dtypes(directory: str, name: str, way: str) -> None:
    for dtype, stored in (("auto", torch.bfloat16), (torch.float32,) * 2, (torch.bfloat16,) * 2):
        strategy = make_strategy(name, memory_efficient_init=way != "eager", mixed_precision="bf16")
        model = load(strategy, directory, dtype=dtype, defer=way == "direct")
        made = torch.optim.AdamW(model.parameters())
        model, optimizer = strategy.wrap_model(model, made)
        assert {p.dtype for p in model.parameters()} == {stored}
        backward(strategy, language_loss(model, own_rows(token_batch())))
        optimizer.step()
        moments = {state["exp_avg"].dtype for state in made.state.values()}
        assert moments == {stored}
        name_of = str(stored).removeprefix("torch.")
        assert strategy.last_report.dtypes == {
            "stored": name_of,
            "compute": "bfloat16",
            "reduce": "float32",
            "optimizer": name_of,
        }


@pytest.mark.parametrize("files", ["one file", "several files"])
def test_a_checkpoint_of_several_dtypes_has_the_one_that_transformers_finds_first(
    pool: RankPool, tmp_path: Path, files: str
) -> None:
    """Without a dtype in the config, the first tensor in the file counted in place of the first by name."""
    directory = write_mixed(tmp_path, max_shard_size="20KB" if files == "several files" else "1GB")
    pool.run(load_mixed, directory, ranks=2)


def write_mixed(directory: Path, *, max_shard_size: str) -> str:
    model = causal_model("qwen3_untied").to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}))
    for file in directory.glob("*.safetensors"):
        stored = load_file(file)  # safetensors writes wide dtypes first
        first = min(stored)
        save_file(
            {n: v if n == first else v.to(torch.float32) for n, v in stored.items()},
            file,
            metadata={"format": "pt"},
        )
    return str(directory)


def load_mixed(directory: str) -> None:
    expected = from_checkpoint(directory)
    assert expected.dtype == torch.bfloat16
    strategy = make_strategy("native_fsdp")
    check_equal(strategy.wrap_model(load(strategy, directory, defer=True)), expected)


def test_a_config_that_is_passed_stays_as_it_is(pool: RankPool, checkpoint: Checkpoint) -> None:
    """The second load with the same config took the dtype of the first."""
    pool.run(load_twice_with_a_config, checkpoint("qwen3_untied"), ranks=1)


def load_twice_with_a_config(directory: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    before = config.to_dict()
    strategy = make_strategy("native_fsdp")
    first = load(strategy, directory, defer=True, config=config, dtype=torch.float32)
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert config.to_dict() == before
    second = load(strategy, directory, defer=True, config=config)
    assert {p.dtype for p in second.parameters()} == {torch.bfloat16}


@by_strategy
@by_efficient
def test_case_51_an_optimizer_of_some_parameters_stays_one_of_these(
    pool: RankPool, strategy: str, efficient: bool
) -> None:
    """An optimizer of some parameters became one of all."""
    pool.run(wrap_subset, strategy, efficient, ranks=4)


def wrap_subset(name: str, efficient: bool) -> None:
    model = PlainNet()
    wanted = ["layers.1.down.weight", "layers.0.gate.bias", "layers.0.scale"]
    named = dict(model.named_parameters())
    made = torch.optim.SGD([named[fqn] for fqn in wanted], lr=0.1)
    strategy = make_strategy(name, memory_efficient_init=efficient)
    model, optimizer = strategy.wrap_model(model, made)
    names = {id(p): fqn for fqn, p in model.named_parameters()}
    assert [names[id(p)] for p in made.param_groups[0]["params"]] == wanted
    before = gathered(model)
    backward(strategy, model(torch.ones(2, 8)).square().mean())
    optimizer.step()
    after = gathered(model)
    assert {fqn for fqn in before if not torch.equal(before[fqn], after[fqn])} == set(wanted)


@by_strategy
@pytest.mark.parametrize("cpu_offload", [True, False], ids=["offloaded", "in place"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
@pytest.mark.parametrize("reshard", [True, False], ids=["resharded", "kept"])
def test_case_11_every_combination_of_options_takes_a_step(
    pool: RankPool,
    checkpoint: Checkpoint,
    strategy: str,
    cpu_offload: bool,
    checkpointing: bool,
    reshard: bool,
) -> None:
    """Low-memory loading with CPU offload failed on rank 1: each option worked, and not all of them together."""
    options = {
        "cpu_offload": CPUOffloadPolicy(pin_memory=False) if cpu_offload else False,
        "activation_checkpointing": checkpointing,
        "reshard_after_forward": reshard,
    }
    first = (cpu_offload + checkpointing + reshard) % 2  # so that each of two options meets each way
    pool.run(step_with_options, checkpoint("qwen3_tied"), strategy, options, WAYS_TO_FILL[first::2], ranks=2)


WAYS_TO_FILL = [
    ("direct", torch.bfloat16, "auto"),
    ("direct", torch.float32, "copy"),
    ("rank0", torch.float32, "copy"),
    ("eager", torch.float32, "copy"),
]


def step_with_options(
    directory: str, name: str, options: dict[str, Any], ways: list[tuple[str, torch.dtype, str]]
) -> None:
    for way, dtype, cpu_storage in ways:
        strategy = make_strategy(
            name, memory_efficient_init=way != "eager", fsdp_config=options, cpu_storage=cpu_storage
        )
        model = load(strategy, directory, dtype=dtype, defer=way == "direct").train()
        model, optimizer = strategy.wrap_model(model, torch.optim.SGD(model.parameters(), lr=0.1))
        expected = from_checkpoint(directory, dtype=dtype)
        check_equal(model, expected)
        backward(strategy, language_loss(model, own_rows(token_batch())))
        if dtype == torch.float32:
            language_loss(expected, token_batch()).backward()
            check_gradients(model, expected)
        optimizer.step()


@by_strategy
def test_case_54_a_policy_and_its_reference_keep_dtype_and_values(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    """The reference model of a DPO run was loaded in float32, on another device."""
    pool.run(load_policy_and_reference, checkpoint("qwen3_tied"), strategy, ranks=2)


def load_policy_and_reference(directory: str, name: str) -> None:
    strategy = make_strategy(name)
    # One model per Accelerator; without it one strategy takes both.
    second = make_strategy(name) if name == "accelerate" else strategy
    policy = load(strategy, directory, defer=True, dtype=torch.float32)
    reference = load(second, directory, defer=True).requires_grad_(False)
    policy, optimizer = strategy.wrap_model(policy, torch.optim.SGD(policy.parameters(), lr=0.5))
    second.wrap_model(reference)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}
    assert {p.device for m in (policy, reference) for p in m.parameters()} == {torch.device("cpu")}
    with torch.no_grad():
        reference(input_ids=own_rows(token_batch()))
    backward(strategy, language_loss(policy, own_rows(token_batch())))
    optimizer.step()
    # Both were pages of one file: a step of the one must not reach the other.
    check_equal(reference, from_checkpoint(directory).requires_grad_(False))


def lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    )


@by_strategy
def test_case_23_49_adapters_are_equal_on_all_ranks_before_and_after_steps(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    """Each rank trained an adapter of its own; adapters in float32 on a bfloat16 model were refused."""
    before, after = zip(*pool.run(train_adapter, checkpoint("qwen3_untied"), strategy, ranks=3), strict=True)
    assert len(set(before)) == len(set(after)) == 1
    assert before != after


def train_adapter(directory: str, name: str) -> tuple[str, str]:
    torch.manual_seed(dist.get_rank())
    strategy = make_strategy(name)
    model = lora(load(strategy, directory))
    model, optimizer = strategy.wrap_model(model, torch.optim.SGD(model.parameters(), lr=0.5))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    before = digest_of_adapter(model)
    for _ in range(10):
        backward(strategy, language_loss(model, own_rows(token_batch())))
        optimizer.step()
        optimizer.zero_grad()
    return before, digest_of_adapter(model)


def digest_of_adapter(model: Any) -> str:
    digest = hashlib.sha256()
    for fqn, tensor in gathered(model).items():
        if "lora_" in fqn:
            digest.update(raw_bytes(tensor).numpy())
    return digest.hexdigest()


@by_strategy
def test_case_53_a_new_adapter_on_a_model_without_values_starts_as_peft_says(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    """Meta initialisation could load an adapter, but not make one."""
    digests = {
        digest
        for ranks in (1, 3)
        for digest in pool.run(adapt_deferred, checkpoint("qwen3_untied"), strategy, ranks=ranks)
    }
    assert len(digests) == 1  # equal on all ranks, and on any number of them


def adapt_deferred(directory: str, name: str) -> str:
    strategy = make_strategy(name)
    # The first rank's seed counts, and the next rank's own must not.
    torch.manual_seed(dist.get_rank())
    model = strategy.wrap_model(lora(load(strategy, directory, defer=True)))
    tensors = gathered(model)
    expected = from_checkpoint(directory).state_dict()
    for fqn, tensor in tensors.items():
        if "lora_B" in fqn:
            assert not tensor.any()
        elif "lora_A" in fqn:
            assert tensor.std() > 0
        elif "lora_" not in fqn and "q_proj.base_layer" in fqn:
            base = fqn.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(tensor, expected[base])
    return digest_of_adapter(model)
