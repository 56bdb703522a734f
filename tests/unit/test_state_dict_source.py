"""The state dict in memory as a source of tensor values."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.checkpoint import Run, Source, StateDictSource, StoredTensor
from shardwise.errors import CheckpointError, ShapeMismatchError
from shardwise.tensors import Region, TensorSpec
from shardwise.testing.source_tests import SourceTests


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


# --- as a source of bytes ---


class TestContiguous(SourceTests):
    def make(self, values: Mapping[str, torch.Tensor], directory: Any) -> Source:
        return StateDictSource(values)


class TestTransposed(SourceTests):
    def make(self, values: Mapping[str, torch.Tensor], directory: Any) -> Source:
        dims = {name: tuple(reversed(range(value.dim()))) for name, value in values.items()}
        return StateDictSource(
            {n: v.permute(dims[n]).contiguous().permute(dims[n]) for n, v in values.items()}
        )


class TestStrided(SourceTests):
    def make(self, values: Mapping[str, torch.Tensor], directory: Any) -> Source:
        return StateDictSource({n: torch.stack([v, v], -1)[..., 0] for n, v in values.items()})


class TestParametersInsideOfOthers(SourceTests):
    def make(self, values: Mapping[str, torch.Tensor], directory: Any) -> Source:
        inside = {n: torch.cat([v.flatten()[:1], v.flatten()])[-v.numel() or 1 :] for n, v in values.items()}
        return StateDictSource(
            {n: torch.nn.Parameter(inside[n].view(v.shape), requires_grad=False) for n, v in values.items()}
        )


def read_bytes(source: StateDictSource, name: str, start: int, stop: int) -> bytes:
    got = bytearray(stop - start)
    source.read_into(name, start, memoryview(got))
    return bytes(got)


def test_each_tensor_is_a_file_of_its_own() -> None:
    source = StateDictSource({"w": torch.zeros(2, 3).t(), "s": torch.zeros((), dtype=torch.bfloat16)})
    assert isinstance(source, Source)
    assert source.name == "state dict"
    assert source.tensors == {
        "w": StoredTensor(name="w", shape=(3, 2), dtype=torch.float32, file="w", start=0, stop=24),
        "s": StoredTensor(name="s", shape=(), dtype=torch.bfloat16, file="s", start=0, stop=2),
    }


def test_a_released_tensor_is_not_listed_any_more() -> None:
    source = StateDictSource({"w": torch.zeros(2), "kept": torch.zeros(1)})
    assert list(source.tensors) == ["w", "kept"]
    source.release("w")
    assert list(source.tensors) == ["kept"]


def test_tensors_are_described_once() -> None:
    source = StateDictSource({"w": torch.zeros(2)})
    assert source.tensors["w"] is source.tensors["w"]


def test_nothing_is_mapped_and_closing_lets_go_of_nothing() -> None:
    source = StateDictSource({"w": torch.ones(2)})
    assert source.mapped([Run(file="w", start=0, dtype=torch.float32, numel=2)]) == [None]
    source.require_unchanged()
    source.close()
    assert read_bytes(source, "w", 0, 4) == bytes(torch.ones(1).view(torch.uint8).tolist())


@given(data=st.data())
def test_any_range_of_any_strides_is_that_of_the_contiguous_tensor(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    step = data.draw(st.integers(1, 2))
    dtype = data.draw(st.sampled_from([torch.int8, torch.int16, torch.float32, torch.float64]))
    whole = torch.arange(torch.Size(shape).numel() * step).to(dtype)[::step].view(shape).permute(order)
    if data.draw(st.booleans()):
        whole = whole.unsqueeze(0).expand(3, *whole.shape)
    expected = whole.numpy().tobytes()  # in row-major order
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    assert read_bytes(StateDictSource({"w": whole}), "w", start, stop) == expected[start:stop]


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, 9), (8, 1), (7, 2)])
def test_a_range_outside_of_the_tensor_is_refused(offset: int, length: int) -> None:
    source = StateDictSource({"w": torch.zeros(2)})
    with pytest.raises(CheckpointError) as caught:
        source.read_into("w", offset, memoryview(bytearray(length)))
    assert f"w: expected a range within 8 bytes, got [{offset}, {offset + length})" in str(caught.value)


class LargestResult(TorchDispatchMode):
    """Notes the largest memory behind any tensor that an operation returns, other than its inputs' own."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        own = {
            value.untyped_storage().data_ptr()
            for value in (*args, *(kwargs or {}).values())
            if isinstance(value, torch.Tensor)
        }
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in own:
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("nbytes", [4, 400, 4000, 40_002])
def test_a_read_of_strided_elements_takes_its_own_size_and_no_more(nbytes: int) -> None:
    full = torch.zeros(1000, 1000).t()
    with LargestResult() as largest:
        read_bytes(StateDictSource({"w": full}), "w", 4002, 4002 + nbytes)
    # `into` itself counts among the results; a range may cut an element at either end.
    assert largest.nbytes <= nbytes + 2 * 4


def test_a_read_of_contiguous_elements_takes_nothing() -> None:
    content = bytearray(4000)
    target = memoryview(content)
    full = torch.ones(1000, 1000)
    with LargestResult() as largest:
        StateDictSource({"w": full}).read_into("w", 4, target)
    assert largest.nbytes == 0
    assert torch.frombuffer(content, dtype=torch.float32).eq(1).all()


def test_a_tensor_that_repeats_itself_is_not_written_out() -> None:
    # A file of a few bytes may hold a tensor that claims to be larger than any memory.
    source = StateDictSource({"w": torch.ones(1).expand(2**20, 2**20)})
    assert read_bytes(source, "w", 2**41 + 4, 2**41 + 8) == bytes(torch.ones(1).view(torch.uint8).tolist())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            {"w": torch.zeros(1)},
            "state dict: expected tensors by name, got dict under 'x'. If the state dict",
        ),
        (3, "state dict: expected tensors by name, got int under 'x'"),
        (
            torch.zeros(2, device="meta"),
            "x: expected a full tensor with values in the state dict, got one on meta. Pass tensors that have values.",
        ),
        (torch.eye(2).to_sparse(), "got one of layout torch.sparse_coo. Make it dense and plain"),
        (torch.zeros(2, dtype=torch.complex64).conj(), "got a lazily conjugated or negated one."),
    ],
    ids=["dictionary", "number", "meta", "sparse", "conjugated"],
)
def test_what_has_no_bytes_of_its_own_is_refused(value: Any, expected: str) -> None:
    source = StateDictSource({"x": value})
    with pytest.raises(CheckpointError) as caught:
        _ = source.tensors
    assert expected in str(caught.value)


def test_a_sharded_state_dict_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        source = StateDictSource({"x": DTensor.from_local(torch.zeros(2), mesh, [Replicate()])})
        with pytest.raises(
            CheckpointError, match=r"x: expected a full tensor .* got a DTensor .*full_state_dict=True"
        ):
            _ = source.tensors
    finally:
        dist.destroy_process_group()
