"""Bad input and failing ranks: a clear error on every rank, no hang, and a process that works on."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardwise as sw
from shardwise.checkpoint import StateDictSource
from shardwise.testing import RankPool
from tests.distributed.models import PlainNet, TiedNet, check_equal, from_checkpoint
from tests.distributed.steps import (
    SECONDS_TO_COME,
    Checkpoint,
    by_efficient,
    by_strategy,
    load,
    make_strategy,
    naming_only,
)

pytestmark = pytest.mark.distributed

MOST_SECONDS = 60.0


def errors_of(pool: RankPool, function: Callable[..., Any], *args: Any, ranks: int) -> list[BaseException]:
    """Return every rank's error; fail if a rank has none, or hangs."""
    errors = pool.run_to_errors(function, *args, ranks=ranks, timeout_seconds=MOST_SECONDS)
    assert all(errors), f"a rank did not fail: {errors}"
    return [error for error in errors if error is not None]


# --- the model ---


@by_strategy
@by_efficient
def test_wrapping_twice(pool: RankPool, strategy: str, efficient: bool) -> None:
    for error in errors_of(pool, wrap_twice, strategy, efficient, False, ranks=2):
        assert isinstance(error, sw.AlreadyWrappedError), error
        assert "once per model" in str(error)


@by_strategy
def test_wrapping_a_model_of_which_a_part_is_sharded(pool: RankPool, strategy: str) -> None:
    for error in errors_of(pool, wrap_twice, strategy, True, True, ranks=2):
        assert isinstance(error, sw.AlreadyWrappedError), error
        assert "layers.0" in str(error)


def wrap_twice(name: str, efficient: bool, only_a_part: bool) -> None:
    strategy = make_strategy(name, memory_efficient_init=efficient)
    model = PlainNet()
    strategy.wrap_model(model.layers[0] if only_a_part else model)
    strategy.wrap_model(model)


@by_strategy
@by_efficient
@pytest.mark.parametrize(
    ("what", "texts"),
    [
        ("name", ["other.weight", "out.weight"]),
        ("shape", ["out.weight", "(5, 8)", "(6, 8)"]),
        ("dtype", ["out.weight", "float32", "float64"]),
        ("frozen", ["out.weight", "trainable", "frozen"]),
        ("buffer", ["mean", "(8,)", "(9,)"]),
        ("tie", ["head.weight", "embed.weight = head.weight"]),
        ("order", ["in another order"]),
    ],
)
def test_models_that_differ_between_ranks(
    pool: RankPool, strategy: str, efficient: bool, what: str, texts: list[str]
) -> None:
    for error in errors_of(pool, wrap_different, strategy, efficient, what, ranks=3):
        assert isinstance(error, sw.RankMismatchError), error
        assert "on rank 2 is not that of rank 0" in str(error)
        assert "Build the model from the same config" in str(error)
        for text in texts:
            assert text in str(error)


def wrap_different(name: str, efficient: bool, what: str) -> None:
    model: Any = TiedNet() if what == "tie" else PlainNet()
    if dist.get_rank() == 2:
        if what == "name":
            model.other = model.out
            del model.out
        elif what == "shape":
            model.out = nn.Linear(8, 6, bias=False)
        elif what == "dtype":
            model.out = model.out.double()
        elif what == "frozen":
            model.out.requires_grad_(False)
        elif what == "buffer":
            model.mean = torch.zeros(9)
        elif what == "tie":
            model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        elif what == "order":
            model.layers = nn.ModuleList([*model._modules.pop("layers")])
    make_strategy(name, memory_efficient_init=efficient).wrap_model(model)


@by_strategy
def test_options_that_differ_between_ranks(pool: RankPool, strategy: str) -> None:
    for error in errors_of(pool, wrap_with_other_option, strategy, ranks=2):
        assert isinstance(error, sw.RankMismatchError), error
        assert "reshard_after_forward: False" in str(error)
        assert "same arguments on every rank" in str(error)


