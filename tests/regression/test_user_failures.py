"""What broke for people who initialised large models for FSDP, one test per failure.

The case numbers only name them: each docstring or name says what went wrong.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import DTensor

import shardwise as sw
from shardwise.materialization import clean_fqn
from shardwise.testing import RankPool
from tests.distributed.models import (
    PlainNet,
    TiedNet,
    check_equal,
    from_checkpoint,
    gathered,
    named_tensors,
    raw_bytes,
    same_bytes,
    write_checkpoint,
)
from tests.distributed.steps import (
    STRATEGIES,
    Checkpoint,
    backward,
    by_efficient,
    by_strategy,
    check_gradients,
    every_rank,
    language_loss,
    load,
    make_strategy,
    own_rows,
    reference_gradients,
    token_batch,
)

pytestmark = pytest.mark.distributed

MIB = 2**20


# --- host memory ---


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A checkpoint whose bf16 weights are 76 MiB, so 152 MiB in float32, most of it in two tensors."""
    directory = tmp_path_factory.mktemp("large")
    yield str(write_checkpoint("qwen3_large", directory))
    shutil.rmtree(directory)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc for anonymous memory")
@by_strategy
def test_case_01_02_06_ranks_that_are_not_the_source_hold_their_shard_and_staging(
    pool: RankPool, checkpoint: Checkpoint, large_checkpoint: str, strategy: str
) -> None:
    # A first load imports modules, which would count here.
    pool.run(measure_load, checkpoint("qwen3_untied"), strategy, ranks=4)
    results = pool.run(measure_load, large_checkpoint, strategy, ranks=4)
    whole = results[0][2]
    assert whole > 70 * MIB
    for rank, (peak, shard, _) in enumerate(results):
        assert shard < 0.26 * whole
        if rank != 0:
            assert peak <= shard + 64 * MIB + 64 * MIB  # the published bound
            # A job of four ranks stages a quarter of 64 MiB on each, and no rank holds a tensor that it keeps a part of.
            assert peak <= shard + 16 * MIB + 32 * MIB < whole


def measure_load(directory: str, name: str) -> tuple[int, int, int]:
    """Return the anonymous peak over load and wrap, this rank's shard and the whole model, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed must not serve this one
    strategy = make_strategy(name)
    # transformers 4 casts each tensor on every rank, one after the other, also onto meta.
    cast = "auto" if transformers.__version__.startswith("4.") else torch.float32
    with sw.profile_memory() as profile:
        model = load(strategy, directory, dtype=cast)
        optimizer = torch.optim.AdamW(model.parameters())
        model, _ = strategy.wrap_model(model, optimizer)
    shard = sum(p.to_local().nbytes for p in model.parameters())
    whole = sum(p.nbytes for p in model.parameters())
    # Neither NaN placeholders nor zeros: every row of this rank's shard is the file's.
    expected = dict(from_checkpoint(directory).named_parameters())
    for fqn, parameter in model.named_parameters():
        chunks = expected[fqn].detach().chunk(dist.get_world_size())
        own = chunks[dist.get_rank()].to(parameter.dtype)
        assert torch.equal(parameter.to_local(), own), fqn
    return profile.anon_peak_bytes, shard, whole


def test_case_03_no_environment_variable_is_needed(pool: RankPool, checkpoint: Checkpoint) -> None:
    pool.run(load_without_environment, checkpoint("qwen3_tied"), ranks=2)


def load_without_environment(directory: str) -> None:
    for name in list(os.environ):
        if name.startswith(("FSDP_", "ACCELERATE_", "LOCAL_", "TORCHELASTIC")) or name in (
            "RANK",
            "WORLD_SIZE",
        ):
            del os.environ[name]
    before = dict(os.environ)
    for name in STRATEGIES:
        strategy = make_strategy(name)
        model = load(strategy, directory)
        assert {p.is_meta for p in model.parameters()} == {dist.get_rank() != 0}
        check_equal(strategy.wrap_model(model), from_checkpoint(directory))
    assert dict(os.environ) == before


@by_strategy
def test_case_05_a_tied_model_takes_the_same_path(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    moved = {}
    for kind in ("qwen3_tied", "qwen3_untied"):
        moved[kind] = pool.run(load_tied_or_not, checkpoint(kind), strategy, ranks=2)[0]
    embedding = 97 * 32 * 2 - 49 * 32 * 2  # the rows of the second of two ranks, bf16
    assert moved["qwen3_untied"] - moved["qwen3_tied"] == embedding  # the tied tensor travels once


def load_tied_or_not(directory: str, name: str) -> int:
    strategy = make_strategy(name)
    model = load(strategy, directory)
    assert {p.is_meta for p in model.parameters()} == {dist.get_rank() != 0}
    model = strategy.wrap_model(model)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    if tied:
        backward(strategy, language_loss(model, own_rows(token_batch())))
        assert model.lm_head.weight.grad is model.model.embed_tokens.weight.grad
    moved: int = strategy.last_report.network_bytes
    return moved


# --- silently wrong weights ---


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Leave freed blocks full of NaN behind, in the sizes in which small tensors are allocated."""
    blocks = [
        torch.full((size,), float("nan"))
        for size in (2, 4, 8, 16, 32, 64, 256, 1024, 4096)
        for _ in range(64)
    ]
    del blocks
    yield


