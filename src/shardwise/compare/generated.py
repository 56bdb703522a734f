"""Write random checkpoints of any size, tensor by tensor, so that the model is never whole in memory."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from shardwise.compare.generated_config import generated_config
from shardwise.compare.random_values import constant_bytes, random_bytes
from shardwise.errors import CheckpointError, ConfigurationError
from shardwise.tensors import dtype_name

_STANDARD_DEVIATION: Final = 0.02
# Safetensors' names of the dtypes that can be asked for.
_DTYPE_CODES: Final = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_HEADER_ALIGNMENT_BYTES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedCheckpoint:
    """What was written.

    Args:
        directory: Where it is.
        parameters: Number of parameters.
        tensors: Number of tensors on disk.
        data_bytes: Size of their values.
    """

    directory: Path
    parameters: int
    tensors: int
    data_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _StoredTensor:
    name: str
    shape: tuple[int, ...]
    data_bytes: int


def generate_checkpoint(
    directory: Path, *, config_kind: str, parameters: int, dtype: torch.dtype, seed: int, files: int
) -> GeneratedCheckpoint:
    """Write a random checkpoint that plain `from_pretrained` loads, in the layout that the hub has.

    Weights are random around zero with standard deviation 0.02, norms are one. The values depend on each
    tensor's name and the seed alone.

    Args:
        directory: Where to write; it must not exist, or be empty. It appears whole or not at all.
        config_kind: `dense` (Qwen3) or `moe` (Qwen3-MoE, each expert's matrices on their own).
        parameters: About how many parameters.
        dtype: bfloat16, float16 or float32.
        seed: Of the values.
        files: Number of safetensors files.

    Raises:
        ConfigurationError: An argument is not possible.
        CheckpointError: The directory is there already.
    """
    if dtype not in _DTYPE_CODES:
        raise ConfigurationError(f"dtype: expected one of {', '.join(map(str, _DTYPE_CODES))}, got {dtype}.")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(
            f"{directory}: expected an empty or a new directory. Remove it, or choose another."
        )
    config = generated_config(config_kind=config_kind, parameters=parameters, dtype_name=dtype_name(dtype))
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        stored = _stored_tensors(unfinished, dtype=dtype)
        _write_files(unfinished, _split(stored, files=files), dtype=dtype, seed=seed)
        unfinished.chmod(0o755)  # mkdtemp's own mode keeps others out
        os.replace(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return GeneratedCheckpoint(
        directory=directory,
        parameters=sum(math.prod(tensor.shape) for tensor in stored),
        tensors=len(stored),
        data_bytes=sum(tensor.data_bytes for tensor in stored),
    )


def _stored_tensors(directory: Path, *, dtype: torch.dtype) -> list[_StoredTensor]:
    """Names and shapes on disk, from the model that `config.json` describes, in an order that no version changes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        shapes |= _on_disk(name, tuple(tensor.shape))
    return [
        _StoredTensor(name=name, shape=shape, data_bytes=math.prod(shape) * dtype.itemsize)
        for name, shape in sorted(shapes.items(), key=lambda item: _natural(item[0]))
    ]


def _on_disk(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Split what transformers 5 fuses in memory: the hub has each expert's matrices on their own."""
    stem, _, last = name.rpartition(".")
    if not stem.endswith(".experts"):
        return {name: shape}
    experts, rows, columns = shape
    if last == "gate_up_proj":
        parts = {"gate_proj": (rows // 2, columns), "up_proj": (rows // 2, columns)}
    else:
        parts = {last: (rows, columns)}
    return {
        f"{stem}.{expert}.{part}.weight": part_shape
        for expert in range(experts)
        for part, part_shape in parts.items()
    }


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _split(tensors: Sequence[_StoredTensor], *, files: int) -> list[list[_StoredTensor]]:
    """Cut the sequence into consecutive parts of about equal size, none of them empty."""
    if not 1 <= files <= len(tensors):
        raise ConfigurationError(
            f"files: expected 1 to {len(tensors)}, one tensor in each at least, got {files}."
        )
    total_bytes = sum(tensor.data_bytes for tensor in tensors)
    parts: list[list[_StoredTensor]] = [[] for _ in range(files)]
    part, seen_bytes = 0, 0
    for index, tensor in enumerate(tensors):
        is_full = seen_bytes >= total_bytes * (part + 1) / files
        is_needed_later = len(tensors) - index <= files - part - 1
        if parts[part] and (is_full or is_needed_later) and part < files - 1:
            part += 1
        parts[part].append(tensor)
        seen_bytes += tensor.data_bytes
    return parts


def _write_files(
    directory: Path, parts: Sequence[Sequence[_StoredTensor]], *, dtype: torch.dtype, seed: int
) -> None:
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = (
            "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        )
        _write_file(directory / name, part, dtype=dtype, seed=seed)
        weight_map |= {tensor.name: name for tensor in part}
    if len(parts) > 1:
        total_bytes = sum(tensor.data_bytes for part in parts for tensor in part)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_file(path: Path, tensors: Sequence[_StoredTensor], *, dtype: torch.dtype, seed: int) -> None:
    """Write one file: the length of the header, the header, then the values without gaps.

    Source:
        The format description of safetensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _DTYPE_CODES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.data_bytes],
        }
        offset += tensor.data_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            elements = math.prod(tensor.shape)
            if tensor.name.endswith("norm.weight"):
                chunks = constant_bytes(1.0, elements=elements, dtype=dtype)
            else:
                chunks = random_bytes(
                    tensor.name,
                    elements=elements,
                    seed=seed,
                    standard_deviation=_STANDARD_DEVIATION,
                    dtype=dtype,
                )
            file.writelines(chunks)