def wrap_with_other_option(name: str) -> None:
    options = {"reshard_after_forward": dist.get_rank() == 0}
    make_strategy(name, fsdp_config=options).wrap_model(PlainNet())


# --- values ---


@by_strategy
def test_other_values_on_other_ranks_lose_to_the_source(pool: RankPool, strategy: str) -> None:
    pool.run(wrap_with_own_values, strategy, True, ranks=3)


@by_strategy
def test_other_values_on_other_ranks_are_refused_where_every_rank_counts(
    pool: RankPool, strategy: str
) -> None:
    for error in errors_of(pool, wrap_with_own_values, strategy, False, ranks=3):
        assert isinstance(error, sw.RankMismatchError), error
        assert "values differ in layers.0.scale" in str(error)
        assert "seed all ranks alike" in str(error)


def wrap_with_own_values(name: str, efficient: bool) -> None:
    model = PlainNet(seed=dist.get_rank())
    check_equal(make_strategy(name, memory_efficient_init=efficient).wrap_model(model), PlainNet(seed=0))


@by_strategy
def test_a_source_rank_without_values(pool: RankPool, strategy: str) -> None:
    errors = errors_of(pool, wrap_all_meta, strategy, True, ranks=2)
    assert isinstance(errors[0], sw.CheckpointError), errors[0]
    assert isinstance(errors[1], sw.PeerError), errors[1]
    for error in errors:
        assert "expected values on the source rank" in str(error)


@by_strategy
def test_meta_parameters_where_every_rank_counts(pool: RankPool, strategy: str) -> None:
    for error in errors_of(pool, wrap_all_meta, strategy, False, ranks=2):
        assert isinstance(error, sw.CheckpointError), error
        assert "expected values of layers.0.scale on every rank" in str(error)


def wrap_all_meta(name: str, efficient: bool) -> None:
    make_strategy(name, memory_efficient_init=efficient).wrap_model(PlainNet().to("meta"))


# --- a rank that fails, a rank that does not come ---