@by_strategy
@pytest.mark.parametrize("kind", ["qwen3_tied", "qwen3_moe"])
@pytest.mark.parametrize("way", ["load_pretrained", "pretrained_load_context"])
def test_case_16_17_18_buffers_are_equal_on_all_ranks_in_bytes_and_dtype(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, kind: str, way: str
) -> None:
    digests = pool.run(digest_buffers, checkpoint(kind), strategy, way, ranks=3)
    assert digests[0]
    for other in digests[1:]:
        assert other == digests[0]


def digest_buffers(directory: str, name: str, way: str) -> dict[str, str]:
    strategy = make_strategy(name)
    with poisoned_memory():
        if way == "load_pretrained":
            model = load(strategy, directory)
        else:
            with strategy.pretrained_load_context():
                model = from_checkpoint(directory)
        if dist.get_rank() != 0:  # as the failure had it: ranks without values cast what they do not have
            for module in model.modules():
                for fqn, buffer in module._buffers.items():
                    if buffer is not None and buffer.is_floating_point():
                        module._buffers[fqn] = buffer.to("meta", torch.bfloat16)
        model = strategy.wrap_model(model)
    expected = dict(from_checkpoint(directory).named_buffers())
    found = dict(model.named_buffers())
    assert list(found) == list(expected)
    for fqn, buffer in found.items():
        assert same_bytes(buffer, expected[fqn]), fqn
    return {
        fqn: f"{buffer.dtype} {hashlib.sha256(raw_bytes(buffer).numpy()).hexdigest()}"
        for fqn, buffer in found.items()
    }


@by_strategy
def test_case_20_ties_last_through_a_step(pool: RankPool, checkpoint: Checkpoint, strategy: str) -> None:
    pool.run(step_tied, checkpoint("qwen3_tied"), strategy, ranks=3)


