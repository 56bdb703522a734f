"""`shardwise verify`: bring a model up sharded and compare every shard with its checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from shardwise.cli.before_ranks import check_checkpoint
from shardwise.cli.options import DebugOption, JsonOption, RanksOption
from shardwise.cli.results import run_on_ranks
from shardwise.cli.terminal import STATUS_FAILED, errors_reported


def verify_command(
    model: Annotated[
        str, typer.Argument(help="A causal language model: directory or hub id.", show_default=False)
    ],
    against: Annotated[
        str | None,
        typer.Option(
            "--against", help="Another checkpoint to compare with, directory, file or hub id; default: MODEL."
        ),
    ] = None,
    ranks: RanksOption = 2,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Load MODEL on several ranks, each its own bytes, and compare every tensor by value with a checkpoint.

    Leaves with status 0 if all are equal, 1 if a shard differs, OTHER lacks a tensor, or the comparison failed, 2 for
    wrong options.
    """
    with errors_reported(debug=debug):
        from shardwise.compare.verify_worker import verify_model

        for name in (model, *([against] if against is not None else [])):
            check_checkpoint(name)
        arguments = {"model": model, "against": against or model}
        reports = run_on_ranks(verify_model, arguments, ranks=ranks, json_file=json_file)
        # What a model's class permits its own checkpoint to lack is no difference.
        lacks = against is not None and any(each["absent"] for each in reports.values())
        equal = all(each["is_equal"] for each in reports.values()) and not lacks
    if not equal:
        raise typer.Exit(STATUS_FAILED)
