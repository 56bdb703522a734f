"""The state dict in memory as a source of tensor values."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from shardwise.checkpoint import StateDictSource
from shardwise.errors import CheckpointError, ShapeMismatchError
from shardwise.tensors import Region, TensorSpec


def spec(fqn: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(fqn=fqn, shape=shape, dtype=dtype)


def test_it_lists_what_it_holds() -> None:
    source = StateDictSource({"a": torch.zeros(1), "b": torch.zeros(2)})
    assert list(source) == ["a", "b"]
    assert len(source) == 2


def test_read_copies_a_region_into_a_strided_destination() -> None:
    full = torch.arange(20.0).reshape(4, 5)
    into = torch.full((4, 6), -1.0)[:2, 1:4]
    StateDictSource({"w": full}).read("w", Region(start=(1, 2), stop=(3, 5)), into)
    assert torch.equal(into, full[1:3, 2:5])


def test_read_writes_into_parameters_without_a_graph() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    StateDictSource({"w": torch.ones(4)}).read("w", Region(start=(0,), stop=(2,)), parameter)
    assert parameter.tolist() == [1.0, 1.0]
    assert parameter.grad_fn is None


def test_read_takes_a_scalar() -> None:
    into = torch.zeros(())
    StateDictSource({"s": torch.tensor(3.5)}).read("s", Region.whole(()), into)
    assert into.item() == 3.5


def test_release_frees_the_tensor_and_may_be_repeated() -> None:
    tensor = torch.zeros(8)
    freed = weakref.ref(tensor)
    source = StateDictSource({"w": tensor, "kept": torch.zeros(1)})
    del tensor
    source.release("w")
    source.release("w")
    gc.collect()
    assert freed() is None
    assert list(source) == ["kept"]


def test_the_callers_mapping_stays_as_it_is() -> None:
    tensors = {"w": torch.zeros(2)}
    StateDictSource(tensors).release("w")
    assert list(tensors) == ["w"]


def test_tensor_returns_the_tensor_itself() -> None:
    tensor = torch.zeros(2)
    assert StateDictSource({"w": tensor}).tensor("w") is tensor


def test_what_the_model_expects_is_accepted() -> None:
    source = StateDictSource({"w": torch.zeros(2, 3), "scalar": torch.zeros(())})
    source.require(spec("w", 2, 3))
    source.require(spec("scalar"))


@pytest.mark.parametrize(
    ("tensors", "error", "expected"),
    [
        (
            {},
            CheckpointError,
            ["w: expected a tensor in the source rank's state, got none", "load_pretrained"],
        ),
        (
            {"w": torch.zeros(2, 3, device="meta")},
            CheckpointError,
            [
                "w: expected values on the source rank, got a tensor on meta",
                "build it off meta on global rank 0",
            ],
        ),
        (
            {"w": torch.zeros(3, 2)},
            ShapeMismatchError,
            ["w: expected (2, 3) from the model, got (3, 2) in the source rank's state", "same config"],
        ),
        (
            {"w": torch.zeros(2, 3, dtype=torch.bfloat16)},
            CheckpointError,
            [
                "w: expected torch.float32 from the model, got torch.bfloat16 in the source rank's state",
                "same dtype",
            ],
        ),
    ],
    ids=["missing", "meta", "shape", "dtype"],
)
def test_what_differs_is_refused(
    tensors: dict[str, torch.Tensor], error: type[CheckpointError], expected: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        StateDictSource(tensors).require(spec("w", 2, 3))
    assert type(caught.value) is error
    for text in expected:
        assert text in str(caught.value)