@contextmanager
def reads_that_fail(after: int) -> Iterator[None]:
    """Make the source's reads raise from the call number `after` on."""
    original, calls = StateDictSource.read, 0

    def read(self: StateDictSource, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(f"disk gone at read {calls}")
        original(self, *args)

    StateDictSource.read = read
    try:
        yield
    finally:
        StateDictSource.read = original


@by_strategy
@pytest.mark.parametrize("after", [0, 5])
def test_a_source_that_fails_half_way_and_a_retry(pool: RankPool, strategy: str, after: int) -> None:
    texts = pool.run(fail_then_retry, strategy, after, ranks=4, timeout_seconds=MOST_SECONDS)
    assert texts[0] == f"OSError: disk gone at read {after + 1}"
    for text in texts[1:]:
        assert text.startswith("PeerError: wrap_model")
        assert (
            f"rank 0 on {socket.gethostname()} failed first: OSError: disk gone at read {after + 1}" in text
        )


def fail_then_retry(name: str, after: int) -> str:
    strategy = make_strategy(name)
    try:
        with reads_that_fail(after):
            strategy.wrap_model(PlainNet(seed=dist.get_rank()))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    else:
        raise AssertionError("expected an error")
    # The user's group and the same process still work, with a new model.
    dist.barrier()
    for seed in (7, 8):
        model = make_strategy(name).wrap_model(PlainNet(seed=seed if dist.get_rank() == 0 else 0))
        check_equal(model, PlainNet(seed=seed))
    return text


@by_strategy
def test_a_load_that_fails_on_the_source_and_a_retry(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    texts = pool.run(
        fail_load_then_retry, strategy, checkpoint("qwen3_tied"), ranks=3, timeout_seconds=MOST_SECONDS
    )
    assert texts[0] == "OSError: no such share"
    for text in texts[1:]:
        assert text.startswith("PeerError: load_pretrained, phase 'load'")
        assert f"rank 0 on {socket.gethostname()} failed first: OSError: no such share" in text


class FailingModel:
    """Stands for a model class whose files cannot be read."""

    @classmethod
    def from_pretrained(cls, name: str, **arguments: Any) -> tuple[nn.Module, dict[str, Any]]:
        raise OSError("no such share")


def fail_load_then_retry(name: str, directory: str) -> str:
    from transformers import AutoModelForCausalLM

    strategy = make_strategy(name)
    cls = FailingModel if dist.get_rank() == 0 else AutoModelForCausalLM
    try:
        strategy.load_pretrained(cls, directory, defer=False)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    else:
        raise AssertionError("expected an error")
    check_equal(strategy.wrap_model(load(strategy, directory)), from_checkpoint(directory))
    return text


@by_strategy
def test_a_rank_that_is_not_the_source_fails(pool: RankPool, strategy: str) -> None:
    errors = errors_of(pool, fail_on_last_rank, strategy, ranks=3)
    assert isinstance(errors[2], sw.OptimizerError)
    for error in errors[:2]:
        assert isinstance(error, sw.PeerError), error
        assert "rank 2 on " in str(error)
        assert "OptimizerError" in str(error)


def fail_on_last_rank(name: str) -> None:
    model = PlainNet()
    owner = PlainNet() if dist.get_rank() == 2 else model
    make_strategy(name).wrap_model(model, torch.optim.SGD(owner.parameters(), lr=0.1))


@pytest.mark.parametrize(("strategy", "late"), [("native_fsdp", 0), ("accelerate", 3)])
def test_a_rank_that_never_arrives_is_named_at_the_timeout(pool: RankPool, strategy: str, late: int) -> None:
    texts = pool.run(stay_away, strategy, late, ranks=4, timeout_seconds=MOST_SECONDS)
    assert texts[late] == ""
    present = [text for rank, text in enumerate(texts) if rank != late]
    for text in present:
        assert f"rank {late} (of 4 ranks) did not arrive" in text
        assert "waited 1 s" in text
        assert "longer timeout" in text
    assert any(text.startswith("RankTimeoutError") for text in present)


def stay_away(name: str, late: int) -> str:
    make_strategy(name).wrap_model(PlainNet())  # what a first call imports takes longer than the timeout
    strategy, store, text = make_strategy(name, timeout=1.0), dist.distributed_c10d._get_default_store(), ""
    if dist.get_rank() != late:
        with naming_only(late), pytest.raises(sw.RankError) as caught:
            strategy.wrap_model(PlainNet())
        text = f"{type(caught.value).__name__}: {caught.value}"
    gave_up = store.add("gave up", int(bool(text)))
    deadline = time.monotonic() + SECONDS_TO_COME
    while gave_up < 3 and time.monotonic() < deadline:  # the others must not see that the late rank has ended
        time.sleep(0.01)
        gave_up = store.add("gave up", 0)
    return text


# --- the constructors ---


@by_strategy
@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ({"mixed_precision": "bf61"}, ["'bf61'", "no, bf16, fp16, fp8"]),
        ({"mixed_precision": "fp16"}, ["fp16", "CPU", "'bf16' or 'no'"]),
        ({"mixed_precision": "fp8"}, ["fp8", "'bf16'"]),
        ({"route": "teleport"}, ["route", "auto, direct, replicate, node, rank0, striped", "'teleport'"]),
        ({"timeout": "15"}, ["timeout: expected seconds as a number", "got '15'"]),
        ({"device_mesh": (2,)}, ["device_mesh: expected a torch DeviceMesh or None, got (2,)"]),
    ],
)
def test_arguments_that_are_refused(
    pool: RankPool, strategy: str, arguments: dict[str, Any], texts: list[str]
) -> None:
    for error in errors_of(pool, construct, strategy, arguments, ranks=2):
        assert isinstance(error, sw.ConfigurationError), error
        for text in texts:
            assert text in str(error)


def construct(name: str, arguments: dict[str, Any]) -> None:
    make_strategy(name, **arguments)


