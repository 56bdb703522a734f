"""The command line. torch is imported by the commands that need it, not by asking for help."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from shardwise import __version__
from shardwise.cli.compare import compare_command
from shardwise.cli.demo import demo_command
from shardwise.cli.export import export_command
from shardwise.cli.load import load_command
from shardwise.cli.plan import plan_command
from shardwise.cli.report import report_command
from shardwise.cli.train import train_command
from shardwise.cli.verify import verify_command

app = typer.Typer(
    name="shardwise",
    help="Bring pretrained PyTorch models into FSDP2 training form with every rank holding only its own shard.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo_command)
app.command("compare")(compare_command)
app.command("report")(report_command)
app.command("load")(load_command)
app.command("plan")(plan_command)
app.command("train")(train_command)
app.command("verify")(verify_command)
app.command("export")(export_command)


def _print_versions(is_asked: bool) -> None:
    # Of the installed packages' records: importing torch takes a second.
    if is_asked:
        beside = ("torch", "transformers", "accelerate", "safetensors")
        typer.echo(", ".join([f"shardwise {__version__}", *(f"{name} {_version(name)}" for name in beside)]))
        raise typer.Exit


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


@app.callback()
def _shardwise(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print the versions of shardwise and of what it stands on, and leave.",
        ),
    ] = False,
) -> None:
    # What it needs is done by the callbacks of its options.
    pass


def main() -> None:
    """Run the command line and leave with its status: 0 done, 1 a run failed, 2 wrong options or set-up."""
    app()
