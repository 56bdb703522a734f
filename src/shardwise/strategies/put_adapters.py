"""Put adapters of PEFT, new ones and saved ones, into a model that is not wrapped yet; all ranks together.

PEFT's own functions build the adapter. Where the base has no values on a rank, nothing that they compute from it counts:
there the adapter is built blank, so that starts which would fail on meta do not.

Source: `peft.get_peft_model`, `peft.PeftModel.load_adapter`, `peft.utils.save_and_load.get_peft_model_state_dict`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from shardwise.errors import (
    CallOrderError,
    CheckpointError,
    ConfigurationError,
    listed,
)
from shardwise.materialization import (
    Agreement,
    Entry,
    bind,
    check_bound,
    clean_fqn,
    default_staging_bytes,
    entries_of,
    needs_base_values,
    open_source,
    permitted,
    require_equal_aliases,
)
from shardwise.strategies.adapters import parameters_of_tuners
from shardwise.strategies.noted import Bindings
from shardwise.strategies.peft_extra import require_peft

# The others change the forward too: a layer that was built with another start would be another layer.
_STARTS_OF_THE_SAME_LAYER = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "lora_ga")
_STARTS_THAT_LEAVE_THE_BASE = ("gaussian", "eva", "orthogonal")


def add_adapter(
    model: nn.Module,
    config: Any,
    *,
    adapter_name: str,
    autocast_adapter_dtype: bool,
    every_rank_has_values: bool,
    bindings: Bindings,
    agreement: Agreement,
) -> nn.Module:
    """Put a new adapter into a model.

    Args:
        model: Not wrapped: the base, or a PEFT model that gets a further adapter.
        config: Of PEFT.
        adapter_name: Of the adapter in the model.
        autocast_adapter_dtype: As PEFT has it: adapters beside a 16-bit base are kept in float32.
        every_rank_has_values: Of the base; PEFT makes the adapter's on each of them then, from the same random numbers.
        bindings: Know which models are deferred.
        agreement: Of the call.

    Returns:
        The PEFT model.

    Raises:
        CallOrderError: The model is wrapped.
        ConfigurationError: The adapter starts from values that this rank's base does not have, and nobody else will give.
        MissingDependencyError: peft is not installed.
        PeerError: Another rank failed.
    """
    with agreement.phase("build"):
        require_peft("add_adapter")
        _refuse_wrapped("add_adapter", model)
        deferred = bindings.has(model)
        reason = needs_base_values(config) if deferred else None
        if reason is not None:
            raise ConfigurationError(
                f"add_adapter: expected an adapter that starts from random numbers, got {reason}, and the values of this model "
                "are read at the wrap. Load it with load_pretrained(defer=False)."
            )
        before = {id(entry.tensor) for entry in entries_of(model)}
        with _drawing_alike(agreement) if every_rank_has_values else nullcontext():
            wrapped = _put(model, config, adapter_name, autocast_adapter_dtype)
        if deferred:
            # PEFT moves a layer's first adapter to where the base is, and no further one.
            _to_meta(e for e in _of_tuners(wrapped) if id(e.tensor) not in before)
    return wrapped


def load_adapter(
    model: nn.Module,
    directory: str,
    *,
    adapter_name: str,
    is_trainable: bool,
    autocast_adapter_dtype: bool,
    bindings: Bindings,
    agreement: Agreement,
) -> nn.Module:
    """Put a saved adapter into a model and find its values in its directory's headers.

    Args:
        model: Not wrapped: the base, or a PEFT model that gets a further adapter.
        directory: Directory or hub id.
        adapter_name: Of the adapter in the model.
        is_trainable: Whether it is trained further.
        autocast_adapter_dtype: As PEFT has it: adapters beside a 16-bit base are kept in float32.
        bindings: Take note of where the values are.
        agreement: Of the call.

    Returns:
        The PEFT model.

    Raises:
        CallOrderError: The model is wrapped.
        CheckpointError: The adapter lacks parameters, or does not fit the model.
        ConfigurationError: The adapter belongs to a base that PEFT would change first, and the base has no values yet.
        MissingDependencyError: peft is not installed.
        PeerError: Another rank failed.
    """
    with ExitStack() as stack:
        stack.enter_context(agreement.whole_call())
        configs = stack.enter_context(TemporaryDirectory(prefix="shardwise-"))
        opened = open_source(directory, agreement=agreement, configs_into=Path(configs))
        stack.enter_context(agreement.phase("build"))
        _refuse_wrapped("load_adapter", model)
        config = _config_of(opened.path, is_trainable=is_trainable)
        start = getattr(config, "init_lora_weights", True)
        if (
            bindings.has(model)
            and isinstance(start, str)
            and not _is_one_of(start, _STARTS_THAT_LEAVE_THE_BASE)
        ):
            raise ConfigurationError(
                f"{directory}: expected an adapter of the base model as its checkpoint holds it, got one with "
                f"init_lora_weights={start!r}, for which PEFT changes the base's values first, and the values of this model are "
                "read at the wrap. Load it with load_pretrained(defer=False), or convert the adapter with PEFT's "
                "path_initial_model_for_weight_conversion."
            )
        wrapped: Any = _put(model, config, adapter_name, autocast_adapter_dtype)
        if is_trainable and hasattr(wrapped, "set_requires_grad"):
            wrapped.set_requires_grad(adapter_name)  # a further adapter is frozen until it is made active
        names = _names_on_disk(wrapped, adapter_name, opened.source.tensors)
        entries = [e for e in entries_of(wrapped) if any(slot.fqn in names for slot in e.slots)]
        binding = bind(
            wrapped,
            entries,
            opened.source,
            rename=lambda fqn: names[fqn][0] if fqn in names else fqn,
            conversions=None,
        )
        permitted(binding.absent, "error", name=directory)
        again = {name for of_tensor in names.values() for name in of_tensor[1:]}
        unexpected = [name for name in binding.unexpected if name not in again]
        if unexpected:
            raise CheckpointError(
                f"{directory}: expected parameters of the adapter alone, got {listed(unexpected)}, which the model has no "
                "place for. Was it trained on another base model?"
            )
        check_bound(entries, binding.bound)
        _to_meta(entries)  # on a rank whose base has values, PEFT has given the adapter some as well
        bound = {entry.fqn for entry in entries}
        bindings.add([entry for entry in entries_of(wrapped) if entry.fqn in bound], binding)
    require_equal_aliases(
        binding,
        opened.source,
        agreement=agreement,
        staging_bytes=default_staging_bytes("cpu"),  # the values stay on the host
    )
    opened.source.close()  # until the wrap, which opens what it reads
    return wrapped  # type: ignore[no-any-return]


def _refuse_wrapped(call: str, model: nn.Module) -> None:
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise CallOrderError(
            f"{call}: expected a model that is not wrapped, got {type(model).__name__} with sharded parameters: the adapter's would not be "
            "sharded, and each rank would train its own. Add adapters between load_pretrained and wrap_model."
        )


def _config_of(directory: Path, *, is_trainable: bool) -> Any:
    require_peft("load_adapter")
    import peft

    if not (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{directory}: expected adapter_config.json in an adapter's directory, got none. Give the directory that "
            "PeftModel.save_pretrained wrote."
        )
    config = peft.PeftConfig.from_pretrained(str(directory))
    config.inference_mode = not is_trainable
    return config


def _put(model: nn.Module, config: Any, adapter_name: str, autocast_adapter_dtype: bool) -> nn.Module:
    import peft

    with _blank_start(config) if _is_on_meta(model) else nullcontext():
        options = {"adapter_name": adapter_name, "autocast_adapter_dtype": autocast_adapter_dtype}
        wrapped: nn.Module = model
        try:
            if isinstance(model, peft.PeftModel):
                model.add_adapter(peft_config=config, **options)
            else:
                wrapped = peft.get_peft_model(model, config, **options)
        except ValueError as error:
            raise ConfigurationError(
                f"adapter {adapter_name!r}: expected a config that PEFT takes for {type(model).__name__}, got one that it refuses: {error}"
            ) from error
        return wrapped


@contextmanager
def _drawing_alike(agreement: Agreement) -> Iterator[None]:
    """Let all ranks draw the same random numbers on the host meanwhile, which follow from the first rank's."""
    drawn = int(torch.randint(2**62, ()))
    published = agreement.publish("a seed", str(drawn) if agreement.rank == agreement.ranks[0] else None)
    # torch.manual_seed would seed the accelerators' generators too.
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(int(published))
    try:
        yield
    finally:
        generator.set_state(before)


