"""`shardwise compare`: bring a model up in several modes, side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli.options import DebugOption, JsonOption, OutputOption, RanksOption
from shardwise.cli.results import LOG_FOLDER, show
from shardwise.cli.terminal import STATUS_FAILED, errors_reported, terminal_progress
from shardwise.compare.modes import DEFAULT_MODES, MODES, PEER_NAMES, ROUTE_NAMES, modes_named


def compare_command(
    model: Annotated[str, typer.Argument(help="A directory or a hub id.", show_default=False)],
    ranks: RanksOption = 4,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="Dtype in which shards are stored: auto (the checkpoint's), bfloat16 or float32."
        ),
    ] = "auto",
    mode: Annotated[
        list[str] | None,
        typer.Option(
            "--mode",
            help=f"A mode; give it several times for several. {', '.join(MODES)}; default: the first four.",
        ),
    ] = None,
    routes: Annotated[
        bool,
        typer.Option(
            "--routes",
            help=f"Every route of the native strategy too, to the modes or the default ones: {', '.join(ROUTE_NAMES)}.",
        ),
    ] = False,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help=f"Ways of other libraries too, to the modes or the default ones: {', '.join(PEER_NAMES)}. One that cannot do it is a row "
            "with its error, and no failure of the command.",
        ),
    ] = False,
    replicas: Annotated[
        int, typer.Option("--replicas", min=1, help="Copies of each shard (HSDP); divides the ranks.")
    ] = 1,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Runs of each mode, in turn; the median one counts.")
    ] = 1,
    load_only: Annotated[
        bool,
        typer.Option("--load-only", help="Measure the load alone: no values compared, no training step."),
    ] = False,
    output_dir: OutputOption = Path(),
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Bring MODEL up in several modes, each in fresh ranks, and compare time, memory, values and logits."""
    with errors_reported(debug=debug):
        added = (*(ROUTE_NAMES if routes else ()), *(PEER_NAMES if peers else ()))
        chosen = modes_named((*(mode or DEFAULT_MODES), *added))
        from shardwise.compare.experiment import compare
        from shardwise.compare.launch import refuse_inside_launcher

        refuse_inside_launcher("shardwise compare", environ=os.environ)
        with terminal_progress() as progress:
            comparison = compare(
                model,
                ranks=ranks,
                modes=chosen,
                dtype=dtype,
                replicas=replicas,
                repeats=repeats,
                load_only=load_only,
                log_directory=output_dir / LOG_FOLDER,
                progress=progress,
            )
        show(comparison, output_directory=output_dir, json_file=json_file)
    if not comparison.is_good:
        raise typer.Exit(STATUS_FAILED)
