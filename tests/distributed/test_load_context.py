"""A plain `from_pretrained` inside `pretrained_load_context`: values on the source, meta elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.models import check_equal, from_checkpoint, named_tensors
from tests.distributed.steps import STRATEGIES, load, make_strategy

pytestmark = pytest.mark.distributed

by_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
Checkpoint = Callable[[str], str]
FLAGS = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")


@contextmanager
def opened_weights(record: list[str]) -> Iterator[None]:
    """Record every weights file that is opened, by transformers' safetensors reader or otherwise mapped."""
    import safetensors
    import transformers.modeling_utils as modeling

    original = safetensors.safe_open

    class Recording:
        def __new__(cls, filename: Any, *args: Any, **kwargs: Any) -> Any:
            # transformers 4.57 reads the names, not the values, of a checkpoint's tensors through a meta device.
            if kwargs.get("device") != "meta":
                record.append(Path(filename).name)
            return original(filename, *args, **kwargs)

    holders = [m for m in (safetensors, modeling) if getattr(m, "safe_open", None) is original]
    for module in holders:
        module.safe_open = Recording
    try:
        yield
    finally:
        for module in holders:
            module.safe_open = original


def mapped_weights() -> set[str]:
    """Return the safetensors files that this process has mapped at this moment."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return set()
    return {
        line.split()[-1].rpartition("/")[2]
        for line in maps.read_text().splitlines()
        if ".safetensors" in line
    }


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
    opened: list[str] = []
    with opened_weights(opened), strategy.pretrained_load_context():
        model = from_checkpoint(directory)
    assert dict(os.environ) == before
    source = dist.get_rank() == 0
    assert {p.is_meta for p in model.parameters()} == {not source}
    assert bool(opened) == source, f"rank {dist.get_rank()} opened {opened}"
    if not source:
        assert not mapped_weights()
    check_equal(strategy.wrap_model(model), from_checkpoint(directory))


@by_strategy
def test_no_rank_but_the_source_reads_a_weights_file(
    pool: RankPool, checkpoint: Checkpoint, strategy: str
) -> None:
    counts = pool.run(count_opened, checkpoint("qwen3_untied"), strategy, ranks=4)
    assert counts[0] > 0
    assert counts[1:] == [0, 0, 0]


def count_opened(directory: str, name: str) -> int:
    opened: list[str] = []
    strategy = make_strategy(name)
    with opened_weights(opened):
        model = load(strategy, directory)
        if dist.get_rank() != 0:
            assert not mapped_weights()
        strategy.wrap_model(model)
    return len(opened)


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
        from_checkpoint(directory)
    assert seen == [dict.fromkeys(FLAGS, "true")]
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
    with pytest.raises(OSError, match="gone"), strategy.pretrained_load_context():
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
        check_equal(strategy.wrap_model(given), expected)
