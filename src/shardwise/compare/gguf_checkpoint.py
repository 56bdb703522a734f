"""Dequantise a GGUF file into a bf16 safetensors directory: `python -m shardwise.compare.gguf_checkpoint FILE DIR`.

A process of its own: the whole model in fp32 passes through memory, which the caller is not to keep.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

# The largest file that splits the demo's 269 MB into four files, whichever order the tensors come in.
MAX_SHARD_SIZE: Final = "70MB"


def write_checkpoint(gguf_file: Path, directory: Path, *, max_shard_size: str) -> None:
    """Write the model and the tokenizer of a GGUF file as a directory that plain `from_pretrained` loads.

    Args:
        gguf_file: The file.
        directory: Where the checkpoint is written; it exists.
        max_shard_size: Size that no file exceeds, as transformers takes it.

    Source:
        The GGUF reader of transformers; 5.x keeps weights packed unless it is told to unpack them.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf_file.parent),
        "gguf_file": gguf_file.name,
        "local_files_only": True,
    }
    unpack: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, **unpack, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = model.generation_config.eos_token_id
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    write_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_size=MAX_SHARD_SIZE)
