"""Snapshots of hub checkpoints in a cache of the hub's layout."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save

from shardwise.checkpoint import (
    SafetensorsSource,
    cached_snapshot,
    locate,
    snapshot_revision,
)
from shardwise.errors import DamagedFileError
from tests.unit.hub_fakes import INDEX, LOCATION, ONE, SHA, TWO, Cache, sharded


def test_a_complete_snapshot_is_found_and_its_links_are_read(cache: Cache) -> None:
    snapshot = cache.add(sharded())
    assert cached_snapshot(LOCATION) == snapshot
    source = SafetensorsSource.open(snapshot)
    assert set(source.tensors) == {"a", "b"}
    stored, content = source.tensors["a"], bytearray(12)
    source.read_into(stored.file, stored.start, memoryview(content))
    source.close()
    assert torch.equal(torch.frombuffer(content, dtype=torch.float32), torch.ones(3))


def test_one_file_needs_no_index(cache: Cache) -> None:
    snapshot = cache.add({"config.json": b"{}", "model.safetensors": save({"a": torch.ones(1)})})
    assert cached_snapshot(LOCATION) == snapshot


def test_nothing_cached(cache: Cache) -> None:
    assert cached_snapshot(LOCATION) is None


@pytest.mark.parametrize("lacking", [ONE, TWO, INDEX, "config.json"])
def test_a_partial_snapshot_is_none(cache: Cache, lacking: str) -> None:
    files = sharded()
    del files[lacking]
    cache.add(files)
    if lacking == INDEX:  # both numbered files together are complete without it
        (cache.repository / "snapshots" / SHA / TWO).unlink()
    assert cached_snapshot(LOCATION) is None


def test_a_snapshot_with_descriptions_only_is_none(cache: Cache) -> None:
    cache.add({"config.json": b"{}"})
    assert cached_snapshot(LOCATION) is None


def test_a_link_without_its_blob_is_none(cache: Cache) -> None:
    snapshot = cache.add(sharded())
    (snapshot / TWO).resolve().unlink()
    assert (snapshot / TWO).is_symlink()
    assert cached_snapshot(LOCATION) is None


def test_files_that_no_load_needs_may_be_missing(cache: Cache) -> None:
    snapshot = cache.add(sharded())
    cache.add_listing([*sharded(), "tokenizer.json", "consolidated.safetensors"])
    assert cached_snapshot(LOCATION) == snapshot


def test_a_listed_weight_file_that_is_missing_is_none(cache: Cache) -> None:
    files = sharded()
    del files[TWO]
    cache.add(files)
    cache.add_listing([*sharded()])
    assert cached_snapshot(LOCATION) is None


def test_a_damaged_index_is_an_error(cache: Cache) -> None:
    cache.add({**sharded(), INDEX: b"{"})
    with pytest.raises(DamagedFileError, match="expected an index in JSON"):
        cached_snapshot(LOCATION)


def test_the_revision_decides(cache: Cache) -> None:
    other = "f" * 40
    new, old = cache.add(sharded()), cache.add(sharded(), sha=other, ref="v1")
    assert cached_snapshot(LOCATION) == new
    assert cached_snapshot(locate("org/name", revision="v1")) == old
    assert cached_snapshot(LOCATION.at(other)) == old
    assert cached_snapshot(locate("org/name", revision="v2")) is None


def test_ranks_pin_the_commit_of_the_first(cache: Cache) -> None:
    path = cached_snapshot(LOCATION) or cache.add(sharded())
    pinned = LOCATION.at(snapshot_revision(path))
    assert pinned.revision == SHA
    cache.add(sharded(), sha="e" * 40)  # meanwhile, main has moved
    assert cached_snapshot(pinned) == path
    assert cached_snapshot(LOCATION) != path


def test_a_subfolder(cache: Cache) -> None:
    snapshot = cache.add({f"unet/{name}": content for name, content in sharded().items()})
    assert cached_snapshot(LOCATION, subfolder="unet") == snapshot
    assert cached_snapshot(LOCATION) is None
