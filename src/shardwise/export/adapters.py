"""The adapters of a PEFT model alone: the files that its `save_pretrained` writes, in the same places.

Source: `peft.PeftModel.save_pretrained`, `peft.get_peft_model_state_dict`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shardwise.checkpoint import StoredTensor
from shardwise.checkpoint.safetensors_layout import laid_out
from shardwise.conversion import SavedTensor, Taken, whole
from shardwise.errors import ConfigurationError
from shardwise.export.beside import class_of
from shardwise.export.file_plan import FilePlan, PlannedFile
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.names import clean_fqn

_WEIGHTS_NAME = "adapter_model.safetensors"
_DEFAULT = "default"  # which lies in the directory itself, and others in one of their name inside it


def agreed_names(
    model: Any, held: Mapping[str, StoredTensor], agreement: Agreement
) -> dict[str, dict[str, str]]:
    """Return which tensor of the model each adapter holds under which name. All ranks call this together, within a phase.

    The first rank alone asks PEFT, which may look for the base model's config on a hub.

    Args:
        model: A PEFT model.
        held: Its tensors, by fqn.
        agreement: Of the call.

    Raises:
        ConfigurationError: PEFT would compute a tensor for this kind of adapter.
    """
    text = None
    if agreement.rank == agreement.ranks[0]:
        text = json.dumps({name: _names_of(model, held, name) for name in model.peft_config})
    found: dict[str, dict[str, str]] = json.loads(agreement.publish("names of adapters", text))
    return found


def _names_of(model: Any, held: Mapping[str, StoredTensor], adapter: str) -> dict[str, str]:
    from peft import get_peft_model_state_dict

    state = {
        f"{prefix}.{name}" if prefix else name: None
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in (*module._parameters, *module._buffers)
    }
    tensors = {
        name: torch.empty(held[clean_fqn(name)].shape, dtype=held[clean_fqn(name)].dtype, device="meta")
        for name in state
        if clean_fqn(name) in held
    }
    fqn_of = {id(tensor): clean_fqn(name) for name, tensor in tensors.items()}
    found = {}
    for name, tensor in get_peft_model_state_dict(model, state_dict=tensors, adapter_name=adapter).items():
        if id(tensor) not in fqn_of:
            raise ConfigurationError(
                f"{name}: expected an adapter whose tensors are saved as they are, got one of "
                f"{model.peft_config[adapter].peft_type} that PEFT computes. Save it with save_pretrained of a gathered state dict."
            )
        found[clean_fqn(name)] = fqn_of[id(tensor)]
    return found


def plan_adapters(
    names: Mapping[str, Mapping[str, str]], held: Mapping[str, StoredTensor]
) -> tuple[tuple[SavedTensor, ...], FilePlan]:
    """Plan the files of adapters.

    Args:
        names: As `agreed_names` returned them.
        held: Tensors of the model, by fqn.
    """
    saved: list[SavedTensor] = []
    files: list[PlannedFile] = []
    stored: dict[str, StoredTensor] = {}
    for adapter, fqns in names.items():
        file = _WEIGHTS_NAME if adapter == _DEFAULT else f"{adapter}/{_WEIGHTS_NAME}"
        kinds = {name: (held[fqn].shape, held[fqn].dtype) for name, fqn in fqns.items()}
        header, places = laid_out(kinds, file=file, metadata={"format": "pt"})
        nbytes = max((len(header), *(of.stop for of in places.values())))
        files.append(PlannedFile(name=file, header=header, nbytes=nbytes))
        for name, fqn in fqns.items():
            unique = f"{file}: {name}"  # adapters have names in common
            stored[unique] = replace(places[name], name=unique)
            shape = held[fqn].shape
            taken = (Taken(fqn=fqn, piece=whole(shape)),) if held[fqn].nbytes else ()
            saved.append(
                SavedTensor(name=unique, shape=shape, dtype=held[fqn].dtype, taken=taken, whole=None)
            )
    return tuple(saved), FilePlan(files=tuple(files), stored=stored, index_name=None, index="")


def write_configs(model: Any, directory: Path) -> None:
    """Write the config of every adapter and the model card; the model's own configs stay as they are."""
    model.create_or_update_model_card(str(directory))
    for adapter, own in model.peft_config.items():
        config = copy.copy(own)  # a deep copy of a set may have another order, which the file shows
        base = model.base_model if config.is_prompt_learning else model.base_model.model
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = base.__dict__.get("name_or_path", None) or None
        config.inference_mode = True
        mapping = None
        if config.task_type is None:
            cls = class_of(base)
            mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
        place = directory if adapter == _DEFAULT else directory / adapter
        config.save_pretrained(str(place), auto_mapping_dict=mapping)
