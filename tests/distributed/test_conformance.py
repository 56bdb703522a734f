"""What both strategies promise alike: values, ties, outputs, gradients, the report, and a clean environment."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import shardwise as sw
from shardwise.materialization import clean_fqn, entries_of
from shardwise.testing import RankPool
from tests.distributed.models import (
    CAUSAL_KINDS,
    PlainNet,
    check_equal,
    from_checkpoint,
    named_tensors,
)
from tests.distributed.steps import (
    STRATEGIES,
    Checkpoint,
    backward,
    by_efficient,
    by_strategy,
    by_way,
    check_gradients,
    every_rank,
    language_loss,
    load,
    local_of,
    make_strategy,
    own_rows,
    reference_gradients,
    reshard_all,
    token_batch,
)

pytestmark = pytest.mark.distributed


# --- values, dtypes, ties, buffers ---


@by_strategy
@by_way
@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_every_tensor_equals_the_single_process_load(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, way: str, kind: str
) -> None:
    pool.run(compare_with_reference, checkpoint(kind), strategy, way, ranks=4)


@by_strategy
@pytest.mark.parametrize("way", ["direct", "rank0"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_tensor_equals_at_other_world_sizes(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, way: str, ranks: int
) -> None:
    pool.run(compare_with_reference, checkpoint("qwen3_tied"), strategy, way, ranks=ranks)


def compare_with_reference(directory: str, name: str, way: str) -> None:
    strategy = make_strategy(name, memory_efficient_init=way != "eager")
    model = load(strategy, directory, defer=way == "direct")
    on_meta = {p.is_meta for p in model.parameters()}
    assert on_meta == {way == "direct" or (way == "rank0" and dist.get_rank() != 0)}
    wrapped = strategy.wrap_model(model)
    assert wrapped is model  # with no optimizer, the model alone
    check_equal(model, from_checkpoint(directory))
    _check_share(model)


def _check_share(model: torch.nn.Module) -> None:
    """Each rank holds its rows and no more: the parts add up, and the largest is about 1/N."""
    unique = {id(p): p for p in model.parameters()}.values()
    assert all(isinstance(p, DTensor) for p in unique)
    own = sum(p.to_local().nbytes for p in unique)
    whole = sum(p.nbytes for p in unique)
    shares = every_rank(own)
    assert sum(shares) == whole
    # Rounding up to whole rows costs at most one row of each parameter.
    rows = sum(p.nbytes // p.shape[0] for p in unique)
    assert own <= whole / dist.get_world_size() + rows
    storages = {p.to_local().untyped_storage().data_ptr(): p.to_local().untyped_storage() for p in unique}
    assert sum(s.nbytes() for s in storages.values()) <= whole / dist.get_world_size() + rows


@by_strategy
@by_efficient
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_plain_module_with_every_sort_of_buffer(
    pool: RankPool, strategy: str, efficient: bool, ranks: int
) -> None:
    pool.run(compare_plain_module, strategy, efficient, ranks=ranks)


def compare_plain_module(name: str, efficient: bool) -> None:
    model = PlainNet(seed=3)
    model.layers[0].requires_grad_(False)
    expected = PlainNet(seed=3)
    expected.layers[0].requires_grad_(False)
    if efficient and dist.get_rank() != 0:
        model = model.to("meta")
    model = make_strategy(name, memory_efficient_init=efficient).wrap_model(model)
    check_equal(model, expected)
    assert model._non_persistent_buffers_set == {"frequencies", "mask"}
    # The alias is the buffer again, not a second copy and not a tensor on meta.
    assert (
        model.original_frequencies.untyped_storage().data_ptr()
        == model.frequencies.untyped_storage().data_ptr()
    )


# --- outputs and gradients ---


@by_strategy
@by_efficient
@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_logits_and_gradients_equal_the_single_process_ones(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, efficient: bool, kind: str
) -> None:
    logits = pool.run(compare_training, checkpoint(kind), strategy, efficient, {}, ranks=4)
    assert len(logits) == 4


@by_strategy
@pytest.mark.parametrize("ranks", [1, 3])
def test_gradients_at_other_world_sizes(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, ranks: int
) -> None:
    pool.run(compare_training, checkpoint("qwen3_tied"), strategy, True, {}, ranks=ranks)


def compare_training(directory: str, name: str, efficient: bool, fsdp_config: dict[str, Any]) -> torch.Tensor:
    options = json.dumps(fsdp_config, sort_keys=True, default=str)
    strategy = make_strategy(name, memory_efficient_init=efficient, fsdp_config=fsdp_config)
    assert json.dumps(fsdp_config, sort_keys=True, default=str) == options  # the caller's dict stays as it is
    model = strategy.wrap_model(load(strategy, directory, dtype=torch.float32))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    batch = token_batch()
    reference = reference_gradients(directory)
    with torch.no_grad():
        logits = model(input_ids=own_rows(batch)).logits
        expected = reference(input_ids=own_rows(batch)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    model.train()
    reference.train()
    backward(strategy, language_loss(model, own_rows(batch)))
    check_gradients(model, reference)
    return logits


@pytest.mark.parametrize("kind", ["qwen3_tied", "qwen3_moe"])
def test_logits_are_equal_between_all_modes(pool: RankPool, checkpoint: Checkpoint, kind: str) -> None:
    answers = [
        pool.run(logits_of_mode, checkpoint(kind), strategy, efficient, ranks=2)
        for strategy in STRATEGIES
        for efficient in (True, False)
    ]
    for answer in answers[1:]:
        for got, expected in zip(answer, answers[0], strict=True):
            assert torch.equal(got, expected)


def logits_of_mode(directory: str, name: str, efficient: bool) -> torch.Tensor:
    strategy = make_strategy(name, memory_efficient_init=efficient, mixed_precision="bf16")
    model = strategy.wrap_model(load(strategy, directory))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=own_rows(token_batch())).logits
    return logits


# --- storage stays where it is ---


@by_strategy
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_the_first_forward_leaves_every_shard_where_it_is(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, ranks: int
) -> None:
    pool.run(compare_pointers, checkpoint("qwen3_moe"), strategy, ranks=ranks)


def compare_pointers(directory: str, name: str) -> None:
    strategy = make_strategy(name)
    model = strategy.wrap_model(load(strategy, directory))
    parameters = dict(model.named_parameters())
    before = {fqn: local_of(p).untyped_storage().data_ptr() for fqn, p in parameters.items()}
    sizes = {fqn: local_of(p).untyped_storage().nbytes() for fqn, p in parameters.items()}
    if dist.get_world_size() == 4:
        empty = [fqn for fqn, p in parameters.items() if local_of(p).numel() == 0]
        assert bool(empty) == (dist.get_rank() == 3), (
            "three experts leave the last of four ranks without rows"
        )
    with torch.no_grad():
        model(input_ids=own_rows(token_batch()))
    reshard_all(model)
    after = dict(model.named_parameters())
    for fqn, parameter in parameters.items():
        assert after[fqn] is parameter, f"{fqn}: another Parameter object"
        assert local_of(parameter).untyped_storage().data_ptr() == before[fqn], f"{fqn}: moved"
        assert local_of(parameter).untyped_storage().nbytes() == sizes[fqn], f"{fqn}: resized"


# --- the report ---


@by_strategy
@by_efficient
def test_the_report_says_what_happened(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, efficient: bool
) -> None:
    directory = checkpoint("qwen3_tied")
    reports = pool.run(report_of_wrap, directory, strategy, efficient, ranks=4)
    documents = [json.loads(text) for text, _, _, _ in reports]
    received = [count for _, count, _, _ in reports]
    shards = [count for _, _, count, _ in reports]
    entries = reports[0][3]
    for document in documents:
        assert document["ranks"] == documents[0]["ranks"]
        assert document["schema"] == "shardwise.load_report/1"
        assert document["model"] == directory
        assert document["strategy"] == strategy
        assert document["route"] == ("rank0" if efficient else "none")
        assert document["world_size"] == 4
        assert document["storage_bytes"] == 0
        # Every rank but the source receives its own rows and every buffer, once, and nothing else.
        expected = sum(received[1:]) if efficient else 0
        assert document["network_bytes"] == document["predicted"]["network_bytes"] == expected
        assert sum(document["tensors"].values()) == entries
        assert document["tensors"]["tied"] == 1
        assert document["dtypes"] == {
            "stored": "bfloat16",
            "compute": "bfloat16",
            "reduce": "float32",
            "optimizer": "bfloat16",
        }
        assert set(document["phases"]) >= {"check", "shard", "finish"}
        assert sum(document["phases"].values()) <= document["seconds"] * 1.05 + 0.05
        for rank, part in enumerate(document["ranks"]):
            assert part["rank"] == rank
            assert part["shard_bytes"] == shards[rank]
            assert part["network_bytes"] == (received[rank] if efficient and rank else 0)
            assert 0 < part["seconds"] <= document["seconds"]
        assert sw.LoadReport.from_json(document).to_json() == document


def report_of_wrap(directory: str, name: str, efficient: bool) -> tuple[str, int, int, int]:
    strategy = make_strategy(name, memory_efficient_init=efficient, mixed_precision="bf16")
    assert strategy.last_report is None
    model = load(strategy, directory)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = strategy.wrap_model(model, optimizer)
    locals_ = [p.to_local() for p in model.parameters()]
    buffers = {id(b): b for _, b in model.named_buffers(remove_duplicate=False)}
    attributes = {
        id(e.tensor): e.tensor
        for e in entries_of(model)
        if e.role == "attribute" and id(e.tensor) not in buffers
    }
    payload = sum(t.numel() * t.element_size() for t in [*locals_, *buffers.values(), *attributes.values()])
    stored = sum(local.untyped_storage().nbytes() for local in locals_)
    report = strategy.last_report
    return json.dumps(report.to_json(), allow_nan=False), payload, stored, len(named_tensors(model))


def test_the_report_of_one_rank_moves_nothing(pool: RankPool, checkpoint: Checkpoint) -> None:
    [(text, _, _, _)] = pool.run(report_of_wrap, checkpoint("qwen3_tied"), "native_fsdp", True, ranks=1)
    document = json.loads(text)
    assert document["network_bytes"] == document["predicted"]["network_bytes"] == 0


# --- the process around it ---


@by_strategy
@by_efficient
def test_the_environment_is_the_same_before_and_after(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, efficient: bool
) -> None:
    pool.run(compare_environment, checkpoint("qwen3_tied"), strategy, efficient, ranks=2)


def compare_environment(directory: str, name: str, efficient: bool) -> None:
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = ""  # set, but empty: not the same as unset
    before = dict(os.environ)
    strategy = make_strategy(
        name, memory_efficient_init=efficient, fsdp_config={"activation_checkpointing": True}
    )
    assert dict(os.environ) == before
    with strategy.pretrained_load_context():
        pass
    assert dict(os.environ) == before
    model = load(strategy, directory, dtype=torch.float32)
    assert dict(os.environ) == before
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = strategy.wrap_model(model, optimizer)
    assert dict(os.environ) == before
    backward(strategy, language_loss(model, own_rows(token_batch())))
    optimizer.step()
    strategy.unwrap_model(model)
    assert dict(os.environ) == before


@by_strategy
def test_two_models_and_a_second_strategy_in_one_process(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    pool.run(wrap_two, checkpoint("qwen3_tied"), checkpoint("gpt2"), strategy, ranks=2)


def wrap_two(first_directory: str, second_directory: str, name: str) -> None:
    directories = [first_directory, second_directory, first_directory]
    strategies = [make_strategy(name, memory_efficient_init=efficient) for efficient in (True, True, False)]
    if name == "native_fsdp":
        strategies[1] = strategies[0]
    models = [
        load(strategy, directory, dtype=torch.float32)
        for strategy, directory in zip(strategies, directories, strict=True)
    ]
    for strategy, model in zip(strategies, models, strict=True):
        strategy.wrap_model(model)
    for strategy, model, directory in zip(strategies, models, directories, strict=True):
        check_equal(model, from_checkpoint(directory, dtype=torch.float32))
        backward(strategy, language_loss(model, own_rows(token_batch())))
        check_gradients(model, reference_gradients(directory))


def test_both_strategies_in_one_process(pool: RankPool, checkpoint: Checkpoint) -> None:
    pool.run(wrap_with_both, checkpoint("qwen3_tied"), ranks=2)


def wrap_with_both(directory: str) -> None:
    for name in (*STRATEGIES, STRATEGIES[0]):
        strategy = make_strategy(name)
        check_equal(strategy.wrap_model(load(strategy, directory)), from_checkpoint(directory))


def test_a_second_accelerate_strategy_of_another_precision_is_refused(pool: RankPool) -> None:
    for error in pool.run_to_errors(two_precisions, ranks=2):
        assert isinstance(error, sw.ConfigurationError)
        assert "bf16" in str(error)
        assert "first one's precision" in str(error)


def two_precisions() -> None:
    make_strategy("accelerate", mixed_precision="no")
    make_strategy("accelerate", mixed_precision="bf16")


@by_strategy
def test_unwrap_model_returns_the_model_itself(pool: RankPool, strategy: str) -> None:
    pool.run(unwrap, strategy, ranks=2)


def unwrap(name: str) -> None:
    strategy = make_strategy(name)
    model = strategy.wrap_model(PlainNet())
    assert strategy.unwrap_model(model) is model
    compiled = torch.compile(model, backend="eager")
    assert strategy.unwrap_model(compiled) is model


# --- hybrid sharding ---


@by_strategy
@by_efficient
def test_hybrid_sharding(pool: RankPool, checkpoint: Checkpoint, strategy: str, efficient: bool) -> None:
    pool.run(compare_hybrid, checkpoint("qwen3_tied"), strategy, efficient, ranks=4)


def compare_hybrid(directory: str, name: str, efficient: bool) -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    strategy = make_strategy(name, device_mesh=mesh, memory_efficient_init=efficient)
    model = strategy.wrap_model(load(strategy, directory, dtype=torch.float32))
    check_equal(model, from_checkpoint(directory, dtype=torch.float32))
    whole = sum(p.nbytes for p in model.parameters())
    assert sum(p.to_local().nbytes for p in model.parameters()) < 0.6 * whole
    backward(strategy, language_loss(model, own_rows(token_batch())))
    check_gradients(model, reference_gradients(directory))
    # Replicas hold the same bytes: ranks 0 and 2 the first half, 1 and 3 the second.
    shards = every_rank({clean_fqn(fqn): p.to_local().clone() for fqn, p in model.named_parameters()})
    for left, right in ((0, 2), (1, 3)):
        for fqn, shard in shards[left].items():
            assert torch.equal(shard, shards[right][fqn]), f"{fqn}: replicas differ"