@contextmanager
def _blank_start(config: Any) -> Iterator[None]:
    """Keep PEFT from computing anything from a base without values."""
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and not _is_one_of(start, _STARTS_OF_THE_SAME_LAYER):
        raise ConfigurationError(
            f"init_lora_weights={start!r}: expected a base with values on every rank for this start, got one on meta. Make the "
            "strategy with memory_efficient_init=False."
        )
    if start is None:
        yield
        return
    config.init_lora_weights = False
    try:
        yield
    finally:
        config.init_lora_weights = start


def _is_one_of(start: str, prefixes: Collection[str]) -> bool:
    return start.lower().startswith(tuple(prefixes))


def _is_on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _names_on_disk(model: nn.Module, adapter_name: str, stored: Collection[str]) -> dict[str, Sequence[str]]:
    """Return the fqns of what an adapter's directory holds for a model, and the names that each has there; mostly one.

    PEFT itself says so, of a state dict on hand. It may have saved the base's embeddings along, under each of their names: those
    count if they are stored.
    """
    from peft import get_peft_model_state_dict

    # Of tensors without values, each another object: PEFT names tied ones apart.
    state = {key: torch.empty_like(tensor, device="meta") for key, tensor in model.state_dict().items()}
    fqn_of = {id(tensor): clean_fqn(key) for key, tensor in state.items()}
    found: dict[str, list[str]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what would be saved: nothing is
        for embeddings in (False, True):
            named = get_peft_model_state_dict(
                model, state_dict=dict(state), adapter_name=adapter_name, save_embedding_layers=embeddings
            )
            for name, tensor in named.items():
                names = found.setdefault(fqn_of[id(tensor)], [])
                if name not in names and (not embeddings or name in stored):
                    names.append(name)
    parameters = {slot.fqn for entry in entries_of(model, roles=("parameter",)) for slot in entry.slots}
    return {fqn: names for fqn, names in found.items() if names and fqn in parameters}


def _of_tuners(model: nn.Module) -> list[Entry]:
    own = parameters_of_tuners(model)
    return [entry for entry in entries_of(model) if id(entry.tensor) in own]


def _to_meta(entries: Collection[Entry] | Iterator[Entry]) -> None:
    for entry in entries:
        if not entry.tensor.is_meta:
            empty = torch.empty_like(entry.tensor, device="meta")
            entry.replace(nn.Parameter(empty, requires_grad=entry.tensor.requires_grad))
