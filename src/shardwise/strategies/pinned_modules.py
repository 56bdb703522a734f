"""Modules whose class keeps them in float32 while the model is in a smaller dtype: routers, norms, output projections.

FSDP2 gathers the trainable parameters of a unit in one dtype, so such a module becomes a unit of its own, and computes in
its own dtype.
"""

from __future__ import annotations

from collections import Counter

from torch import nn

from shardwise.conversion import pinned_dtypes
from shardwise.materialization import clean_fqn, model_inside, parameters_of


def pinned_modules(model: nn.Module) -> list[str]:
    """Return the modules all of whose own trainable parameters are kept in another dtype than most of the model.

    Args:
        model: Not sharded. Of a model that is not from a library which declares such modules, none are returned.

    Returns:
        Their names, as `get_submodule` takes them.
    """
    trainable = [p for p in parameters_of(model) if p.requires_grad and p.is_floating_point()]
    dtypes = Counter(parameter.dtype for parameter in trainable)
    if len(dtypes) < 2:
        return []
    usual = dtypes.most_common(1)[0][0]
    pinned = pinned_dtypes(model_inside(model), usual, stored=True)
    found = []
    for fqn, module in model.named_modules():
        own = {
            clean_fqn(f"{fqn}.{name}"): parameter.dtype
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        }
        if fqn and own and all(dtype != usual and pinned(name) == dtype for name, dtype in own.items()):
            found.append(fqn)
    return found