@by_strategy
@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((2, 2), ("dp_shard", "dp_replicate")),
        ((2, 2), ("dp_shard", "tp")),
        ((2, 2), None),
        ((1, 2, 2), ("pp", "dp_replicate", "dp_shard")),
    ],
    ids=str,
)
def test_meshes_of_other_axes(
    pool: RankPool, strategy: str, shape: tuple[int, ...], names: tuple[str, ...] | None
) -> None:
    for error in errors_of(pool, construct_on_mesh, strategy, shape, names, ranks=4):
        assert isinstance(error, sw.ConfigurationError), error
        assert "expected one axis, or two named dp_replicate or dp and dp_shard or fsdp" in str(error)
        assert str(shape) in str(error)


def construct_on_mesh(name: str, shape: tuple[int, ...], names: tuple[str, ...] | None) -> None:
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=names)
    dist.barrier()  # a rank that has ended would break the groups that others still connect
    make_strategy(name, device_mesh=mesh)


@by_strategy
def test_a_mesh_that_does_not_hold_this_rank(pool: RankPool, strategy: str) -> None:
    errors = pool.run_to_errors(construct_outside_of_mesh, strategy, ranks=3)
    assert errors[:2] == [None, None]
    assert isinstance(errors[2], sw.ConfigurationError), errors[2]
    assert "expected a mesh that holds this rank (2 of 3)" in str(errors[2])


def construct_outside_of_mesh(name: str) -> None:
    mesh = dist.device_mesh.DeviceMesh("cpu", [0, 1])
    strategy = make_strategy(name, device_mesh=mesh)
    check_equal(strategy.wrap_model(PlainNet(seed=dist.get_rank())), PlainNet(seed=0))


@by_strategy
def test_a_mesh_of_any_one_axis(pool: RankPool, strategy: str) -> None:
    pool.run(wrap_on_odd_axis, strategy, ranks=2)


def wrap_on_odd_axis(name: str) -> None:
    for names in (("workers",), None):
        mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=names)
        model = make_strategy(name, device_mesh=mesh).wrap_model(PlainNet(seed=dist.get_rank()))
        check_equal(model, PlainNet(seed=0))


@by_strategy
def test_other_objects_than_optimizers(pool: RankPool, strategy: str) -> None:
    for error in errors_of(pool, wrap_with_list, strategy, ranks=2):
        assert isinstance(error, sw.ConfigurationError), error
        assert "after the model, got list" in str(error)


def wrap_with_list(name: str) -> None:
    make_strategy(name).wrap_model(PlainNet(), [1, 2])


@by_strategy
def test_an_optimizer_in_the_models_place(pool: RankPool, strategy: str) -> None:
    for error in errors_of(pool, wrap_optimizer_first, strategy, ranks=2):
        assert isinstance(error, sw.ConfigurationError), error
        assert "expected a model first, an nn.Module, got SGD" in str(error)


def wrap_optimizer_first(name: str) -> None:
    make_strategy(name).wrap_model(torch.optim.SGD(PlainNet().parameters()))


# --- load_pretrained ---


@by_strategy
@by_efficient
def test_missing_weights_are_an_error_that_lists_names(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, efficient: bool
) -> None:
    directory = checkpoint("qwen3_tied")
    errors = errors_of(pool, load_classifier, strategy, directory, efficient, "error", ranks=2)
    assert isinstance(errors[0], sw.CheckpointError), errors[0]
    for error in errors:
        assert isinstance(error, (sw.CheckpointError, sw.PeerError))
        for text in (directory, "none for score.weight. If", "missing='init'"):
            assert text in str(error)


@by_strategy
@by_efficient
@pytest.mark.parametrize("missing", ["init", "score.*", ["lm_head.*", "sc*.weight"]], ids=str)
def test_missing_weights_can_be_initialised(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, efficient: bool, missing: Any
) -> None:
    answers = pool.run(load_classifier, strategy, checkpoint("qwen3_tied"), efficient, missing, ranks=3)
    for head, counts in answers:
        assert torch.equal(head, answers[0][0])  # one head, not one per rank
        assert 0.001 < head.float().std() < 0.1  # as the model initialises it: 0.02
        assert counts["initialised"] == 1