def step_tied(directory: str, name: str) -> None:
    strategy = make_strategy(name)
    model = load(strategy, directory, dtype=torch.float32)
    model, optimizer = strategy.wrap_model(model, torch.optim.SGD(model.parameters(), lr=0.5))
    before = gathered(model)["lm_head.weight"]
    backward(strategy, language_loss(model, own_rows(token_batch())))
    optimizer.step()
    after = gathered(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], before)
    assert sum(fqn == "lm_head.weight" for fqn in model.state_dict()) == 1


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_case_27_either_name_of_a_tied_weight_may_be_in_the_file(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, kept: str
) -> None:
    directory = tmp_path / "renamed"
    shutil.copytree(checkpoint("qwen3_tied"), directory)
    tensors = load_file(directory / "model.safetensors")
    (tied,) = [fqn for fqn in tensors if fqn in ("model.embed_tokens.weight", "lm_head.weight")]
    weight = tensors.pop(tied)
    names = ["model.embed_tokens.weight", "lm_head.weight"] if kept == "both" else [kept]
    tensors |= {fqn: weight.clone() for fqn in names}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    errors = pool.run_to_errors(load_renamed, str(directory), checkpoint("qwen3_tied"), ranks=2)
    if kept == "lm_head.weight" and errors != [None, None]:
        # transformers 4 does not find the value under this name: then it is an error that says so, never a random one.
        assert isinstance(errors[0], (sw.CheckpointError, sw.LeftOnMetaError))
        assert "embed_tokens.weight" in str(errors[0])
        assert isinstance(errors[1], sw.PeerError)
    else:
        assert errors == [None, None]


def load_renamed(directory: str, original: str) -> None:
    strategy = make_strategy("native_fsdp")
    model = strategy.wrap_model(load(strategy, directory))
    check_equal(model, from_checkpoint(original))


@by_strategy
def test_case_21_replicas_of_hybrid_sharding_are_equal(pool: RankPool, strategy: str) -> None:
    digests = pool.run(digest_replicas, strategy, ranks=4)
    assert digests[0] == digests[2]
    assert digests[1] == digests[3]
    assert digests[0] != digests[1]


def digest_replicas(name: str) -> str:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    model = make_strategy(name, device_mesh=mesh).wrap_model(PlainNet(seed=dist.get_rank()))
    check_equal(model, PlainNet(seed=0))
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(raw_bytes(parameter.to_local()).numpy())
    return digest.hexdigest()


@by_strategy
@by_efficient
def test_case_22_ranks_that_were_seeded_differently_agree_or_raise(
    pool: RankPool, strategy: str, efficient: bool
) -> None:
    errors = pool.run_to_errors(wrap_seeded_differently, strategy, efficient, ranks=3)
    if efficient:
        assert errors == [None] * 3
    else:
        assert all(isinstance(error, sw.RankMismatchError) for error in errors)


def wrap_seeded_differently(name: str, efficient: bool) -> None:
    strategy = make_strategy(name, memory_efficient_init=efficient)
    check_equal(strategy.wrap_model(TiedNet(seed=dist.get_rank())), TiedNet(seed=0))


@by_strategy
@pytest.mark.parametrize("kind", ["qwen3_tied", "qwen3_moe"])
def test_case_19_32_the_first_forward_uses_the_loaded_weights(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, kind: str
) -> None:
    pool.run(forward_at_once, checkpoint(kind), strategy, ranks=2)


def forward_at_once(directory: str, name: str) -> None:
    strategy = make_strategy(name)
    model = load(strategy, directory, dtype=torch.float32)
    model, _ = strategy.wrap_model(model, torch.optim.AdamW(model.parameters()))
    expected = from_checkpoint(directory, dtype=torch.float32)
    with torch.no_grad():
        for _ in range(2):
            logits = model(input_ids=own_rows(token_batch())).logits
            torch.testing.assert_close(
                logits, expected(input_ids=own_rows(token_batch())).logits, rtol=1e-4, atol=1e-5
            )


# --- hangs and bad failures ---


class Experts(nn.Module):
    """Two experts in one tensor, and a router with a bias that is a persistent buffer."""

    def __init__(self, *, sidecar: bool) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 8, 8))
        self.router = nn.Linear(8, 2, bias=False)
        self.router.register_buffer("e_score_correction_bias", torch.rand(2))
        if sidecar:
            self.router.statistics = torch.rand(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.router(x) + self.router.e_score_correction_bias, -1)
        return torch.einsum("be,bd,edo->bo", weights, x, self.experts)


