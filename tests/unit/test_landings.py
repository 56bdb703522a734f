"""In which copies a buffer gets to a device: pure plans."""

from __future__ import annotations

import torch

from shardwise.conversion import Piece
from shardwise.conversion.pieces import whole
from shardwise.materialization.landings import DIRECT_FROM_BYTES, MAX_GAP_BYTES, Copy, Landing, plan_copies

LARGE = DIRECT_FROM_BYTES // 2  # elements of two bytes


def landing(numel: int, offset: int, dtype: torch.dtype = torch.bfloat16) -> Landing:
    return Landing(fqn=f"{offset}", dtype=dtype, piece=whole((numel,)), offset=offset, is_packed=False)


def planned(*landings: Landing, scratch_bytes: int = 2**30, is_run: bool = True) -> list[Copy]:
    def run_of(one: Landing) -> range | None:
        return range(one.piece.numel) if is_run else None

    return plan_copies(landings, run_of=run_of, scratch_bytes=scratch_bytes)


def test_a_large_run_goes_straight_into_its_shard_and_small_ones_travel_together() -> None:
    large = landing(LARGE, 100)
    small = [landing(8, 100 + 2 * LARGE + 16 * index) for index in range(1000)]
    direct, together = planned(*small, large)
    assert (direct.run, direct.landings) == (range(LARGE), (large,))
    assert (together.run, together.landings) == (None, tuple(small))
    assert (together.start, together.stop) == (small[0].offset, small[-1].stop)


def test_what_is_no_run_of_its_shard_is_placed_from_scratch() -> None:
    (copy,) = planned(landing(LARGE, 0), is_run=False)
    assert copy.run is None
    assert copy.nbytes == DIRECT_FROM_BYTES


def test_bytes_that_nobody_wants_are_left_out_where_they_are_many() -> None:
    near = planned(landing(8, 0), landing(8, 16 + MAX_GAP_BYTES))
    far = planned(landing(8, 0), landing(8, 16 + MAX_GAP_BYTES + 2))
    assert [copy.nbytes for copy in near] == [32 + MAX_GAP_BYTES]
    assert [copy.nbytes for copy in far] == [16, 16]


def test_elements_in_scratch_memory_stand_at_multiples_of_their_size() -> None:
    copies = planned(landing(8, 1), landing(3, 17, torch.uint8), landing(1, 20, torch.float32))
    assert [(copy.start, len(copy.landings)) for copy in copies] == [(1, 2), (20, 1)]


def test_no_copy_is_larger_than_scratch_memory_but_for_one_landing() -> None:
    copies = planned(*(landing(8, 16 * index) for index in range(10)), landing(100, 160), scratch_bytes=64)
    assert [copy.nbytes for copy in copies] == [64, 64, 32, 200]


def test_landings_that_overlap_are_copied_once() -> None:
    (copy,) = planned(landing(8, 0), landing(4, 4))
    assert (copy.start, copy.stop, len(copy.landings)) == (0, 16, 2)


def test_a_strided_piece_spans_what_lies_between_its_elements_unless_it_is_packed() -> None:
    piece = Piece(
        sizes=(4,),
        source_start=0,
        source_strides=(3,),
        target_start=(0,),
        target_dims=(0,),
        target_strides=(1,),
    )
    strided = Landing(fqn="a", dtype=torch.float32, piece=piece, offset=8, is_packed=False)
    packed = Landing(fqn="a", dtype=torch.float32, piece=piece, offset=8, is_packed=True)
    assert (strided.nbytes, strided.stop, strided.is_one_run) == (40, 48, False)
    assert (packed.nbytes, packed.stop, packed.is_one_run) == (16, 24, True)
    buffer = torch.arange(12, dtype=torch.float32).view(torch.uint8)
    assert strided.elements(buffer[8:], begin=8).tolist() == [2, 5, 8, 11]
    assert packed.elements(buffer[8:], begin=8).tolist() == [2, 3, 4, 5]
