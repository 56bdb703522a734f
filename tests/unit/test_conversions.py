"""Every conversion operation of transformers, every shard dim, against the operation itself on values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

from shardwise.checkpoint import StoredTensor
from shardwise.conversion import ConversionGroup, KeyMap, derive
from shardwise.materialization.placing import place_in
from shardwise.plan import Layout

core = pytest.importorskip("transformers.core_model_loading", reason="transformers 4 converts nothing")


@dataclass
class Case:
    """An operation on sources of some shapes.

    Args:
        operation: The operation.
        sources: Shapes by pattern.
        targets: Patterns of the results.
        shapes: Of parameters that the operation asks the model for.
        config: That the operation asks.
    """

    operation: Any
    sources: Mapping[str, list[tuple[int, ...]]]
    targets: list[str]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config: Any = None


def experts(draw: st.DrawFn, *, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [shape] * draw(st.integers(1, 5))


def chunk(draw: st.DrawFn) -> Case:
    dim, parts = draw(st.integers(0, 1)), draw(st.integers(1, 4))
    shape = [draw(st.integers(1, 6)), draw(st.integers(1, 6))]
    shape[dim] *= parts  # torch.chunk makes fewer parts of a size that they do not divide
    return Case(core.Chunk(dim=dim), {"qkv": [tuple(shape)]}, [f"t{i}" for i in range(parts)])


def split(draw: st.DrawFn) -> Case:
    dim, sizes = draw(st.integers(0, 1)), draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    shape = [3, 4]
    shape[dim] = sum(sizes)
    shapes = {}
    for number, size in enumerate(sizes):
        of_target = list(shape)
        of_target[dim] = size
        shapes[f"t{number}"] = tuple(of_target)
    return Case(core.Split(dim=dim), {"qkv": [tuple(shape)]}, list(shapes), shapes=shapes)


def concatenate(draw: st.DrawFn) -> Case:
    dim = draw(st.integers(0, 1))
    sources = {}
    for number in range(draw(st.integers(1, 3))):
        shape = [3, 4]
        shape[dim] = draw(st.integers(1, 6))
        sources[f"s{number}"] = [tuple(shape)]
    return Case(core.Concatenate(dim=dim), sources, ["t"])


def interleave(draw: st.DrawFn) -> Case:
    dim, shape = draw(st.integers(0, 1)), [draw(st.integers(1, 5)), draw(st.integers(1, 5))]
    shape[dim] *= 2
    return Case(core.Interleave(dim=dim, inverse=draw(st.booleans())), {"s": [tuple(shape)]}, ["t"])


def merge(draw: st.DrawFn) -> Case:
    of_one = experts(draw, shape=(draw(st.integers(1, 4)), draw(st.integers(1, 4))))
    return Case(core.MergeModulelist(dim=draw(st.integers(0, 1))), {"s": of_one}, ["t"])


def split_list(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
    return Case(core.SplitModulelist(dim=draw(st.integers(0, 1))), {"s": [shape]}, ["t.*.w"])


def transpose(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=3, max_size=3)))
    dims = draw(st.permutations([0, 1, 2]))[:2]
    return Case(core.Transpose(dim0=dims[0], dim1=dims[1]), {"s": [shape]}, ["t"])


def transpose_if_needed(draw: st.DrawFn) -> Case:
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    wanted = shape if draw(st.booleans()) else shape[::-1]
    return Case(core.Transpose(check_dims=True), {"s": [shape]}, ["t"], shapes={"t": wanted})


def conv_to_linear(draw: st.DrawFn) -> Case:
    shape = (draw(st.integers(1, 5)), 3, 2, 2, 2)
    return Case(core.Conv3dToLinear(in_channels=3, kernel_size=(2, 2, 2)), {"s": [shape]}, ["t"])


def linear_to_conv(draw: st.DrawFn) -> Case:
    shape = (draw(st.integers(1, 5)), 24)
    return Case(core.LinearToConv3d(in_channels=3, kernel_size=(2, 2, 2)), {"s": [shape]}, ["t"])


def permute_for_rope(draw: st.DrawFn) -> Case:
    heads, half = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rows = heads * 2 * half
    shape = (rows, draw(st.integers(1, 4))) if draw(st.booleans()) else (rows,)
    operation = core.PermuteForRope(inverse=draw(st.booleans()))
    return Case(operation, {"s": [shape]}, ["t"], config=SimpleNamespace(num_attention_heads=heads))


def _vision(heads: int) -> SimpleNamespace:
    return SimpleNamespace(vision_config=SimpleNamespace(num_attention_heads=heads))


def vision_fuse(draw: st.DrawFn) -> Case:
    heads, half = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = (heads * 2 * half, 3)
    operation = core.VisionFuseAndPermuteForRope(permute_layer_names=["q", "k"])
    return Case(operation, {"q": [shape], "k": [shape], "v": [shape]}, ["t"], config=_vision(heads))


def vision_unfuse(draw: st.DrawFn) -> Case:
    heads, half = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    operation = core.VisionUnfuseAndPermuteForRope(permute_layer_names=["q", "k"])
    shape = (3 * heads * 2 * half, 3)
    return Case(operation, {"qkv": [shape]}, ["q", "k", "v"], config=_vision(heads))


def ernie_fuse(draw: st.DrawFn) -> Case:
    count, shape = 2 * draw(st.integers(1, 3)), (draw(st.integers(1, 4)), 3)
    operation = core.ErnieFuseAndSplitTextVisionExperts()
    return Case(operation, {"gate": [shape] * count, "up": [shape] * count}, ["text", "vision"])


def ernie_split(draw: st.DrawFn) -> Case:
    shape = (draw(st.integers(1, 3)), 2 * draw(st.integers(1, 3)), 3)
    operation = core.ErnieSplitAndDecoupleTextVisionExperts()
    return Case(operation, {"text": [shape], "vision": [shape]}, ["gate.*.w", "up.*.w"])


def identity(draw: st.DrawFn) -> Case:
    return Case(core._IdentityOp(), {"t": [(draw(st.integers(1, 5)), 3)]}, ["t"])


CASES: dict[str, Callable[[st.DrawFn], Case]] = {
    "Chunk": chunk,
    "Split": split,
    "Concatenate": concatenate,
    "Interleave": interleave,
    "MergeModulelist": merge,
    "SplitModulelist": split_list,
    "Transpose": transpose,
    "Transpose where shapes differ": transpose_if_needed,
    "Conv3dToLinear": conv_to_linear,
    "LinearToConv3d": linear_to_conv,
    "PermuteForRope": permute_for_rope,
    "VisionFuseAndPermuteForRope": vision_fuse,
    "VisionUnfuseAndPermuteForRope": vision_unfuse,
    "ErnieFuseAndSplitTextVisionExperts": ernie_fuse,
    "ErnieSplitAndDecoupleTextVisionExperts": ernie_split,
    "_IdentityOp": identity,
}


def test_every_operation_of_transformers_is_among_the_cases() -> None:
    declared = {
        name
        for name, found in vars(core).items()
        if isinstance(found, type)
        and issubclass(found, core.ConversionOps)
        and found is not core.ConversionOps
    }
    unknown = declared - set(CASES)
    assert not unknown, f"transformers has new operations: {sorted(unknown)}. Add a case for each."


@pytest.mark.parametrize("name", CASES)
@given(data=st.data(), ranks=st.integers(1, 7))
@settings(max_examples=40)
def test_shards_looked_up_in_the_sources_are_those_of_the_operation(
    name: str, data: st.DataObject, ranks: int
) -> None:
    case = data.draw(st.composite(CASES[name])())
    group, stored, values = group_of(case)
    key_map = derived(group, stored)
    assert not key_map.whole, f"{name} is not followed: {key_map.whole[0].reason}"
    assert group.convert is not None
    made = group.convert({pattern: [values[n] for n in names] for pattern, names in group.sources.items()})
    assert set(key_map.recipes) == set(made)
    for target, expected in made.items():
        recipe = key_map.recipes[target]
        assert recipe.shape == tuple(expected.shape)
        for dim in range(expected.ndim):
            layout = Layout(mesh_shape=(ranks,), mesh_ranks=tuple(range(ranks)), placements=(Shard(dim),))
            for rank in range(ranks):
                shape = layout.local_shape(recipe.shape, rank)
                assert shape is not None
                shard = torch.full(shape, -1)
                for part in recipe.parts:
                    for piece in layout.local_pieces(part.piece, recipe.shape, rank):
                        flat = values[part.source].reshape(-1)
                        found = flat.as_strided(piece.sizes, piece.source_strides, piece.source_start)
                        place_in(shard, piece).copy_(found)
                size = math.ceil(expected.shape[dim] / ranks)
                low = min(rank * size, expected.shape[dim])
                wanted = expected.narrow(dim, low, min(size, expected.shape[dim] - low))
                assert torch.equal(shard, wanted), f"{name}: {target}, dim {dim}, rank {rank} of {ranks}"


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@settings(max_examples=40)
def test_the_way_back_writes_every_element_of_every_source_once(name: str, data: st.DataObject) -> None:
    case = data.draw(st.composite(CASES[name])())
    group, stored, values = group_of(case)
    assert group.convert is not None
    made = group.convert({pattern: [values[n] for n in names] for pattern, names in group.sources.items()})
    writes = {source: torch.zeros(value.numel(), dtype=torch.int64) for source, value in values.items()}
    found = {source: torch.full((value.numel(),), -1) for source, value in values.items()}
    for target, recipe in derived(group, stored).recipes.items():
        flat = made[target].reshape(-1).clone()  # `as_strided` counts from the start of the storage
        for part in recipe.parts:
            back = part.piece.reversed(recipe.shape)
            assert back.numel == part.piece.numel
            half = found[part.source].numel() // 2  # a file's extent begins and ends anywhere
            for low, high in ((0, half), (half, found[part.source].numel())):
                for piece in back.cut_target(0, low, high):
                    taken = flat.as_strided(piece.sizes, piece.source_strides, piece.source_start)
                    place_in(writes[part.source], piece).add_(1)
                    place_in(found[part.source], piece).copy_(taken)
    for source, value in values.items():
        assert writes[source].eq(1).all(), f"{name}: {source} is written {writes[source].tolist()} times"
        assert torch.equal(found[source], value.reshape(-1)), f"{name}: {source}"


def derived(
    group: ConversionGroup,
    stored: Mapping[str, StoredTensor],
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> KeyMap:
    shapes = shapes or dict.fromkeys(group.targets, ())
    return derive([group], stored, shapes=shapes, dtype_of=lambda _: dtype)


def group_of(case: Case) -> tuple[ConversionGroup, dict[str, StoredTensor], dict[str, torch.Tensor]]:
    """Return an operation as a group, what a checkpoint says of its sources, and coordinates as their values."""
    stored, values, sources, position = {}, {}, {}, 0
    for pattern, shapes in case.sources.items():
        names = []
        for number, shape in enumerate(shapes):
            name, count = f"{pattern}.{number}", math.prod(shape)
            stored[name] = StoredTensor(
                name=name,
                shape=shape,
                dtype=torch.int64,
                file="f",
                start=8 * position,
                stop=8 * (position + count),
            )
            values[name] = torch.arange(position, position + count).reshape(shape)
            position += count
            names.append(name)
        sources[pattern] = tuple(names)
    model = SimpleNamespace(get_parameter=lambda name: torch.empty(case.shapes[name], device="meta"))

    def convert(tensors: Mapping[str, list[torch.Tensor]]) -> Mapping[str, torch.Tensor]:
        made = case.operation.convert(
            dict(tensors),
            source_patterns=list(case.sources),
            target_patterns=list(case.targets),
            full_layer_name=case.targets[0],
            model=model,
            config=case.config,
        )
        return {name: of[0] if isinstance(of, list) else of for name, of in made.items()}

    group = ConversionGroup(
        target=case.targets[0],
        targets=tuple(case.targets),
        sources=sources,
        convert=convert,
        operations=type(case.operation).__name__,
    )
    return group, stored, values


def computing(
    convert: Callable[[torch.Tensor], Mapping[str, torch.Tensor]], *targets: str
) -> tuple[Any, Any]:
    """Return a conversion of one source of shape (4, 3), and what is stored."""
    group, stored, _ = group_of(Case(core.Chunk(dim=0), {"s": [(4, 3)]}, ["a", "b"]))
    computes = ConversionGroup(
        target=targets[0],
        targets=targets,
        sources=group.sources,
        convert=lambda tensors: convert(tensors["s"][0]),
        operations="Computes",
    )
    return computes, stored


def test_an_operation_that_computes_is_given_whole_tensors_with_the_reason() -> None:
    key_map = derived(*computing(lambda s: {"a": s * 2, "b": s[:1]}, "a", "b"))
    assert not key_map.recipes
    (whole,) = key_map.whole
    assert whole.shapes == {"a": (4, 3), "b": (1, 3)}
    assert "mul" in whole.reason
    assert not whole.made_dtypes


def filled(s: torch.Tensor) -> torch.Tensor:
    made = torch.empty(s.shape, dtype=s.dtype)
    made[:2], made[2:] = s[2:], s[:2]
    return made


WANT_VALUES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a tensor made on the host": lambda s: s * torch.arange(4, dtype=s.dtype, device="cpu")[:, None],
    "a tensor made anywhere": lambda s: s * torch.arange(4, dtype=s.dtype)[:, None],
    "allocated and filled": filled,
    "a question about values": lambda s: s if s.abs().max() > 0 else -s,
    "numpy": lambda s: torch.from_numpy(s.float().numpy().copy()).to(s.dtype),
}


@pytest.mark.parametrize("kind", WANT_VALUES)
def test_an_operation_that_wants_values_is_expected_to_make_what_the_model_has(kind: str) -> None:
    computes = computing(lambda s: {"a": WANT_VALUES[kind](s)}, "a", "b")
    key_map = derived(*computes, shapes={"a": (4, 3), "b": (2, 2), "c": (1,)})
    assert not key_map.recipes
    assert key_map.whole[0].shapes["a"] == (4, 3)


def test_a_result_in_another_dtype_is_on_record_and_not_looked_up() -> None:
    computes = computing(lambda s: {"a": s.float(), "b": s[:2]}, "a", "b")
    key_map = derived(*computes)
    assert not key_map.recipes
    assert key_map.whole[0].taken_dtype == torch.bfloat16
    assert key_map.whole[0].made_dtypes == {"a": torch.float32}
    assert set(derived(*computes, dtype=torch.float32).recipes) == {"a", "b"}  # no change of dtype there


def test_an_operation_that_fails_without_values_is_left_to_the_run_on_values() -> None:
    case = Case(core.Concatenate(dim=0), {"a": [(4, 3)], "b": [(4, 2)]}, ["t"])
    group, stored, _ = group_of(case)
    (whole,) = derived(group, stored, shapes={"t": (8, 3)}).whole
    assert whole.shapes == {"t": (8, 3)}
    assert "Sizes of tensors must match" in whole.reason
