"""`materialize` finds a checkpoint's names behind PEFT, `torch.compile` and activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.materialization import entries_of, take_values
from shardwise.testing import RankPool
from tests.distributed.models import causal_model, check_equal, from_checkpoint, named_tensors, same_bytes
from tests.distributed.steps import Checkpoint

pytestmark = [
    pytest.mark.distributed,
    # peft 0.21 asks transformers 5.23 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

KIND = "qwen3_untied"


def checkpointed(model: Any) -> Any:
    layers = model.get_submodule("model.layers")
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    return model


def compiled_layers(model: Any) -> Any:
    layers = model.get_submodule("model.layers")
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], r=2)
    return peft.get_peft_model(model, config)


WRAPPERS: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "checkpointing": (checkpointed,),
    "compile": (compiled,),
    "compile each layer": (compiled_layers,),
    "checkpointing, then compile": (checkpointed, compiled),
    "PEFT": (adapted,),
    "checkpointing, then PEFT": (checkpointed, adapted),
    "checkpointing, then PEFT, then compile": (checkpointed, adapted, compiled),
}


@pytest.mark.parametrize("order", WRAPPERS)
def test_each_base_value_is_found(pool: RankPool, checkpoint: Checkpoint, order: str) -> None:
    pool.run(fill_wrapped, checkpoint(KIND), order, ranks=2)


def fill_wrapped(directory: str, order: str) -> None:
    from accelerate import init_empty_weights

    with init_empty_weights(
        include_buffers=False
    ):  # rotary embeddings of 4.57 compute theirs when they are built
        model = causal_model(KIND)
    for wrap in WRAPPERS[order]:
        model = wrap(model)
    take_values(entries_of(model), keep=False)  # PEFT makes its own parameters off meta
    fully_shard(model)
    is_adapter = adapted in WRAPPERS[order]
    report = sw.materialize(model, directory, dtype="auto", missing=["*lora_*"] if is_adapter else "error")
    expected = dict(named_tensors(from_checkpoint(directory)))
    found = set()
    for fqn, parameter in model.named_parameters():
        if "lora_" in fqn:
            assert report.origins[sw_name(fqn)] == "initialised"
            continue
        name = base_name(fqn)
        assert same_bytes(parameter.full_tensor(), expected[name]), fqn
        found.add(name)
    assert found == {name for name, tensor in expected.items() if isinstance(tensor, nn.Parameter)}
    assert report.tensors["checkpoint"] == len(found) + (
        1 if is_adapter else 0
    )  # the trainable copy of the head


def sw_name(fqn: str) -> str:
    return fqn.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def base_name(fqn: str) -> str:
    """What the name was before anything was wrapped around it."""
    for added in (
        "base_model.model.",
        "base_layer.",
        "original_module.",
        "modules_to_save.default.",
    ):
        fqn = fqn.replace(added, "")
    return sw_name(fqn)


def test_fully_shard_does_not_hide_what_transformers_declares_for_a_class(
    pool: RankPool, checkpoint: Checkpoint
) -> None:
    pool.run(fill_sharded, checkpoint("qwen3_moe"), ranks=2)


def fill_sharded(directory: str) -> None:
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(directory))
    fully_shard(model)  # the very model whose class and kind transformers 5 keeps conversions for
    cls = type(model)
    sw.materialize(model.eval(), directory, dtype="auto")
    assert type(model) is cls
    check_equal(model, AutoModel.from_pretrained(directory, dtype="auto"))
    report = sw.verify_shards(model, directory)
    assert report.is_equal
    assert report.absent == ()