class Mixture(nn.Module):
    def __init__(self, *, sidecar: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Experts(sidecar=sidecar)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


def mixture(*, seed: int, sidecar: bool) -> Mixture:
    torch.manual_seed(seed)
    return Mixture(sidecar=sidecar)


@by_strategy
@by_efficient
def test_case_33_more_ranks_than_experts(pool: RankPool, strategy: str, efficient: bool) -> None:
    pool.run(train_experts, strategy, efficient, False, ranks=4)


@by_strategy
@by_efficient
def test_case_36_37_a_persistent_router_bias_and_keys_that_only_rank_0_has(
    pool: RankPool, strategy: str, efficient: bool
) -> None:
    pool.run(train_experts, strategy, efficient, True, ranks=3)


def train_experts(name: str, efficient: bool, sidecar: bool) -> None:
    inputs = torch.randn(2 * dist.get_world_size(), 8, generator=torch.Generator().manual_seed(5))
    strategy = make_strategy(name, memory_efficient_init=efficient)
    model = mixture(seed=dist.get_rank() if efficient else 0, sidecar=sidecar and dist.get_rank() == 0)
    model = strategy.wrap_model(model)
    reference = mixture(seed=0, sidecar=False)
    check_equal(model, reference)
    assert "layers.0.router.e_score_correction_bias" in model.state_dict()
    backward(strategy, model(own_rows(inputs)).square().mean())
    reference(inputs).square().mean().backward()
    check_gradients(model, reference)


@by_strategy
@pytest.mark.parametrize("failing", [0, 2])
def test_case_38_every_rank_prints_the_first_failure(pool: RankPool, strategy: str, failing: int) -> None:
    errors = pool.run_to_errors(fail_in_unit, strategy, failing, ranks=4, timeout_seconds=60)
    assert isinstance(errors[failing], ValueError)
    for rank, error in enumerate(errors):
        assert "expert 3 is not a number" in str(error)
        if rank != failing:
            assert isinstance(error, sw.PeerError), error
            assert f"rank {failing} on " in str(error)


def fail_in_unit(name: str, failing: int) -> None:
    def policy(module: nn.Module) -> bool:
        if dist.get_rank() == failing:
            raise ValueError("expert 3 is not a number")
        return isinstance(module, nn.Linear)

    make_strategy(name, fsdp_config={"auto_wrap_policy": policy}).wrap_model(PlainNet())


@by_strategy
@pytest.mark.parametrize("rows", [1, 17, 31])
def test_case_39_dim_0_that_no_number_of_ranks_divides(pool: RankPool, strategy: str, rows: int) -> None:
    pool.run(wrap_rows, strategy, rows, ranks=4)


def wrap_rows(name: str, rows: int) -> None:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, rows), nn.Linear(rows, 3))

    check_equal(make_strategy(name).wrap_model(model(dist.get_rank())), model(0))


# --- dtypes and optimizers ---


@by_strategy
@by_efficient
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_case_47_48_the_stored_dtype_is_the_one_asked_for_and_each_dtype_is_reported(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, efficient: bool, dtype: str
) -> None:
    pool.run(check_dtypes, checkpoint("qwen3_tied"), strategy, efficient, dtype, ranks=2)


def check_dtypes(directory: str, name: str, efficient: bool, dtype_name: str) -> None:
    dtype = dtype_name if dtype_name == "auto" else getattr(torch, dtype_name)
    stored = torch.bfloat16 if dtype_name == "auto" else dtype
    strategy = make_strategy(name, memory_efficient_init=efficient, mixed_precision="bf16")
    model = load(strategy, directory, dtype=dtype)
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


@by_strategy
@by_efficient
def test_case_51_an_optimizer_of_some_parameters_stays_one_of_these(
    pool: RankPool, strategy: str, efficient: bool
) -> None:
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


ORDERS = (
    "checkpointing by option",
    "checkpointing by the user",
    "compile the module in place, then wrap",
    "wrap, then compile",
    "compile, then wrap",
)


