"""The state of a training: written so that it goes on from there, on the same or another number of ranks.

A directory holds `training.pt` (what is not a tensor, read with `weights_only=True`) and the files of torch's distributed
checkpoint: parameters, persistent buffers, the optimizer's tensors, and each rank's random numbers.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardwise.checkpoint import sync
from shardwise.errors import CheckpointError, ConfigurationError, DamagedFileError, listed
from shardwise.materialization import Agreement, entries_of
from shardwise.transformers_model.optimizer_state import new_state
from shardwise.transformers_model.random_state import random_state, set_random_state
from shardwise.transformers_model.sharded_files import (
    read_index,
    read_tensors,
    require_files,
    write_tensors,
)
from shardwise.transformers_model.trained import Trained, adapters_of

FORMAT = 1
STATE_NAME = "training.pt"
MODEL_PREFIX = "model/"
_OPTIMIZER = "optimizer/"

Kind = tuple[tuple[int, ...], torch.dtype]  # shape and dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a training consists of.

    Args:
        model: Wrapped.
        optimizer: Of torch, not a wrapper around it; None where there is none.
        scheduler: Or None.
        scaler: Or None.
        mesh: That the model is sharded on.
        name: Directory or hub id of the model; None of a new one.
    """

    model: nn.Module
    optimizer: Optimizer | None
    scheduler: Any | None
    scaler: Any | None
    mesh: DeviceMesh
    name: str | None


def save_training(training: Training, directory: Path, *, step: int, agreement: Agreement) -> None:
    """Write a training's state. All ranks of the mesh call this together.

    The directory appears under its name when everything is in it.

    Args:
        training: Between two optimizer steps.
        directory: Not there, or empty; on a file system that all ranks share.
        step: Optimizer steps so far.
        agreement: Of the call.

    Raises:
        CheckpointError: There is something in the directory, or a value cannot be written safely.
        PeerError: Another rank failed.
    """
    with agreement.phase("prepare"):
        group = _group_of(training.mesh)
        tensors, unfinished = prepare(training, directory, step=step, agreement=agreement)
    with removed_if_it_fails(unfinished, agreement):
        with agreement.phase("write"):
            write_tensors(tensors, unfinished, group=group)
        with agreement.phase("finish"):
            give_name(unfinished, directory, agreement=agreement)


@contextmanager
def removed_if_it_fails(unfinished: Path, agreement: Agreement) -> Iterator[None]:
    """Remove what a failed save has written, which would keep a full disk full. The ranks enter and leave together."""
    try:
        yield
    except BaseException:
        if agreement.rank == agreement.ranks[0]:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def prepare(
    training: Training, directory: Path, *, step: int, agreement: Agreement
) -> tuple[dict[str, torch.Tensor], Path]:
    """Make the directory that is written into, with what is not a tensor; return the tensors, and the directory.

    All ranks call this together, within a phase. The arguments are those of `save_training`.
    """
    unfinished = directory.parent / f".{directory.name}.unfinished"
    tensors = _model_tensors(training.model) | _optimizer_tensors(training)
    if agreement.rank != agreement.ranks[0]:
        # Nothing keeps copies of others equal (statistics of batches, `ignored_params`): all are taken from one rank.
        tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    tensors |= _random_tensors(training, agreement)
    if agreement.rank == agreement.ranks[0]:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise CheckpointError(
                f"{directory}: expected a directory that is empty or not there, got one with files. Save to a new one for "
                "each step."
            )
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write_state(unfinished / STATE_NAME, training, step=step, ranks=len(agreement.ranks))
    return tensors, unfinished


def give_name(unfinished: Path, directory: Path, *, agreement: Agreement) -> None:
    """Give a directory that every rank has written its name. All ranks call this together, within a phase."""
    if agreement.rank == agreement.ranks[0]:
        require_files(unfinished)  # each of which its rank has synced
        sync(unfinished)
        os.replace(unfinished, directory)
        sync(directory.parent)


