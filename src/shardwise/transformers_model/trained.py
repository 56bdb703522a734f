"""Which model a training trains, as its state says it: what else but tensors is needed to write them for others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from shardwise.strategies import require_peft


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What was trained.

    Args:
        model: Directory or hub id; None of a new model, or where an older release has written the state.
        adapters: The config of each adapter in it, as JSON, by name.
    """

    model: str | None
    adapters: Mapping[str, str]


def lasting_name(model_id: str | os.PathLike[str] | None) -> str | None:
    """Return the name of a model that means the same in another working directory."""
    if model_id is None:
        return None
    return str(Path(model_id).absolute()) if Path(model_id).is_dir() else str(model_id)


def adapters_of(model: nn.Module) -> dict[str, str]:
    """Return the config of each PEFT adapter in a model, as JSON, by name."""
    found: Mapping[str, Any] = getattr(model, "peft_config", {})
    return {name: json.dumps(config.to_dict(), default=sorted) for name, config in found.items()}  # sets


def peft_config_of(text: str) -> Any:
    """Return the config that `adapters_of` gave, to train further with.

    Raises:
        MissingDependencyError: peft is not installed.
    """
    require_peft("an adapter")
    from peft import PeftConfig

    # PEFT names the base anew, and warns where that is another name.
    changed = {"inference_mode": False, "base_model_name_or_path": None}
    return PeftConfig.from_peft_type(**{**json.loads(text), **changed})
