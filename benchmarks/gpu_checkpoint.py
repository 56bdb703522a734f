"""A checkpoint of Qwen3-8B's shape, written quickly: values of one random block, turned by another amount for each tensor."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch

from shardwise.compare.generated_config import generated_config

QWEN3_8B_PARAMETERS: Final = 8_190_735_360
_QWEN3_8B: Final = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
_BLOCK_ELEMENTS: Final = 32 * 2**20 + 7
_ALIGNMENT_BYTES: Final = 8
_WRITE_BYTES: Final = 16 * 2**20
_SEED: Final = 0


def write_checkpoint(directory: Path, *, parameters: int, files: int, threads: int) -> int:
    """Write a checkpoint in bf16 that plain `from_pretrained` loads; return its bytes.

    Args:
        directory: New.
        parameters: `QWEN3_8B_PARAMETERS` for that model's shape; else about how many.
        files: Number of safetensors files.
        threads: That write.
    """
    directory.mkdir(parents=True)
    is_8b = parameters == QWEN3_8B_PARAMETERS
    config = generated_config(
        config_kind="dense", parameters=1_000_000_000 if is_8b else parameters, dtype_name="bfloat16"
    )
    config |= _QWEN3_8B if is_8b else {}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shapes = _shapes(directory)
    generator = torch.Generator().manual_seed(_SEED)
    block = (torch.randn(_BLOCK_ELEMENTS, generator=generator) * 0.02).bfloat16()
    jobs: list[tuple[int, int, torch.Tensor]] = []  # descriptor, first byte, values
    descriptors, weight_map = [], {}
    for number, names in enumerate(_divided(shapes, files), start=1):
        name = f"model-{number:05d}-of-{files:05d}.safetensors"
        header, starts = _header({each: shapes[each] for each in names})
        descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        descriptors.append(descriptor)
        os.pwrite(descriptor, header, 0)
        for each in names:
            weight_map[each] = name
            jobs += _jobs(descriptor, len(header) + starts[each], each, math.prod(shapes[each]), block)
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(_write, jobs):
            pass
    for descriptor in descriptors:
        os.close(descriptor)
    total = sum(math.prod(shape) for shape in shapes.values()) * block.element_size()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index) + "\n", encoding="utf-8")
    return total


def _shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _divided(shapes: dict[str, tuple[int, ...]], files: int) -> list[list[str]]:
    """Cut the names into parts of about equal size, none of them empty."""
    total, parts, seen = sum(map(math.prod, shapes.values())), [[] for _ in range(files)], 0  # type: ignore[var-annotated]
    part = 0
    for index, (name, shape) in enumerate(shapes.items()):
        if parts[part] and part < files - 1:
            is_full = seen >= total * (part + 1) / files
            part += is_full or len(shapes) - index <= files - part - 1
        parts[part].append(name)
        seen += math.prod(shape)
    return parts


def _header(shapes: dict[str, tuple[int, ...]]) -> tuple[bytes, dict[str, int]]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, offset = {}, 0
    for name, shape in shapes.items():
        stop = offset + math.prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, stop]}
        starts[name], offset = offset, stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text, starts


def _jobs(
    descriptor: int, start: int, name: str, numel: int, block: torch.Tensor
) -> list[tuple[int, int, torch.Tensor]]:
    if name.endswith("norm.weight"):
        return [(descriptor, start, torch.ones(numel, dtype=block.dtype))]
    jobs, position = [], sum(name.encode()) * 7919 % len(block)
    while numel:
        count = min(numel, len(block) - position, _WRITE_BYTES // block.element_size())
        jobs.append((descriptor, start, block[position : position + count]))
        start += count * block.element_size()
        numel, position = numel - count, (position + count) % len(block)
    return jobs


def _write(job: tuple[int, int, torch.Tensor]) -> None:
    descriptor, start, values = job
    content: Sequence[int] = memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], start + done)  # type: ignore[arg-type]