def load_training(training: Training, directory: Path, *, agreement: Agreement) -> int:
    """Read a training's state into a wrapped model and what was made on it. All ranks of the mesh call this together.

    Args:
        training: Of the same model, with an optimizer and a scheduler of the same kind.
        directory: As `save_training` left it.
        agreement: Of the call.

    Returns:
        The number of optimizer steps that were taken.

    Raises:
        CheckpointError: It is not the state of this training, or is damaged; nothing has changed but where the message says so.
        PeerError: Another rank failed.
    """
    with agreement.phase("check"):
        group = _group_of(training.mesh)
        state = _read_state(directory)
        index = read_index(directory)
        _require_same(training, state, directory)
        random = {
            name: tensor for name, tensor in _random_tensors(training, agreement).items() if name in index
        }
        tensors = _model_tensors(training.model)
        of_model = {name: kind for name, kind in index.items() if not name.startswith(_OPTIMIZER)}
        _require_stored(_kinds_of(tensors), of_model, directory)
    with agreement.phase("compare"):  # steps, for which ranks wait on each other
        expected: dict[str, Kind] = {}
        for _, fqn, made in _new_states(training, state):
            expected |= _kinds_of(_named(fqn, made))
        of_optimizer = {name: kind for name, kind in index.items() if name.startswith(_OPTIMIZER)}
        _require_stored(expected, of_optimizer, directory)
    with agreement.phase("allocate"):
        if training.optimizer is not None:
            training.optimizer.state.clear()
            for parameter, _, made in _new_states(training, state):
                training.optimizer.state[parameter] = made
        tensors |= _optimizer_tensors(training)
    with agreement.phase("read"):
        read_tensors(tensors | random, directory, group=group)
    with agreement.phase("finish"):
        _set_state(training, state)
        set_random_state(
            {name.rpartition("/")[2]: tensor for name, tensor in random.items()}, training.mesh.device_type
        )
    return int(state["step"])


def read_trained(directory: Path) -> Trained:
    """Return which model was trained, as its saved training says.

    Raises:
        CheckpointError: It is not a saved training, or is damaged.
    """
    found = _read_state(directory).get("trained", {})
    return Trained(model=found.get("model"), adapters=found.get("adapters", {}))


def _model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    entries = entries_of(model, roles=("parameter", "buffer"))
    return {f"{MODEL_PREFIX}{entry.fqn}": entry.tensor.detach() for entry in entries if entry.persistent}


def _optimizer_tensors(training: Training) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    if training.optimizer is not None:
        for fqn, values in _optimizer_values(training.model, training.optimizer).items():
            tensors |= _named(fqn, values)
    return tensors


def _named(fqn: str, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{_OPTIMIZER}{fqn}/{k}": v for k, v in values.items() if isinstance(v, torch.Tensor)}


def _kinds_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Kind]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _new_states(
    training: Training, state: Mapping[str, Any]
) -> Iterator[tuple[torch.Tensor, str, dict[str, Any]]]:
    """Yield what the optimizer keeps, with the options that were saved, of each parameter that it kept something of."""
    if training.optimizer is None:
        return
    stored = state["optimizer"]
    names = _fqns(training.model)
    for group, options in zip(training.optimizer.param_groups, stored["groups"], strict=True):
        for parameter in group["params"]:
            fqn = names[id(parameter)]
            if fqn in stored["values"]:  # not of one that never had a gradient
                yield parameter, fqn, new_state(training.optimizer, parameter, {**group, **options})


def _random_tensors(training: Training, agreement: Agreement) -> dict[str, torch.Tensor]:
    position = agreement.ranks.index(agreement.rank)
    state = random_state(training.mesh.device_type)
    return {f"random/{position}/{kind}": tensor for kind, tensor in state.items()}


