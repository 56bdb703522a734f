"""Under which of its names a tied tensor is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardwise.errors import UnsupportedParameterError


def saved_names(
    names: Sequence[str], ties: Sequence[Sequence[str]], *, is_tied: Callable[[str], bool]
) -> list[str]:
    """Return which names are saved of a transformers model, in their order.

    Args:
        names: That a checkpoint might have.
        ties: Names of one tensor, for each that has several.
        is_tied: Says of a name whether the model's class declares it as a further name of another tensor.

    Raises:
        UnsupportedParameterError: More than one name of a tensor would be left: a load would not tie them.

    Source: `transformers.modeling_utils.remove_tied_weights_from_state_dict`; a part of `save_pretrained` before 5.0.
    """
    left_out: set[str] = set()
    for of_tensor in ties:
        there = sorted(set(of_tensor).intersection(names))
        declared = [name for name in there if is_tied(name)]
        if there and len(declared) == len(there):
            declared.pop()
        left_out.update(declared)
        rest = [name for name in there if name not in declared]
        if len(rest) > 1:
            raise UnsupportedParameterError(
                f"{' = '.join(rest)}: expected a tie that the model's class declares in _tied_weights_keys, got one that it does "
                "not: from_pretrained would not tie them again. Untie them, each with a parameter of its own, or declare it."
            )
    return [name for name in names if name not in left_out]