@by_strategy
@pytest.mark.parametrize("order", ORDERS)
def test_case_55_prefixes_of_wrappers_do_not_break_names(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, order: str
) -> None:
    pool.run(wrap_in_order, checkpoint("qwen3_tied"), strategy, order, ranks=2)


def wrap_in_order(directory: str, name: str, order: str) -> None:
    by_option = order == "checkpointing by option"
    strategy = make_strategy(name, fsdp_config={"activation_checkpointing": by_option})
    model: Any = load(strategy, directory, dtype=torch.float32)
    if order == "checkpointing by the user":
        layers = model.model.layers
        for index, layer in enumerate(layers):
            layers[index] = checkpoint_wrapper(layer)
    elif order == "compile the module in place, then wrap":
        model.compile(backend="eager")
    elif order == "compile, then wrap":
        model = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = strategy.wrap_model(model, optimizer)
    if order == "wrap, then compile":
        model = torch.compile(model, backend="eager")
    reference = reference_gradients(directory)
    got, wanted = gathered(model), dict(named_tensors(reference))
    assert set(got) == set(wanted)
    for fqn, tensor in wanted.items():
        assert same_bytes(got[fqn], tensor), fqn
    sharded = [isinstance(p, DTensor) for p in model.parameters()]
    assert all(sharded)
    plain = strategy.unwrap_model(model)
    assert "OptimizedModule" not in type(plain).__name__
    model.train()
    backward(strategy, language_loss(model, own_rows(token_batch())))
    check_gradients(plain, reference)
    assert {clean_fqn(fqn) for fqn, _ in plain.named_parameters()} == {
        fqn for fqn, _ in reference.named_parameters()
    }


# --- slow ---


@by_strategy
@by_efficient
def test_case_61_one_rank_moves_no_data(pool: RankPool, strategy: str, efficient: bool) -> None:
    pool.run(wrap_alone, strategy, efficient, ranks=1)


def wrap_alone(name: str, efficient: bool) -> None:
    calls: list[str] = []
    c10d = dist.distributed_c10d
    watched = ("scatter", "broadcast", "all_gather", "all_reduce", "_new_process_group_helper")
    originals = {function: getattr(c10d, function) for function in watched}
    strategy = make_strategy(name, memory_efficient_init=efficient)
    for module in (dist, c10d):
        for function in watched:
            if hasattr(module, function):
                setattr(module, function, lambda *args, _function=function, **kwargs: calls.append(_function))
    try:
        model = strategy.wrap_model(PlainNet())
    finally:
        for module in (dist, c10d):
            for function, original in originals.items():
                if hasattr(module, function):
                    setattr(module, function, original)
    assert calls == []
    check_equal(model, PlainNet())
    assert strategy.last_report.network_bytes == 0


def test_case_61_several_ranks_move_each_byte_once(pool: RankPool) -> None:
    """No collective but the scatters, and these carry the plan's bytes and no others."""
    for calls, planned in pool.run(count_collectives, ranks=4):
        assert set(calls) == {"scatter"}
        assert sum(calls["scatter"]) <= planned + 16 * 100 * 4  # alignment of small pieces


def count_collectives() -> tuple[dict[str, list[int]], int]:
    calls: dict[str, list[int]] = {}
    originals = {name: getattr(dist, name) for name in ("scatter", "broadcast", "all_gather", "all_reduce")}

    def counting(function: str) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.setdefault(function, []).append(tensor.nbytes)
            return originals[function](tensor, *args, **kwargs)

        return call

    strategy = make_strategy("native_fsdp")
    for name in originals:
        setattr(dist, name, counting(name))
    try:
        strategy.wrap_model(PlainNet(seed=dist.get_rank()))
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    own = max(every_rank(json.loads(json.dumps(strategy.last_report.ranks[dist.get_rank()].network_bytes))))
    return calls, own
