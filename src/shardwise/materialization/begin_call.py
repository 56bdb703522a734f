"""What can fail before ranks are in a call together: the others are told all the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from shardwise.materialization.agreement import Agreement, ranks_of_group
from shardwise.materialization.argument_kinds import check_group
from shardwise.materialization.timeouts import timeout_seconds_of


def begin_call(call: str, *, group: Any) -> Agreement:
    """Return the agreement of a call that all ranks of a group make together.

    Args:
        call: Its name, for messages.
        group: As the user passed it; None is the default one.

    Raises:
        ConfigurationError: It is no group that this rank is in. It names no other ranks then, so those of the default group are told.
    """
    with telling(call, ranks_of_group(None)):
        check_group(group)
        seconds = timeout_seconds_of(None, group=group)
        return Agreement(ranks_of_group(group), timeout_seconds=seconds, call=call)


@contextmanager
def telling(call: str, ranks: Sequence[int]) -> Iterator[None]:
    """Tell other ranks of an error in the body: at once if they are in a call over the same ranks, else in their next one.

    Args:
        call: What the body is a part of.
        ranks: That make their calls together, this one among them.
    """
    try:
        yield
    except Exception as error:
        seconds = timeout_seconds_of(None, group=None)
        Agreement(ranks, timeout_seconds=seconds, call=call).refuse(error)
        raise
