"""A plain `from_pretrained` inside `pretrained_load_context`: values on the source, meta elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.models import check_equal, from_checkpoint, named_tensors
from tests.distributed.steps import (
    Checkpoint,
    by_strategy,
    load,
    make_strategy,
)

pytestmark = pytest.mark.distributed

FLAGS = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")


@contextmanager
def resident_weights(directory: str, record: list[int]) -> Iterator[None]:
    """Record how many bytes of a directory's safetensors files are in this process's memory each time that a reader closes one."""
    import transformers.modeling_utils as modeling

    original = modeling.safe_open

    class Recording:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._file = original(*args, **kwargs)

        def __enter__(self) -> Recording:
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> Any:
            record.append(resident_bytes_of_weights(directory))
            return self._file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    modeling.safe_open = Recording
    try:
        yield
    finally:
        modeling.safe_open = original


def resident_bytes_of_weights(directory: str) -> int:
    """Return the resident bytes of every safetensors file of a directory that this process has mapped."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):  # the line that opens a mapping: addresses, flags, path
            inside = bool(rest) and rest[-1].startswith(directory) and rest[-1].endswith(".safetensors")
        elif inside and first == "Rss:":
            total += int(rest[0]) * 1024
    return total


@by_strategy
@pytest.mark.parametrize("kind", ["qwen3_tied", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("local_rank", ["as launched", "unset", "0 everywhere"])
def test_the_source_has_values_and_the_others_none(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, kind: str, local_rank: str
) -> None:
    pool.run(load_in_context, checkpoint(kind), strategy, local_rank, ranks=3)


def load_in_context(directory: str, name: str, local_rank: str) -> None:
    if local_rank == "unset":  # a bare srun
        del os.environ["LOCAL_RANK"]
    elif local_rank == "0 everywhere":  # one rank per node
        os.environ["LOCAL_RANK"] = "0"
    strategy = make_strategy(name)
    before = dict(os.environ)
    with strategy.pretrained_load_context():
        model = from_checkpoint(directory)
    assert dict(os.environ) == before
    assert {p.is_meta for p in model.parameters()} == {dist.get_rank() != 0}
    check_equal(strategy.wrap_model(model), from_checkpoint(directory))


reads_to_cast = pytest.mark.xfail(
    transformers.__version__.startswith("4."),
    reason="transformers 4 reads every tensor that it casts, also onto meta",
    strict=True,
)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
@pytest.mark.parametrize("way", ["load_pretrained", "pretrained_load_context"])
@pytest.mark.parametrize("dtype", ["auto", pytest.param("float32", marks=reads_to_cast)])
def test_no_rank_but_the_source_reads_weights(
    pool: RankPool, checkpoint: Checkpoint, way: str, dtype: str
) -> None:
    most_bytes = pool.run(largest_resident_part, checkpoint("qwen3_wide"), way, dtype, ranks=3)
    whole = (Path(checkpoint("qwen3_wide")) / "model.safetensors").stat().st_size
    assert most_bytes[0] > 0.9 * whole
    # The other ranks look at the header of the file, and the system maps pages around it, of whatever size it keeps them in.
    assert max(most_bytes[1:]) < 0.3 * whole


def largest_resident_part(directory: str, way: str, dtype_name: str) -> int:
    dtype = dtype_name if dtype_name == "auto" else getattr(torch, dtype_name)
    seen: list[int] = []
    strategy = make_strategy("native_fsdp")
    with resident_weights(os.path.realpath(directory), seen):
        if way == "load_pretrained":
            model = load(strategy, directory, dtype=dtype)
        else:
            with strategy.pretrained_load_context():
                model = from_checkpoint(directory, dtype=dtype)
        if dist.get_rank() == 0:
            sum(p.sum() for p in model.parameters())  # mapped values are read when they are used
    seen.append(resident_bytes_of_weights(os.path.realpath(directory)))
    return max(seen)


# --- the flags ---


@contextmanager
def flags_at_load(record: list[dict[str, str | None]]) -> Iterator[None]:
    """Record the two flags as `from_pretrained` sees them when it builds the model."""
    from transformers import Qwen3ForCausalLM

    original = Qwen3ForCausalLM.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        record.append({flag: os.environ.get(flag) for flag in FLAGS})
        original(self, *args, **kwargs)

    Qwen3ForCausalLM.__init__ = init
    try:
        yield
    finally:
        Qwen3ForCausalLM.__init__ = original


@by_strategy
@pytest.mark.parametrize("earlier", [None, "", "false", "true"])
def test_the_flags_are_set_during_the_load_and_restored_after(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, earlier: str | None
) -> None:
    pool.run(watch_flags, checkpoint("qwen3_tied"), strategy, earlier, ranks=2)


def watch_flags(directory: str, name: str, earlier: str | None) -> None:
    strategy = make_strategy(name)
    for flag in FLAGS:
        os.environ.pop(flag, None)
        if earlier is not None:
            os.environ[flag] = earlier
    seen: list[dict[str, str | None]] = []
    with flags_at_load(seen), strategy.pretrained_load_context():
        assert {os.environ.get(flag) for flag in FLAGS} == {"true"}
        from_checkpoint(directory)
        assert {os.environ.get(flag) for flag in FLAGS} == {"true"}
    # 4.57 would take the flags as an order to give this rank real parameters where LOCAL_RANK is not 0.
    unset = dist.get_rank() != 0 and transformers.__version__.startswith("4.")
    assert seen == [dict.fromkeys(FLAGS, None if unset else "true")]
    assert {os.environ.get(flag) for flag in FLAGS} == {earlier}
    with pytest.raises(RuntimeError, match="in the body"), strategy.pretrained_load_context():
        raise RuntimeError("in the body")
    assert {os.environ.get(flag) for flag in FLAGS} == {earlier}


@by_strategy
def test_without_memory_efficient_init_the_context_does_nothing(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    pool.run(watch_disabled, checkpoint("qwen3_tied"), strategy, ranks=2)


def watch_disabled(directory: str, name: str) -> None:
    from transformers import PreTrainedModel

    strategy = make_strategy(name, memory_efficient_init=False)
    original = PreTrainedModel.__dict__["from_pretrained"]
    before = dict(os.environ)
    seen: list[dict[str, str | None]] = []
    with flags_at_load(seen), strategy.pretrained_load_context():
        assert PreTrainedModel.__dict__["from_pretrained"] is original
        assert dict(os.environ) == before
        model = from_checkpoint(directory)
    assert seen == [dict.fromkeys(FLAGS, None)]
    assert not any(tensor.is_meta for _, tensor in named_tensors(model))


# --- from_pretrained itself ---


@by_strategy
def test_from_pretrained_is_itself_again_afterwards(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    pool.run(watch_method, checkpoint("qwen3_tied"), strategy, ranks=2)


def watch_method(directory: str, name: str) -> None:
    from transformers import PreTrainedModel, Qwen3ForCausalLM

    strategy = make_strategy(name)
    original = PreTrainedModel.__dict__["from_pretrained"]
    with strategy.pretrained_load_context():
        # Any class and any spelling of the call is covered, also several loads in one context.
        models = [from_checkpoint(directory), Qwen3ForCausalLM.from_pretrained(directory)]
    with pytest.raises(Exception, match="gone"), strategy.pretrained_load_context():
        Qwen3ForCausalLM.from_pretrained(f"{directory}/gone")
    assert PreTrainedModel.__dict__["from_pretrained"] is original
    assert "from_pretrained" not in Qwen3ForCausalLM.__dict__
    for model in models:
        assert {p.is_meta for p in model.parameters()} == {dist.get_rank() != 0}
    after = from_checkpoint(directory)
    assert not any(tensor.is_meta for _, tensor in named_tensors(after))


@by_strategy
def test_loading_info_and_dtype_still_work(pool: RankPool, checkpoint: Checkpoint, strategy: str) -> None:
    pool.run(load_with_info, checkpoint("qwen3_tied"), strategy, ranks=2)


def load_with_info(directory: str, name: str) -> None:
    from transformers import AutoModelForCausalLM

    strategy = make_strategy(name)
    with strategy.pretrained_load_context():
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
    assert "missing_keys" in info
    check_equal(strategy.wrap_model(model), from_checkpoint(directory, dtype=torch.float32))


@by_strategy
@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_a_device_map_of_the_user_is_refused_on_every_rank(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, device_map: Any
) -> None:
    for error in pool.run_to_errors(load_with_device_map, checkpoint("gpt2"), strategy, device_map, ranks=2):
        assert isinstance(error, sw.ConfigurationError), error
        assert f"device_map={device_map!r}" in str(error)
        assert "Leave device_map out" in str(error)


def load_with_device_map(directory: str, name: str, device_map: Any) -> None:
    from transformers import AutoModelForCausalLM

    with make_strategy(name).pretrained_load_context():
        AutoModelForCausalLM.from_pretrained(directory, device_map=device_map)


@by_strategy
def test_two_contexts_at_once_are_refused(pool: RankPool, strategy: str) -> None:
    for error in pool.run_to_errors(nest_contexts, strategy, ranks=2):
        assert isinstance(error, sw.ConfigurationError), error
        assert "one is open already" in str(error)


def nest_contexts(name: str) -> None:
    strategy = make_strategy(name)
    with strategy.pretrained_load_context(), strategy.pretrained_load_context():
        pass


@by_strategy
def test_values_that_come_back_in_spite_of_the_context_are_an_error(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    errors = pool.run_to_errors(ignore_device_map, checkpoint("qwen3_tied"), strategy, ranks=2)
    assert errors[0] is None
    assert isinstance(errors[1], sw.UnsupportedVersionError), errors[1]
    assert "got values in 24 parameters" in str(errors[1]) or "got values in" in str(errors[1])
    assert "load_pretrained" in str(errors[1])


def ignore_device_map(directory: str, name: str) -> None:
    from transformers import PreTrainedModel, Qwen3ForCausalLM

    strategy = make_strategy(name)
    original = PreTrainedModel.__dict__["from_pretrained"]

    def deaf(cls: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_map", None)
        return Qwen3ForCausalLM(Qwen3ForCausalLM.config_class.from_pretrained(directory))

    PreTrainedModel.from_pretrained = classmethod(deaf)
    try:
        with strategy.pretrained_load_context():
            Qwen3ForCausalLM.from_pretrained(directory)
    finally:
        PreTrainedModel.from_pretrained = original


@by_strategy
def test_flags_left_on_by_a_launcher_do_not_keep_the_source_empty(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    pool.run(load_under_flags, checkpoint("qwen3_tied"), strategy, ranks=2)


def load_under_flags(directory: str, name: str) -> None:
    os.environ.update(dict.fromkeys(FLAGS, "true"))
    os.environ["LOCAL_RANK"] = str(1 - dist.get_rank())  # the source is not its node's first rank
    strategy = make_strategy(name)
    before = dict(os.environ)
    with strategy.pretrained_load_context():
        model = from_checkpoint(directory)
    assert {p.is_meta for p in model.parameters()} == {dist.get_rank() != 0}
    loaded = load(strategy, directory)
    assert dict(os.environ) == before
    del os.environ[FLAGS[0]], os.environ[FLAGS[1]]
    expected = from_checkpoint(directory)
    for given in (model, loaded):
        check_equal(make_strategy(name).wrap_model(given), expected)
