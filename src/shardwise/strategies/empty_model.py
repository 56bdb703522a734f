"""Build the model that `from_pretrained` would return, without its values and without opening its weights.

transformers 5 builds everything on meta, buffers included, and makes buffers again later; 4.57 computes buffers while it
builds and cannot make them again, so there they are kept real, through accelerate's own context.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardwise.checkpoint import Source
from shardwise.errors import CheckpointError, ConfigurationError
from shardwise.strategies.transformers_compat import require_accelerate, warn_of_untested_version
from shardwise.strategies.value_readers import constructors_without_values

# Arguments of from_pretrained that say how values are found or changed, which is this package's part here.
_NEEDS_VALUES = (
    "adapter_kwargs",
    "distributed_config",
    "from_flax",
    "from_tf",
    "fusion_config",
    "gguf_file",
    "ignore_mismatched_sizes",
    "kernel_config",
    "key_mapping",
    "quantization_config",
    "state_dict",
    "tp_plan",
    "tp_size",
    "use_kernels",
    "variant",
)
# Arguments that only change how from_pretrained reads.
_WITHOUT_MEANING = (
    "disable_mmap",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "offload_state_dict",
    "use_safetensors",
    "weights_only",
)
_HUB = ("cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision", "token")
_OF_MODEL = ("attn_implementation", "experts_implementation")


def build_empty(
    model_cls: Any, name: str, directory: Path, source: Source, *, dtype: Any, **kwargs: Any
) -> tuple[nn.Module, torch.dtype]:
    """Build a model with its parameters on meta.

    Args:
        model_cls: A transformers model or auto class.
        name: As the user gave it, for messages and as the config's name.
        directory: Where its config lies.
        source: Its weights; asked for dtypes only.
        dtype: Of the parameters, a torch dtype; `"auto"` is the config's, else that of the first floating point weight of
            the first file, by name.
        **kwargs: Further arguments of `from_pretrained`.

    Returns:
        The model, in eval mode, and the dtype that was chosen for it.

    Raises:
        CheckpointError: No config lies there, and none was given.
        ConfigurationError: An argument, or a class, that needs values while the model is built.
    """
    warn_of_untested_version()
    refused = [key for key in _NEEDS_VALUES if kwargs.get(key) is not None]
    if refused or (directory / "adapter_config.json").is_file():
        what = ", ".join(f"{key}=" for key in refused) or "an adapter's directory"
        raise ConfigurationError(
            f"load_pretrained(defer=True) does not take {what}: it changes how values are found or made. Use defer=False, "
            "where transformers loads on global rank 0. (Commands take a model's directory; `shardwise export` merges an adapter into "
            "its base from a checkpoint of its training, with --merge.)"
        )
    _require_transformers_class(model_cls, "load_pretrained(defer=True)", remedy="Use defer=False")
    if kwargs.get("config") is None and not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{name}: expected config.json beside the weights, got none. Is the download complete? A config may be given: config= "
            "takes one, or the directory or hub id of one; shardwise.materialize needs none."
        )
    kwargs = {key: value for key, value in kwargs.items() if key not in _WITHOUT_MEANING}
    of_model = {key: kwargs.pop(key) for key in _OF_MODEL if key in kwargs}
    if "trust_remote_code" in kwargs:
        of_model["trust_remote_code"] = kwargs["trust_remote_code"]
    config, unused = _config_of(model_cls, directory, kwargs)
    config._name_or_path = name
    chosen = dtype_of(config, source, dtype)
    model = _construct(model_cls, config, chosen, of_model | unused)
    _add_generation_config(model, directory)
    return model, chosen


def build_from_config(model_cls: Any, config: Any, *, dtype: Any, **kwargs: Any) -> nn.Module:
    """Build a model of a config, with its parameters on meta and no checkpoint behind them.

    Args:
        model_cls: A transformers model or auto class.
        config: Of transformers, which is copied; or the directory or hub id of one.
        dtype: Of the parameters; `"auto"` is the config's, else float32.
        **kwargs: Attributes of the config to change, `attn_implementation`, `trust_remote_code`, and arguments of the class.

    Returns:
        The model, in eval mode as those of `build_empty` are.

    Raises:
        ConfigurationError: It is not a class of transformers, or the config is not a config.
    """
    warn_of_untested_version()
    _require_transformers_class(model_cls, "from_config", remedy="Build the model on meta yourself")
    of_model = {key: kwargs.pop(key) for key in (*_OF_MODEL, "trust_remote_code") if key in kwargs}
    if isinstance(config, (str, os.PathLike)):
        trust = {"trust_remote_code": of_model.get("trust_remote_code", False)}
        config, _ = _config_of(model_cls, Path(config), {"config": config, **trust})
    if not hasattr(config, "to_dict"):
        raise ConfigurationError(
            f"from_config: expected a config of transformers, or the directory or hub id of one, got {type(config).__name__}."
        )
    config = copy.deepcopy(config)
    for key in [key for key in kwargs if hasattr(config, key)]:
        setattr(config, key, kwargs.pop(key))
    return _construct(model_cls, config, dtype_of(config, None, dtype), of_model | kwargs)


def _require_transformers_class(model_cls: Any, call: str, *, remedy: str) -> None:
    if not hasattr(model_cls, "from_config") and not hasattr(model_cls, "_from_config"):
        raise ConfigurationError(
            f"{call}: expected a transformers model or auto class, got {model_cls!r}. {remedy}, or build the model yourself and "
            "call shardwise.materialize."
        )


def _construct(model_cls: Any, config: Any, dtype: torch.dtype, arguments: dict[str, Any]) -> nn.Module:
    # As from_pretrained sets it: on 4.57 a head builds the model under it from the config alone.
    config.dtype = dtype
    make = getattr(model_cls, "from_config", None)
    if make is None:
        make = model_cls._from_config
        arguments.pop("trust_remote_code", None)  # which says something to auto classes alone
    try:
        with constructors_without_values(model_cls), _parameters_on_meta():
            model: nn.Module = make(config, dtype=dtype, **arguments)
    except ValueError as error:
        _refuse_other_configs(model_cls, config, error)
        raise
    if not _builds_on_meta():
        model.tie_weights()  # type: ignore[operator]  # the context registers each name of a tied weight as a parameter of its own
    model.eval()
    return model


def _refuse_other_configs(model_cls: Any, config: Any, error: ValueError) -> None:
    """Say in one line what an auto class says with the list of all configs that it knows."""
    known = getattr(model_cls, "_model_mapping", None)
    if known is None or type(config) in known:
        return
    raise ConfigurationError(
        f"{model_cls.__name__}: expected a config of a model that this class knows, got {type(config).__name__}, whose architectures "
        f"are {', '.join(getattr(config, 'architectures', None) or ['not given'])}. Pass that class, or the auto class of its task: "
        "model_cls= of TransformersModel and plan_load, the first argument of load_pretrained and from_config."
    ) from error


def _config_of(model_cls: Any, directory: Path, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoConfig

    access = {key: kwargs.pop(key) for key in _HUB if key in kwargs}
    config = kwargs.pop("config", None)
    if config is None:
        config, access = directory, {}  # of a snapshot that is on disk already
    trust = {key: kwargs.pop(key) for key in ("trust_remote_code",) if key in kwargs}
    if not isinstance(config, (str, os.PathLike)):
        return copy.deepcopy(config), kwargs
    config_class = getattr(model_cls, "config_class", None) or AutoConfig
    if config_class is AutoConfig:
        access |= trust
    return config_class.from_pretrained(config, return_unused_kwargs=True, **access, **kwargs)  # type: ignore[no-any-return]


def dtype_of(config: Any, source: Source | None, dtype: Any) -> torch.dtype:
    """Return in which dtype a model is built: the one asked for, else its config's, else that of what is stored.

    Args:
        config: Of the model.
        source: Its checkpoint; None where there is none.
        dtype: As the caller gave it.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    of_config = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(of_config, str):
        of_config = getattr(torch, of_config)
    # transformers opens the first file alone, and safetensors hands out its names in order.
    stored = sorted(source.tensors.values() if source is not None else (), key=lambda t: (t.file, t.name))
    floating = (
        t.dtype
        for t in stored
        if t.file == stored[0].file and t.dtype.is_floating_point and t.dtype.itemsize > 1
    )
    return of_config if isinstance(of_config, torch.dtype) else next(floating, torch.float32)


def _builds_on_meta() -> bool:
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    if _builds_on_meta():
        from transformers.initialization import meta_device_safe_creation_ops

        with torch.device("meta"), meta_device_safe_creation_ops():
            yield
        return
    require_accelerate("load_pretrained(defer=True) on transformers 4.57")
    from accelerate import init_empty_weights
    from transformers.modeling_utils import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        yield


def _add_generation_config(model: nn.Module, directory: Path) -> None:
    path = directory / "generation_config.json"
    if hasattr(model, "generation_config") and path.is_file():
        from transformers import GenerationConfig

        # Not from_dict: on 4.57 `generate` asks for the hash that this one leaves.
        model.generation_config = GenerationConfig.from_pretrained(str(directory))
