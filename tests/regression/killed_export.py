"""Exports in a child that is killed at a random moment, again and again: python killed_export.py FOLDER TIMES.

The child replaces one directory by the next, of two models whose weights are all halves or all ones. After each death the
directory must be one of the two, or not there. Prints what was found, as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

import shardwise as sw

EXPORTS = 2.5  # about as many as fit into the longest life of a child
MOST_SECONDS = 8.0  # of a life, where a machine is slow


def model_of(value: float) -> transformers.PreTrainedModel:
    """Return a model whose weights are all of one value, some of its files larger than a staging buffer."""
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
        initializer_range=value,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter.data, value)
    return model


def found_in(directory: Path) -> str:
    """Return which of the two models a directory holds, or that it is not there; raise if it is neither."""
    if not directory.exists():
        return "nothing"
    config = json.loads((directory / "config.json").read_text())
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    stored = {
        name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    assert stored.keys() == index["weight_map"].keys()
    values = {float(value) for tensor in stored.values() for value in (tensor.min(), tensor.max())}
    assert values == {config["initializer_range"]}, values
    return str(values.pop())


def main(folder: Path, times: int) -> None:
    """Kill, look, and go on from what was left."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a fork keeps no other thread
    random.seed(6)
    models = [model_of(0.5), model_of(1.0)]
    target = folder / "out"
    started = time.monotonic()
    sw.export_checkpoint(models[1], target, max_shard_size="4MB")
    seconds = time.monotonic() - started
    found = [found_in(target)]
    for number in range(times):
        child = os.fork()
        if child == 0:
            try:
                for turn in range(number, number + 10**6):
                    sw.export_checkpoint(models[turn % 2], target, overwrite=True, max_shard_size="4MB")
            finally:
                os._exit(1)
        time.sleep(random.uniform(0, min(EXPORTS * seconds, MOST_SECONDS)))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        found.append(found_in(target))
    sw.export_checkpoint(models[0], target, overwrite=True, max_shard_size="4MB")
    found.append(found_in(target))
    print(json.dumps({"found": found, "left": sorted(os.listdir(folder))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
