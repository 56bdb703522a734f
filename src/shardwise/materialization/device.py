"""Which device the parameters of a model belong on, on this rank."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def device_of(mesh: DeviceMesh) -> torch.device:
    """Return this rank's device on a mesh, as `fully_shard` sees it."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def device_of_model(model: nn.Module) -> torch.device:
    """Return the device of the mesh that a model lies on, else of its values, else torch's default device."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            return device_of(parameter.device_mesh)
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            return tensor.device
    return torch.get_default_device()


def current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a device is the current one of its kind."""
    if device.type == "cpu" or device.index is None:
        return nullcontext()
    return torch.accelerator.device_index(device.index)


def copies_to(device: torch.device) -> torch.Event:
    """Return an event that is reached when the copies to a device that this thread has started so far are done.

    A copy runs on the current stream of the device that it goes to, which need not be the current device.
    """
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream(device))
    return event
