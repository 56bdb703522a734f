"""`shardwise load`: bring a model up sharded, and say what it did cost."""

from __future__ import annotations

from typing import Annotated

import typer

from shardwise.cli.before_ranks import check_checkpoint, check_strategy_options
from shardwise.cli.options import DebugOption, JsonOption, RanksOption
from shardwise.cli.results import run_on_ranks
from shardwise.cli.terminal import errors_reported


def load_command(
    model: Annotated[
        str, typer.Argument(help="A causal language model: directory or hub id.", show_default=False)
    ],
    ranks: RanksOption = 2,
    strategy: Annotated[str, typer.Option("--strategy", help="native_fsdp or accelerate.")] = "native_fsdp",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="Dtype in which shards are stored, such as float32; auto: the checkpoint's."
        ),
    ] = "auto",
    mixed_precision: Annotated[
        str, typer.Option("--mixed-precision", help="Compute dtype: no (that of the shards), bf16 or fp16.")
    ] = "no",
    route: Annotated[
        str,
        typer.Option("--route", help="Who reads what: auto, direct, replicate, node, rank0 or striped."),
    ] = "auto",
    cpu_storage: Annotated[
        str, typer.Option("--cpu-storage", help="Of shards in host memory: auto maps the files, copy reads.")
    ] = "auto",
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Load MODEL on several ranks, each its own bytes, print what it did cost, and let go of it.

    Leaves with status 0 if the model came up, 1 if it did not, 2 for wrong options. The JSON is what `shardwise report` reads.
    """
    with errors_reported(debug=debug):
        from shardwise.compare.load_worker import load_model
        from shardwise.materialization import checked_cpu_storage
        from shardwise.plan import check_route
        from shardwise.tensors import floating_dtype

        check_strategy_options(strategy, mixed_precision=mixed_precision, ranks=ranks)
        check_route(route)
        checked_cpu_storage(cpu_storage, direct_io=False)
        floating_dtype(dtype, others=("auto",))
        check_checkpoint(model)
        arguments = {
            "model": model,
            "strategy": strategy,
            "dtype": dtype,
            "mixed_precision": mixed_precision,
            "route": route,
            "cpu_storage": cpu_storage,
        }
        run_on_ranks(load_model, arguments, ranks=ranks, json_file=json_file)
