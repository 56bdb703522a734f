"""What each tensor of a model costs a wrap in Python: counted in calls, so that it is the same on every machine."""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from torch.distributed.fsdp import fully_shard

from shardwise.materialization.walking import modules_by_prefix, named_modules_of
from shardwise.strategies.empty_model import build_empty
from shardwise.testing import RankPool
from tests.distributed.models import write_checkpoint
from tests.distributed.steps import make_strategy

pytestmark = pytest.mark.distributed

OF_OTHERS: frozenset[CodeType] = frozenset({build_empty.__code__, fully_shard.__code__})
"""Functions that run the code of transformers and torch for which there is no cheaper way."""
MOST_CALLS = 340  # for each tensor; 290 are counted on transformers 5.23, 248 on 4.57
MOST_WALKS = 9  # for its tensors, whatever their number


WALKS: frozenset[CodeType] = frozenset({modules_by_prefix.__code__, named_modules_of.__code__})


class Calls:
    """Calls of Python functions while the context is open, without those within `OF_OTHERS`; resuming a generator is one."""

    def __init__(self) -> None:
        self.count = self.walks = self.walks_with_collector = self._outside = 0

    def __enter__(self) -> Calls:
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event not in ("call", "return"):
            return
        if frame.f_code in OF_OTHERS:
            self._outside += 1 if event == "call" else -1
        elif event == "call" and not self._outside:
            self.count += 1
            self.walks += frame.f_code is modules_by_prefix.__code__
            self.walks_with_collector += frame.f_code in WALKS and gc.isenabled()


def test_a_wrap_walks_a_model_few_times_and_calls_few_functions_for_each_tensor(
    pool: RankPool, tmp_path: Path
) -> None:
    """With 20 walks and 740 calls for each tensor a model of 20,000 took three times as long beside `fully_shard`."""
    few, many = (str(write_checkpoint(kind, tmp_path / kind)) for kind in ("qwen3_untied", "qwen3_deep"))
    (found,) = pool.run(count_calls, [few, few, many], ranks=1)  # the first load imports modules
    _, of_few, of_many = found
    calls, walks, tensors = (more - less for more, less in zip(of_many, of_few, strict=True))
    assert calls <= MOST_CALLS * tensors
    assert walks == 0 < of_many[1] <= MOST_WALKS


def count_calls(directories: list[str]) -> list[tuple[int, int, int]]:
    importlib.import_module("peft")  # as trainers do: its layers are then looked for
    return [count_calls_of(directory) for directory in directories]


def count_calls_of(directory: str) -> tuple[int, int, int]:
    """Return the calls and walks of a load and a wrap, and the tensors of the model."""
    from transformers import AutoModelForCausalLM

    strategy = make_strategy("native_fsdp")
    with Calls() as calls:
        model = strategy.load_pretrained(AutoModelForCausalLM, directory)
        model = strategy.wrap_model(model)
    # What a walk makes would be enough for the collector to go through all objects of the process, twice in a wrap of 20,000 tensors.
    assert not calls.walks_with_collector
    return calls.count, calls.walks, len(list(model.parameters()))