def _optimizer_values(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    names = _fqns(model)
    return {names[id(parameter)]: values for parameter, values in optimizer.state.items()}


def _fqns(model: nn.Module) -> dict[int, str]:
    return {id(entry.tensor): entry.fqn for entry in entries_of(model, roles=("parameter",))}


def _group_fqns(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    names = _fqns(model)
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _write_state(path: Path, training: Training, *, step: int, ranks: int) -> None:
    optimizer = None
    if training.optimizer is not None:
        values = _optimizer_values(training.model, training.optimizer)
        optimizer = {
            "class": type(training.optimizer).__name__,
            "fqns": _group_fqns(training.model, training.optimizer),
            "groups": [
                {key: value for key, value in group.items() if key != "params"}
                for group in training.optimizer.param_groups
            ],
            "values": {
                fqn: {k: v for k, v in of.items() if not isinstance(v, torch.Tensor)}
                for fqn, of in values.items()
            },
        }
    state = {
        "format": FORMAT,
        "step": step,
        "ranks": ranks,
        "trained": {"model": training.name, "adapters": adapters_of(training.model)},
        "optimizer": optimizer,
        "scheduler": None
        if training.scheduler is None
        else {"class": type(training.scheduler).__name__, "state": training.scheduler.state_dict()},
        "scaler": None if training.scaler is None else training.scaler.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path}: an option of the optimizer or the scheduler cannot be read back safely: {error}"
        ) from error
    path.write_bytes(buffer.getvalue())
    sync(path)


def _read_state(directory: Path) -> dict[str, Any]:
    path = directory / STATE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: expected a directory that TransformersModel.save has written, got none with {STATE_NAME}"
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["format"]
    except Exception as error:
        raise DamagedFileError(f"{path}: expected the state of a training: {error}") from error
    if found != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT}, got {found}. Another release wrote it.")
    return state


def _require_same(training: Training, state: Mapping[str, Any], directory: Path) -> None:
    of_optimizer = state["optimizer"]
    for what, mine, stored in (
        ("optimizer", training.optimizer, of_optimizer),
        ("scheduler", training.scheduler, state["scheduler"]),
    ):
        got = None if mine is None else type(mine).__name__
        expected = None if stored is None else stored["class"]
        if got != expected:
            raise CheckpointError(
                f"{directory}: expected the {what} that it was saved with, {expected}, got {got}. Call set_optimizer and "
                "set_lr_scheduler as before the save."
            )
    if training.optimizer is not None:
        groups = _group_fqns(training.model, training.optimizer)
        if groups != of_optimizer["fqns"]:
            raise CheckpointError(
                f"{directory}: expected the optimizer's groups that it was saved with, of "
                f"{[len(group) for group in of_optimizer['fqns']]} parameters, got {[len(group) for group in groups]}, or others. "
                "Freeze, add adapters and call set_optimizer as before the save."
            )


def _require_stored(expected: Mapping[str, Kind], index: Mapping[str, Kind], directory: Path) -> None:
    absent = [name for name in expected if name not in index]
    unexpected = [name for name in index if name not in expected and not name.startswith("random/")]
    if absent or unexpected:
        which = f"lacks {listed(absent)}" if absent else f"has {listed(unexpected)} as well"
        raise CheckpointError(
            f"{directory}: expected the tensors of this model and its optimizer; it {which}"
        )
    for name, (shape, dtype) in expected.items():
        if index[name] != (shape, dtype):
            stored_shape, stored_dtype = index[name]
            raise CheckpointError(
                f"{directory}: {name}: expected {shape} of {dtype} from the model, got {stored_shape} of {stored_dtype}"
            )


def _set_state(training: Training, state: Mapping[str, Any]) -> None:
    if training.optimizer is not None:
        stored = state["optimizer"]
        for group, options in zip(training.optimizer.param_groups, stored["groups"], strict=True):
            group.update(options)
        for fqn, values in _optimizer_values(training.model, training.optimizer).items():
            values.update(stored["values"].get(fqn, {}))
    if training.scheduler is not None:
        training.scheduler.load_state_dict(state["scheduler"]["state"])
    if training.scaler is not None and state["scaler"]:
        training.scaler.load_state_dict(state["scaler"])


def _group_of(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    if mesh.size() == dist.get_world_size():
        return None
    if mesh.ndim == 1:
        return mesh.get_group()
    raise ConfigurationError(
        f"save and load: expected a mesh of all {dist.get_world_size()} ranks, or of one axis, got axes of {tuple(mesh.shape)}"
    )