def load_classifier(
    name: str, directory: str, efficient: bool, missing: Any
) -> tuple[torch.Tensor, dict[str, int]]:
    from transformers import AutoModelForSequenceClassification

    # Where every rank's values count, the user seeds them alike; on the efficient path that is not needed.
    torch.manual_seed(dist.get_rank() if efficient else 0)
    strategy = make_strategy(name, memory_efficient_init=efficient)
    model = strategy.load_pretrained(
        AutoModelForSequenceClassification, directory, missing=missing, num_labels=3, pad_token_id=0
    )
    strategy.wrap_model(model)
    return model.score.weight.full_tensor().detach(), strategy.last_report.tensors


@by_strategy
def test_a_pattern_that_does_not_cover_what_is_missing(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    errors = errors_of(pool, load_classifier, strategy, checkpoint("qwen3_tied"), True, "lm_head.*", ranks=2)
    assert isinstance(errors[0], sw.CheckpointError)
    assert "score.weight" in str(errors[0])


@by_strategy
@by_efficient
@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ({"device_map": "auto"}, ["device_map='auto'", "Leave device_map out"]),
        ({"torch_dtype": torch.float32}, ["torch_dtype=torch.float32 is called dtype= here"]),
        ({"dtype": "bfloat"}, ["got 'bfloat'. Did you mean 'bfloat16'?"]),
    ],
    ids=lambda value: next(iter(value), ""),
)
def test_arguments_of_load_pretrained_that_are_refused(
    pool: RankPool,
    checkpoint: Checkpoint,
    strategy: str,
    efficient: bool,
    arguments: dict[str, Any],
    texts: list[str],
) -> None:
    directory = checkpoint("qwen3_tied")
    for error in errors_of(pool, load_with, strategy, directory, efficient, arguments, ranks=2):
        assert isinstance(error, sw.ConfigurationError), error
        for text in texts:
            assert text in str(error)


def load_with(name: str, directory: str, efficient: bool, arguments: dict[str, Any]) -> None:
    load(make_strategy(name, memory_efficient_init=efficient), directory, **arguments)


@by_strategy
@by_efficient
def test_dtypes_by_name(pool: RankPool, checkpoint: Checkpoint, strategy: str, efficient: bool) -> None:
    pool.run(load_by_name, strategy, checkpoint("qwen3_tied"), efficient, ranks=2)


def load_by_name(name: str, directory: str, efficient: bool) -> None:
    strategy = make_strategy(name, memory_efficient_init=efficient)
    for given, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("float32", torch.float32)):
        for defer in (True, False):
            model = load(strategy, directory, dtype=given, defer=defer)
            assert {p.dtype for p in model.parameters()} == {dtype}


@by_strategy
def test_a_tokenizer_in_the_models_place_on_one_rank(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    first, second = errors_of(pool, load_tokenizer, strategy, checkpoint("qwen3_tied"), ranks=2)
    assert isinstance(second, sw.ConfigurationError)
    assert "got AutoTokenizer" in str(second)
    assert isinstance(first, sw.PeerError)
    assert "got AutoTokenizer" in str(first)


def load_tokenizer(name: str, directory: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cls = AutoModelForCausalLM if dist.get_rank() == 0 else AutoTokenizer
    make_strategy(name).load_pretrained(cls, directory)


@by_strategy
def test_a_directory_that_does_not_exist(pool: RankPool, strategy: str, tmp_path: Any) -> None:
    for error in errors_of(pool, load_with, strategy, str(tmp_path / "gone"), True, {}, ranks=2):
        assert "gone" in str(error)


def test_errors_name_the_first_failure_only_once(pool: RankPool) -> None:
    errors = errors_of(pool, fail_on_last_rank, "native_fsdp", ranks=2 + 1)
    assert str(errors[0]).count("failed first") == 1
    assert str(errors[0]) == str(errors[1])
