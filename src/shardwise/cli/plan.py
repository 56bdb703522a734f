"""`shardwise plan`: what a load would cost, for any number of ranks, without one of them."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardwise.cli.options import DebugOption, JsonOption
from shardwise.cli.terminal import errors_reported
from shardwise.errors import ConfigurationError


def plan_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A directory, or a model in the hub's local cache: its headers are read; or a directory with a config.json alone.",
            show_default=False,
        ),
    ],
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Number of ranks that shard.", show_default=False)
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option("--mesh", help="REPLICASxSHARDS, such as 2x4, in place of --ranks.", show_default=False),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="Dtype in which shards are stored, such as float32; auto: the checkpoint's."
        ),
    ] = "auto",
    route: Annotated[
        str, typer.Option("--route", help="auto, direct, replicate, node, rank0 or striped.")
    ] = "auto",
    device: Annotated[
        str, typer.Option("--device", help="Where shards are: accelerator or cpu.")
    ] = "accelerator",
    ranks_per_node: Annotated[
        int, typer.Option("--ranks-per-node", min=1, help="How many ranks share a node.")
    ] = 8,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Say what loading MODEL would cost a job of any size: bytes from storage and between ranks, reads, memory peaks."""
    with errors_reported(debug=debug):
        mesh_shape = _mesh_shape(ranks, mesh)
        from shardwise.planning import plan_load

        plan = plan_load(
            model,
            mesh_shape=mesh_shape,
            dtype=dtype,
            route=route,
            device=device,
            ranks_per_node=ranks_per_node,
        )
        console = Console(highlight=False)
        console.print(Text(plan.title), soft_wrap=True)
        table = Table("", "job", "one rank, at most")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in plan.rows():
            table.add_row(*row)
        console.print(table)
        for note in plan.notes():
            console.print(Text(note), soft_wrap=True)
        if json_file is not None:
            json_file.write_text(json.dumps(plan.to_json(), indent=2) + "\n", encoding="utf-8")


def _mesh_shape(ranks: int | None, mesh: str | None) -> tuple[int, ...]:
    if (ranks is None) == (mesh is None):
        raise ConfigurationError("plan: expected --ranks or --mesh, got " + ("both" if ranks else "neither"))
    if mesh is None:
        return (ranks or 1,)
    sizes = mesh.lower().split("x")
    if len(sizes) > 2 or not all(size.isascii() and size.isdecimal() for size in sizes):
        raise ConfigurationError(f"--mesh: expected SHARDS or REPLICASxSHARDS, such as 2x4, got {mesh!r}")
    return tuple(int(size) for size in sizes)
