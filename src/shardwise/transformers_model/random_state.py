"""The random numbers of this process, as tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

_NO_GAUSSIAN = float("nan")  # python keeps one number in reserve, or None


def random_state(device_type: str) -> dict[str, torch.Tensor]:
    """Return the state of torch, of the device's generator, of python and of numpy.

    Args:
        device_type: Of the mesh.

    Returns:
        Tensors on the host; python's and numpy's 32-bit words are exact in float64.
    """
    version, words, gaussian = random.getstate()
    reserve = _NO_GAUSSIAN if gaussian is None else gaussian
    _, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words, reserve], dtype=torch.float64, device="cpu"),
        "numpy": torch.tensor([*keys.tolist(), *rest], dtype=torch.float64, device="cpu"),
    }
    if device_type != "cpu":
        state["device"] = torch.get_device_module(device_type).get_rng_state()
    return state


def set_random_state(state: Mapping[str, torch.Tensor], device_type: str) -> None:
    """Put back what `random_state` returned; what is not in it stays as it is."""
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if "python" in state:
        version, *words, reserve = state["python"].tolist()
        random.setstate((int(version), tuple(int(w) for w in words), None if reserve != reserve else reserve))
    if "numpy" in state:
        *keys, position, has_gaussian, gaussian = state["numpy"].tolist()
        key = np.array(keys, dtype=np.uint32)
        np.random.set_state(("MT19937", key, int(position), int(has_gaussian), gaussian))
    if "device" in state and device_type != "cpu":
        torch.get_device_module(device_type).set_rng_state(state["device"])
