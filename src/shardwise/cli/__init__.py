"""The command line. torch is imported by the commands that need it, not by asking for help."""

from __future__ import annotations

import typer

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


@app.callback()
def _shardwise() -> None:
    # Only there so that a command keeps its name when it is the only one.
    pass


def main() -> None:
    """Run the command line and leave with its status: 0 done, 1 a run failed, 2 wrong options or set-up."""
    app()
