"""Carry optimizers that were made before sharding over to the sharded parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from shardwise.errors import OptimizerError, listed
from shardwise.materialization import entries_of


@dataclass(frozen=True, slots=True, kw_only=True)
class DetachedOptimizer:
    """An optimizer and the names of the parameters in each of its groups, in order."""

    optimizer: Optimizer
    group_fqns: tuple[tuple[str, ...], ...]

    def rebind(self, model: nn.Module) -> None:
        """Put the model's present parameters of the same names into the groups.

        Raises:
            OptimizerError: The model has none of such a name any more.
        """
        named = {entry.fqn: entry.tensor for entry in entries_of(model, roles=("parameter",))}
        lost = [fqn for fqns in self.group_fqns for fqn in fqns if fqn not in named]
        if lost:
            raise OptimizerError(
                f"{type(self.optimizer).__name__}: expected the wrapped model to have the parameters that it was made on, got none "
                f"named {listed(lost)}. Make the optimizer after the wrap, on the parameters that the model has then."
            )
        for group, fqns in zip(self.optimizer.param_groups, self.group_fqns, strict=True):
            # In place: LBFGS keeps the list itself under another name.
            group["params"][:] = [named[fqn] for fqn in fqns]


def check_optimizers(model: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[DetachedOptimizer, ...]:
    """Find the names of all parameters that optimizers hold.

    Parameters are matched as objects, never by address: empty shards and meta tensors all share address 0.

    Args:
        model: Not sharded yet.
        optimizers: Made on its parameters, real or meta, and not stepped.

    Returns:
        One record per optimizer; the optimizers themselves are not changed.

    Raises:
        OptimizerError: An optimizer has state already, or holds a parameter that the model does not.
    """
    if not optimizers:
        return ()
    names = {id(e.tensor): e.fqn for e in entries_of(model) if e.role == "parameter"}
    records = []
    for position, optimizer in enumerate(optimizers):
        label = f"optimizer {position} ({type(optimizer).__name__})"
        if optimizer.state:
            raise OptimizerError(
                f"{label}: expected an optimizer that has not stepped, got state for {len(optimizer.state)} parameters "
                "of the unsharded model. Wrap before the first step, or load the state after wrapping with "
                "torch.distributed.checkpoint."
            )
        groups = []
        for index, group in enumerate(optimizer.param_groups):
            unknown = [p for p in group["params"] if id(p) not in names]
            if unknown:
                shapes = ", ".join(str(tuple(p.shape)) for p in unknown[:5])
                raise OptimizerError(
                    f"{label}, group {index}: expected parameters of {type(model).__name__}, got {len(unknown)} that it "
                    f"does not hold, of shapes {shapes}. Make the optimizer on this model's parameters, after the last "
                    "change to them (resized embeddings, adapters, dtype), and before wrap_model."
                )
            groups.append(tuple(names[id(p)] for p in group["params"]))
        records.append(DetachedOptimizer(optimizer=optimizer, group_fqns=tuple(groups)))
    return tuple(records)


def drop_references(records: Sequence[DetachedOptimizer]) -> None:
    """Empty the groups, so that the full parameters can be freed while the model is sharded."""
    for record in records:
        for group in record.optimizer.param_groups:
            group["params"].clear()
