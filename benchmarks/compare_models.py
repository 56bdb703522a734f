"""`shardwise compare --routes --peers` on a real model and on two generated ones: what `docs/compare` shows.

    python benchmarks/compare_models.py [--model smollm2|dense|moe] [--repeats 3] [--output-dir docs/compare]

On two ranks. Of SmolLM2-135M-Instruct values and logits are compared, and a training step is run; of a dense model and a mixture of
experts of 1 B parameters it is the load alone. Each mode runs in fresh processes, in turn with the others; the run of median time stands for
them. Of each model a table (`NAME.md`), a picture (`NAME.png`) and the figures (`NAME.json`) are written.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Final

from rich.console import Console

from harness import checkpoint_of, figures_of, save_picture, to_be_shown, write_figures, write_table
from shardwise.compare.demo_model import demo_model
from shardwise.compare.experiment import compare
from shardwise.compare.modes import DEFAULT_MODES, PEER_NAMES, ROUTE_NAMES, modes_named
from shardwise.report import agreement_lines, render

_MODELS: Final = {
    "smollm2": "SmolLM2-135M-Instruct",
    "dense": "dense, 1 B parameters",
    "moe": "mixture of 64 experts, 1 B parameters",
}
_RANKS: Final = 2


def main() -> None:
    """Run the comparisons."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", choices=tuple(_MODELS))
    parser.add_argument("--checkpoint", help="a directory that holds the one model, in place of its own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output-dir", type=Path, default=Path("docs/compare"))
    options = parser.parse_args()
    console = Console(highlight=False)
    for name in options.model or tuple(_MODELS):
        with tempfile.TemporaryDirectory(prefix="compare-") as folder:
            comparison = compare(
                _checkpoint(name, options, folder, console),
                ranks=_RANKS,
                modes=modes_named((*DEFAULT_MODES, *ROUTE_NAMES, *PEER_NAMES)),
                dtype="auto",
                repeats=options.repeats,
                load_only=name != "smollm2",
                log_directory=Path(folder) / "logs",
                progress=console.print,
            )
        document = to_be_shown(comparison.document, model=_MODELS[name])
        render(document, console)
        for line in agreement_lines(document):
            console.print(line, soft_wrap=True)
        write_table(options.output_dir / f"{name}.md", document)
        save_picture(document, options.output_dir / f"{name}.png")
        write_figures(
            options.output_dir / f"{name}.json",
            f"compare {name}",
            options,
            floor="the ranks' shards (`shard_bytes`)",
            runs=figures_of(document)["runs"],
        )


def _checkpoint(name: str, options: argparse.Namespace, folder: str, console: Console) -> str:
    if options.checkpoint is not None:
        return str(options.checkpoint)
    if name == "smollm2":
        return str(demo_model(console.print))
    return checkpoint_of(argparse.Namespace(model=None, kind=name, parameters=1_000_000_000), folder, console)


if __name__ == "__main__":
    main()
