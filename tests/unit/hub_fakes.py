"""A hub's cache that is made by hand, and a hub that is a dictionary. Nothing reaches for a network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import huggingface_hub
import torch
from safetensors.torch import save

from shardwise.checkpoint import locate

SHA = "0123456789abcdef0123456789abcdef01234567"
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
LOCATION = locate("org/name")


def sharded() -> dict[str, bytes]:
    return {
        "config.json": b"{}",
        INDEX: json.dumps({"weight_map": {"a": ONE, "b": TWO}}).encode(),
        ONE: save({"a": torch.ones(3)}),
        TWO: save({"b": torch.zeros(2)}),
    }


class Cache:
    """The cache directory of huggingface_hub: blobs, and snapshots that consist of relative links to them."""

    def __init__(self, root: Path) -> None:
        self.repository = root / "models--org--name"

    def add(self, files: Mapping[str, bytes], *, sha: str = SHA, ref: str | None = "main") -> Path:
        snapshot = self.repository / "snapshots" / sha
        for name, content in files.items():
            blob = self.repository / "blobs" / hashlib.sha256(content).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link = snapshot / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                up = "../" * (2 + name.count("/"))
                link.symlink_to(f"{up}blobs/{blob.name}")
        if ref is not None:
            (self.repository / "refs").mkdir(parents=True, exist_ok=True)
            (self.repository / "refs" / ref).write_text(sha)
        return snapshot

    def add_listing(self, names: list[str], *, sha: str = SHA) -> None:
        """Write what huggingface_hub 2 keeps of a repository's list of files; earlier releases have none."""
        path = self.repository / "trees" / f"{sha}.json"
        path.parent.mkdir(parents=True)
        files = {name: {"size": 1, "blob_id": "0" * 40} for name in names}
        path.write_text(json.dumps({"format_version": 1, "files": files}))


class FakeHub:
    """In place of `snapshot_download`: downloads from a dictionary into the cache, or fails."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.files: dict[str, bytes] = {}
        self.error: Exception | None = None
        self.calls: list[tuple[str | None, tuple[str, ...]]] = []

    def __call__(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool = False
    ) -> str:
        if local_files_only:
            return huggingface_hub.snapshot_download(
                repo_id, revision=revision, allow_patterns=allow_patterns, local_files_only=True
            )
        assert repo_id == "org/name"
        self.calls.append((revision, tuple(allow_patterns)))
        if self.error is not None:
            raise self.error
        wanted = {n: c for n, c in self.files.items() if any(fnmatchcase(n, p) for p in allow_patterns)}
        return str(self.cache.add(wanted))

    @property
    def downloaded(self) -> set[str]:
        snapshot = self.cache.repository / "snapshots" / SHA
        return {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_symlink()}
