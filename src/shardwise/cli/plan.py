"""`shardwise plan`: what bringing a model up would cost, and whether training it fits, without one rank of the job."""

from __future__ import annotations

from typing import Annotated

import typer

from shardwise.cli.options import DebugOption, JsonOption
from shardwise.cli.results import write_json
from shardwise.cli.terminal import errors_reported
from shardwise.errors import ConfigurationError

STATUS_DOES_NOT_FIT = 3
_GIBIBYTE = 1 << 30
_GIGABYTE = 10**9


def plan_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A directory or a hub id: its headers are read, from the hub where the model is not in its local cache; or a "
            "directory with a config.json alone, from which they are estimated.",
            show_default=False,
        ),
    ],
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Number of ranks in the job.", show_default=False)
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option("--nodes", min=1, help="That they are spread over evenly.", show_default=False),
    ] = None,
    replicas: Annotated[
        int, typer.Option("--replicas", min=1, help="Copies of each shard (HSDP); divides the ranks.")
    ] = 1,
    tp: Annotated[
        int, typer.Option("--tp", min=1, help="Ranks of tensor parallelism, by transformers' own plan.")
    ] = 1,
    mesh: Annotated[
        str | None,
        typer.Option(
            "--mesh",
            help="REPLICASxSHARDS, such as 2x4, in place of --ranks and --replicas.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="Dtype in which shards are stored, such as float32; auto: the checkpoint's."
        ),
    ] = "auto",
    mixed_precision: Annotated[
        str, typer.Option("--mixed-precision", help="In which the model computes: bf16, fp16 or no.")
    ] = "bf16",
    optimizer: Annotated[
        str,
        typer.Option(
            "--optimizer", help="adamw, adam, adamw-fused, sgd, sgd-momentum, or none for no training."
        ),
    ] = "adamw",
    offload: Annotated[
        bool, typer.Option("--offload", help="Accelerator ranks keep shards in pinned host memory.")
    ] = False,
    route: Annotated[
        str,
        typer.Option(
            "--route", help="direct, replicate, node, rank0 or striped, and no other; auto: all of them."
        ),
    ] = "auto",
    device: Annotated[
        str, typer.Option("--device", help="Where ranks compute: accelerator or cpu.")
    ] = "accelerator",
    ranks_per_node: Annotated[
        int | None,
        typer.Option(
            "--ranks-per-node", min=1, help="In place of --nodes; without both, 8.", show_default=False
        ),
    ] = None,
    read_gbps: Annotated[
        float | None,
        typer.Option(
            "--read-gbps",
            help="Gigabytes (10^9 bytes) per second from storage to one node.",
            show_default=False,
        ),
    ] = None,
    measure_read: Annotated[
        bool,
        typer.Option(
            "--measure-read",
            help="Measure that rate: read up to 1 GiB of the checkpoint's files, for 5 s at most.",
        ),
    ] = False,
    link_gbps: Annotated[
        float | None,
        typer.Option(
            "--link-gbps",
            help="Gigabytes per second that one rank receives, or sends.",
            show_default=False,
        ),
    ] = None,
    host_ram: Annotated[
        float | None,
        typer.Option("--host-ram", min=0, help="GiB of host memory of one node.", show_default=False),
    ] = None,
    device_ram: Annotated[
        float | None,
        typer.Option("--device-ram", min=0, help="GiB of memory of one device.", show_default=False),
    ] = None,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Say what bringing MODEL up would cost a job of any size, on each route and in the plain ways, and what training it takes.

    Memory, bytes from storage and between ranks, reads, files and, at given or measured rates, seconds. Activations, and what
    libraries take themselves, are not among the figures.

    Leaves with status 0; 3 if --host-ram or --device-ram is given and the model does not fit, at load or in training, on the route that is
    taken; 1 if there is no such checkpoint or it does not fit the model's class; 2 for wrong options.
    """
    with errors_reported(debug=debug):
        axes = _axes(ranks, mesh, replicas=replicas, tp=tp)
        per_node = _ranks_per_node(axes, nodes, ranks_per_node)
        if measure_read and read_gbps is not None:
            raise ConfigurationError("plan: expected --read-gbps or --measure-read, got both")
        from shardwise.cli.plan_display import show_plan
        from shardwise.planning import plan_job

        plan = plan_job(
            model,
            mesh_shape=axes,
            dtype=dtype,
            mixed_precision=mixed_precision,
            optimizer=optimizer,
            route=route,
            routes=None if route == "auto" else [route],
            device=device,
            offload=offload,
            ranks_per_node=per_node,
            read_bytes_per_second=_rate("--read-gbps", read_gbps),
            link_bytes_per_second=_rate("--link-gbps", link_gbps),
            measure_read=measure_read,
            host_bytes=_bytes("--host-ram", host_ram),
            device_bytes=_bytes("--device-ram", device_ram),
        )
        if json_file is not None:
            write_json(plan.to_json(), json_file)  # first: who reads the output may have closed it
        show_plan(plan)
    if plan.verdict is not None and not plan.verdict.fits:
        raise typer.Exit(STATUS_DOES_NOT_FIT)


def _axes(ranks: int | None, mesh: str | None, *, replicas: int, tp: int) -> dict[str, int]:
    if (ranks is None) == (mesh is None):
        raise ConfigurationError("plan: expected --ranks or --mesh, got " + ("both" if ranks else "neither"))
    if mesh is not None:
        if replicas > 1:
            raise ConfigurationError("plan: expected --replicas or --mesh, got both")
        sizes = mesh.lower().split("x")
        if len(sizes) > 2 or not all(size.isascii() and size.isdecimal() for size in sizes):
            raise ConfigurationError(f"--mesh: expected SHARDS or REPLICASxSHARDS, such as 2x4, got {mesh!r}")
        numbers = [int(size) for size in sizes]
        shards, copies = numbers[-1], numbers[0] if len(numbers) > 1 else None
    else:
        of_job = ranks or 1
        shards, rest = divmod(of_job, replicas * tp)
        if rest or not shards:
            raise ConfigurationError(
                f"plan: expected --ranks to be a multiple of --replicas x --tp ({replicas} x {tp}), got {of_job}"
            )
        copies = replicas if replicas > 1 else None
    axes = {} if copies is None else {"dp_replicate": copies}
    axes["dp_shard"] = shards
    if tp > 1:
        axes["tp"] = tp
    return axes


def _ranks_per_node(axes: dict[str, int], nodes: int | None, ranks_per_node: int | None) -> int:
    if nodes is None:
        return ranks_per_node or 8
    if ranks_per_node is not None:
        raise ConfigurationError("plan: expected --nodes or --ranks-per-node, got both")
    ranks = 1
    for size in axes.values():
        ranks *= size
    if ranks % nodes:
        raise ConfigurationError(f"--nodes: expected a number that divides the {ranks} ranks, got {nodes}")
    return max(1, ranks // nodes)


def _rate(option: str, gigabytes: float | None) -> float | None:
    if gigabytes is None:
        return None
    if not 0 < gigabytes < float("inf"):
        raise ConfigurationError(f"{option}: expected a number above 0, got {gigabytes:g}")
    return gigabytes * _GIGABYTE


def _bytes(option: str, gibibytes: float | None) -> int | None:
    if gibibytes == float("inf"):
        raise ConfigurationError(f"{option}: expected a finite number, got {gibibytes}")
    return None if gibibytes is None else int(gibibytes * _GIBIBYTE)
