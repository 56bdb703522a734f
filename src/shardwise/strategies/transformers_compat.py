"""What shardwise needs of transformers' `from_pretrained`, on 4.57 and from 5.17.

A rank stays empty through `device_map="meta"`, which builds the whole model on meta on both generations and needs
accelerate installed. Accelerate's two flags must be off for that call: with them, 4.57 gives every rank whose
LOCAL_RANK is not 0 real, uninitialised parameters in place of meta ones. `plain_loads_on_meta` gives that argument to
calls that the user makes, by putting a wrapper in the place of `PreTrainedModel.from_pretrained` for the length of a
context: transformers offers no hook for it.
`tests/distributed/test_load_context.py` fails when a release reads weights all the same.
"""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from shardwise.errors import (
    ConfigurationError,
    LeftOnMetaError,
    MissingDependencyError,
    UnsupportedVersionError,
)
from shardwise.strategies.load_context import without_fsdp_flags

_patch_lock = threading.Lock()


def from_pretrained(model_cls: Any, name: str, **kwargs: Any) -> tuple[nn.Module, list[str]]:
    """Load with values; return the model and the names of parameters that the checkpoint lacks.

    Raises:
        LeftOnMetaError: The model came back without values, because a context keeps it empty or a tied weight was not found.
    """
    warn_of_untested_version()
    # With the flags, 4.57 leaves the parameters of a rank whose LOCAL_RANK is not 0 uninitialised.
    with without_fsdp_flags():
        model, info = model_cls.from_pretrained(name, output_loading_info=True, **kwargs)
    left = [fqn for fqn, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise LeftOnMetaError(
            f"{name}: expected values on this rank, got {len(left)} parameters on meta, first {left[0]}. Is a meta "
            "device context open around the call, or does the checkpoint lack the name under which transformers looks "
            "for a tied weight?"
        )
    absent = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    return model, absent


def from_pretrained_on_meta(model_cls: Any, name: str, **kwargs: Any) -> nn.Module:
    """Build the model that `from_pretrained` would return, on meta, without reading weights."""
    warn_of_untested_version()
    require_accelerate("load_pretrained on a rank that is not the source")
    with _flags_that_fit():
        model: nn.Module = model_cls.from_pretrained(name, device_map="meta", **kwargs)
    _refuse_values(model, "load_pretrained")
    _forget_device_map(model)
    return model


@contextmanager
def plain_loads_on_meta(enabled: bool) -> Iterator[None]:
    """Give `device_map="meta"` to every `from_pretrained` of transformers in the body.

    Args:
        enabled: Whether this rank stays empty. On a rank that loads, only a user's own `device_map` is refused.

    Yields:
        Nothing.

    Raises:
        ConfigurationError: The body passes a `device_map`.
        UnsupportedVersionError: A release reads weights in spite of it.
    """
    from transformers import PreTrainedModel

    if enabled:
        require_accelerate("pretrained_load_context on a rank that is not the source")
    original = PreTrainedModel.__dict__["from_pretrained"]

    def load(cls: Any, *args: Any, **kwargs: Any) -> Any:
        own = kwargs.get("device_map")
        # load_pretrained itself asks for meta; that may happen in here.
        if own is not None and not (enabled and own == "meta"):
            raise ConfigurationError(
                f"pretrained_load_context: device_map={kwargs['device_map']!r} places the model itself; the strategy "
                "does that. Leave device_map out inside the context."
            )
        if not enabled:
            return original.__get__(None, cls)(*args, **kwargs)
        kwargs["device_map"] = "meta"
        with _flags_that_fit():
            result = original.__get__(None, cls)(*args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        _refuse_values(model, "pretrained_load_context")
        _forget_device_map(model)
        return result

    if not _patch_lock.acquire(blocking=False):
        raise ConfigurationError(
            "pretrained_load_context: one is open already in this process. Open one at a time, or use load_pretrained."
        )
    try:
        PreTrainedModel.from_pretrained = classmethod(load)
        yield
    finally:
        PreTrainedModel.from_pretrained = original
        _patch_lock.release()


def _refuse_values(model: nn.Module, call: str) -> None:
    filled = [fqn for fqn, parameter in model.named_parameters() if not parameter.is_meta]
    if filled:
        import transformers

        raise UnsupportedVersionError(
            f"{call}: expected an empty model on this rank from transformers {transformers.__version__} with "
            f"device_map='meta', got values in {len(filled)} parameters, first {filled[0]}. Use "
            "strategy.load_pretrained with transformers 4.57 or 5.17 and newer, and report the model."
        )


def _flags_that_fit() -> AbstractContextManager[None]:
    import transformers

    return without_fsdp_flags() if int(transformers.__version__.split(".")[0]) < 5 else nullcontext()


def _forget_device_map(model: nn.Module) -> None:
    # 4.57 keeps the map; Accelerate would take it for a model that is spread over devices.
    model.__dict__.pop("hf_device_map", None)


def require_accelerate(what: str) -> None:
    """Raise unless accelerate is installed.

    Raises:
        MissingDependencyError: Naming the extra.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise MissingDependencyError(
            f"{what} needs accelerate: transformers builds a model on meta through it. "
            "Install it with: pip install 'shardwise[accelerate]'"
        )


def warn_of_untested_version() -> None:
    """Warn once if the installed transformers is neither 4.57 nor 5.17 or newer."""
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    if not ((major, minor) == (4, 57) or (major, minor) >= (5, 17)):
        warnings.warn(
            f"shardwise is tested on transformers 4.57 and from 5.17 on; {transformers.__version__} is installed",
            stacklevel=3,
        )
