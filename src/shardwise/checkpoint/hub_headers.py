"""The headers of a model on the hub, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_safetensors_metadata, hf_hub_download

from shardwise.checkpoint.described import DescribedSource
from shardwise.checkpoint.locate import Location
from shardwise.checkpoint.quantisation import refuse_quantised
from shardwise.checkpoint.safetensors_header import DTYPES, LENGTH_BYTES
from shardwise.checkpoint.stored_tensor import StoredTensor
from shardwise.errors import CheckpointError, UnsupportedFormatError


def fetch_headers(location: Location, *, into: Path) -> DescribedSource:
    """Ask the hub for a model's config and for the headers of its safetensors files: some requests of a few kilobytes each.

    The tensors' places are counted from where a file's values begin: the hub's library does not say how long the header is.

    Args:
        location: On the Hugging Face hub.
        into: A directory for the config.

    Raises:
        CheckpointError: The hub cannot be reached or has no such model, or it is on another hub.
        UnsupportedFormatError: It is quantised, or of a dtype that torch has no elements for.
    """
    if location.kind != "hub" or constants.HF_HUB_OFFLINE:
        why = (
            "HF_HUB_OFFLINE is set" if location.kind == "hub" else "ModelScope is asked for whole files alone"
        )
        raise CheckpointError(
            f"{location.name}: expected a directory, or a model in the hub's local cache, got neither, and {why}. Nothing is downloaded "
            "for a plan: download the model, or pass its config."
        )
    try:
        hf_hub_download(location.repo_id, "config.json", revision=location.revision, local_dir=into)
        metadata = get_safetensors_metadata(location.repo_id, revision=location.revision)
    except Exception as error:  # of its HTTP client, as the version has it; they share no base
        text = str(error).strip() or type(error).__name__
        raise CheckpointError(
            f"{location.name}: expected a directory, or a model on the hub with safetensors files and a config.json, got neither: "
            f"{text.splitlines()[0].rstrip('.')}. Check the name, the network (HF_ENDPOINT) and your access (hf auth login); or pass a "
            "config."
        ) from error
    refuse_quantised(into)
    return DescribedSource(location.name, _tensors(metadata, location.name))


def _tensors(metadata: Any, name: str) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for file, of_file in metadata.files_metadata.items():
        for tensor, info in of_file.tensors.items():
            if info.dtype not in DTYPES:
                raise UnsupportedFormatError(
                    f"{name}: {tensor!r} in {file}: expected one of the dtypes {', '.join(DTYPES)}, got {str(info.dtype)[:40]!r}. Use "
                    "a checkpoint in one of these."
                )
            start, stop = info.data_offsets
            found[tensor] = StoredTensor(
                name=tensor,
                shape=tuple(info.shape),
                dtype=DTYPES[info.dtype],
                file=file,
                start=LENGTH_BYTES + start,
                stop=LENGTH_BYTES + stop,
            )
    return found
