"""What is planned: a model without values, and where these would come from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from shardwise.checkpoint import (
    DescribedSource,
    SafetensorsSource,
    Source,
    cached_snapshot,
    fetch_headers,
    locate,
)
from shardwise.conversion import pinned_dtypes
from shardwise.errors import CheckpointError, ConfigurationError
from shardwise.materialization import Binding, bind, check_bound, entries_of
from shardwise.planning.estimate import estimated_source
from shardwise.strategies.empty_model import build_empty, dtype_of
from shardwise.strategies.pretrained import await_values


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model on meta, and its checkpoint.

    Args:
        name: As the user gave it, or the class of the config.
        model: Not sharded.
        source: Headers, on this machine or from a hub; or a guess.
        binding: Of the model to the source.
        estimated: Whether the source was guessed from a config.
        directory: Of the checkpoint, where its files are on this machine.
    """

    name: str
    model: nn.Module
    source: Source
    binding: Binding
    estimated: bool
    directory: Path | None


def subject_of(subject: Any, *, dtype: Any, model_cls: Any, revision: str | None) -> Subject:
    """Build the model that a checkpoint or a config describes, without values.

    Args:
        subject: Directory, file, hub id, or config of transformers.
        dtype: In which parameters are kept; `"auto"` is the checkpoint's own.
        model_cls: A transformers model or auto class; None is the one that the config names.
        revision: Of a hub id.

    Raises:
        CheckpointError: There is no such checkpoint, or it does not fit the model.
        ConfigurationError: It is none of these.
    """
    if isinstance(subject, (str, os.PathLike)):
        return _of_path_or_hub(subject, dtype=dtype, model_cls=model_cls, revision=revision)
    if not hasattr(subject, "model_type"):
        raise ConfigurationError(
            f"plan_load: expected a directory, a hub id or a config of transformers, got {type(subject).__name__}."
        )
    return _of_config(type(subject).__name__, subject, dtype=dtype, model_cls=model_cls)


def _of_path_or_hub(
    subject: str | os.PathLike[str], *, dtype: Any, model_cls: Any, revision: str | None
) -> Subject:
    name = os.fspath(subject)
    location = locate(subject, revision=revision)
    path = location.path if location.path is not None else cached_snapshot(location)
    if path is None:
        with TemporaryDirectory(prefix="shardwise-") as folder:
            headers = fetch_headers(location, into=Path(folder))
            return _of_headers(name, Path(folder), headers, None, dtype=dtype, model_cls=model_cls)
    if path.is_file() or any(path.glob("*.safetensors")):
        directory = path if path.is_dir() else path.parent
        source = SafetensorsSource.open(path, name=name)
        return _of_headers(name, directory, source, directory, dtype=dtype, model_cls=model_cls)
    return _of_config(name, _config_in(path), dtype=dtype, model_cls=model_cls)


def _config_in(path: Path) -> Any:
    from transformers import AutoConfig

    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: expected safetensors files or a config.json, got neither.")
    return AutoConfig.from_pretrained(path)


def _of_headers(
    name: str, configs: Path, source: Source, directory: Path | None, *, dtype: Any, model_cls: Any
) -> Subject:
    chosen_cls = model_cls or _class_of(_config_in(configs))
    model, chosen = build_empty(chosen_cls, name, configs, source, dtype=dtype)
    return _bound(name, model, source, chosen, directory=directory, estimated=False)


def _of_config(name: str, config: Any, *, dtype: Any, model_cls: Any) -> Subject:
    with TemporaryDirectory(prefix="shardwise-") as nowhere:  # a config has no files beside it
        nothing = DescribedSource(name, {})

        def built(dtype: Any) -> tuple[nn.Module, torch.dtype]:
            model, chosen = build_empty(
                model_cls or _class_of(config), name, Path(nowhere), nothing, dtype=dtype, config=config
            )
            entries = entries_of(model)
            binding = bind(model, entries, nothing, rename=None, conversions=None)
            await_values(model, entries, binding, chosen)
            return model, chosen

        model, chosen = built(dtype)
        of_config = dtype_of(config, None, None)  # which is how it was saved, whatever it is loaded as
        stored = model if chosen == of_config else built(of_config)[0]
    source = estimated_source(stored, name=name)
    return _bound(name, model, source, chosen, directory=None, estimated=True)


def _bound(
    name: str,
    model: nn.Module,
    source: Source,
    chosen: torch.dtype,
    *,
    directory: Path | None,
    estimated: bool,
) -> Subject:
    entries = entries_of(model)
    pinned = pinned_dtypes(model, chosen, stored=True)
    binding = bind(model, entries, source, rename=None, conversions=None, pinned=pinned)
    if not binding.bound:
        raise CheckpointError(
            f"{name}: expected tensors of {type(model).__name__}, got none that it takes. Pass model_cls=."
        )
    check_bound(entries, binding.bound)
    await_values(model, entries, binding, chosen)
    return Subject(
        name=name, model=model, source=source, binding=binding, estimated=estimated, directory=directory
    )


def _class_of(config: Any) -> Any:
    import transformers

    for architecture in getattr(config, "architectures", None) or ():
        found = getattr(transformers, architecture, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM
