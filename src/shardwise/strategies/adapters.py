"""PEFT adapters on a model whose values are still in its checkpoint.

PEFT puts new parameters beside those of the base, on the base's device, which is meta. Their first values follow PEFT's own
rules and need nothing of the base, so they are made at the wrap; a copy that `modules_to_save` made is read from where its
original is, and trainable rows of single tokens from where the embedding's rows are. Adapters that exist already must come with their values: loading them into meta parameters would drop them
without a word, so that is refused.

Source: `peft.tuners.tuners_utils.BaseTunerLayer`, `peft.utils.other.ModulesToSaveWrapper`, `peft.PeftModel.from_pretrained`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from shardwise.errors import LeftOnMetaError, listed
from shardwise.materialization import entries_of, named_modules_of, original_of, resting_collector
from shardwise.strategies.deferred import Deferred
from shardwise.strategies.token_rows import token_rows


def with_adapters(deferred: Deferred, model: nn.Module, *, always: bool) -> Deferred:
    """Add what PEFT made of a deferred model: adapters that begin anew, and trainable copies.

    Args:
        deferred: What is on record of the model.
        model: The same, perhaps with adapters; on meta.
        always: Also where nothing is deferred. Not where the source rank holds the values: the other ranks have all of the
            model on meta there, adapters included.

    Returns:
        The record with copies bound to where their originals are, and new adapters permitted to be absent.
    """
    if not (always or deferred.bound or deferred.absent) or not _has_layers_of_peft(model):
        return deferred
    bound, absent = dict(deferred.bound), set(deferred.absent)
    bound |= token_rows(model, bound)
    new = parameters_of_tuners(model)
    entries = entries_of(model)
    entry_of = {slot.fqn: entry.fqn for entry in entries for slot in entry.slots}
    for entry in entries:
        if entry.role == "attribute" or not entry.tensor.is_meta or entry.fqn in bound:
            continue
        original = original_of(entry.fqn)
        original = entry_of.get(original, original)  # which may be tied to a parameter of another name
        if original in bound:
            bound[entry.fqn] = bound[original]
        if original in absent or (original not in bound and id(entry.tensor) in new):  # resized ones are both
            absent.add(entry.fqn)
    return Deferred(bound=bound, absent=frozenset(absent), blank=deferred.blank)


def _has_layers_of_peft(model: nn.Module) -> bool:
    if "peft" not in sys.modules:
        return False
    with resting_collector():
        kinds = {type(module) for _, module in named_modules_of(model)}
    return any(base.__module__.partition(".")[0] == "peft" for kind in kinds for base in kind.__mro__)


def parameters_of_tuners(model: nn.Module) -> set[int]:
    """Return the identities of the parameters that PEFT's layers have added."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    added: set[int] = set()
    for module in model.modules() if tuners is not None else ():
        if isinstance(module, tuners.BaseTunerLayer):  # type: ignore[union-attr]
            for name in (*module.adapter_layer_names, *module.other_param_names):
                added |= {id(parameter) for parameter in _parameters_in(getattr(module, name, None))}
    return added


def refuse_values_for_meta(model: nn.Module) -> RemovableHandle:
    """Make `load_state_dict` into a model on meta an error: torch would drop the values and only warn.

    Args:
        model: With parameters on meta.

    Returns:
        What takes the refusal away again.
    """

    def refuse(
        module: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any
    ) -> None:
        assigned = metadata.get("assign_to_params_buffers", False)
        # PEFT's low_cpu_mem_usage assigns, and then moves an adapter to where its base is.
        lost = parameters_of_tuners(module) if assigned else None
        awaiting = [
            prefix + name
            for name, tensor in module.named_parameters(remove_duplicate=False)
            if tensor.is_meta and prefix + name in state and (lost is None or id(tensor) in lost)
        ]
        if awaiting:
            raise LeftOnMetaError(
                f"load_state_dict: {listed(awaiting)}: expected parameters with storage, got parameters on meta "
                "of a model that load_pretrained has deferred: the values would be lost. Pass assign=True, load an "
                "adapter's directory with strategy.load_adapter(model, directory), load after wrap_model, or use "
                "load_pretrained(defer=False)."
            )

    handle: RemovableHandle = model.register_load_state_dict_pre_hook(refuse)  # type: ignore[no-untyped-call]
    return handle


def _parameters_in(holder: Any) -> list[nn.Parameter]:
    if isinstance(holder, nn.Module):
        return list(holder.parameters())
    return [holder] if isinstance(holder, nn.Parameter) else []
