"""The experiment that the project began with: what `memory_efficient_init` saves, through both strategies.

    make experiment   # or: python benchmarks/experiment.py [--ranks 4] [--repeats 3] [--dtype float32] [--output-dir docs/experiment]

Host and device memory are sampled over `from_pretrained`, the making of an optimizer, and `wrap_model`; each mode runs in fresh processes,
in turn with the others. The model has the shape of Qwen3-8B where this machine holds what the eager modes take of it, else one of 1 B
parameters. For each stored dtype a table is printed, and two pictures are drawn: through Accelerate with `memory_efficient_init` on and off,
and with it on through Accelerate and through plain torch. What this machine does not allow is printed as not measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

import torch
import transformers
from rich.console import Console

from harness import figures_of, save_picture, to_be_shown, write_figures, write_table
from shardwise.compare.experiment import compare
from shardwise.compare.generated import generate_checkpoint
from shardwise.compare.modes import modes_named
from shardwise.report import render

_MODES: Final = ("accelerate-eager", "accelerate-efficient", "native-eager", "native-efficient")
_PICTURES: Final = {
    "accelerate-off-and-on": ("accelerate-eager", "accelerate-efficient"),
    "accelerate-and-native": ("accelerate-efficient", "native-efficient"),
}
_LARGE: Final = ("Qwen3-8B's shape", 8_190_000_000)
_SMALL: Final = ("1 B parameters", 1_000_000_000)
_STORED_BYTES: Final = 2  # per parameter on disk
_EAGER_COPIES: Final = 2  # of a model in the asked dtype that a rank may hold while it loads and shards it
_GIBIBYTE: Final = 2**30


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float32"))
    parser.add_argument("--parameters", type=int, help="in place of the size that this machine holds")
    parser.add_argument("--output-dir", type=Path, default=Path("docs/experiment"))
    options = parser.parse_args()
    console = Console(highlight=False)
    directory = options.output_dir / f"transformers-{transformers.__version__}"
    with tempfile.TemporaryDirectory(prefix="experiment-") as folder:
        for dtype in options.dtype or ("bfloat16", "float32"):
            label, parameters, not_measured = _size(options, dtype, Path(folder))
            if not torch.accelerator.is_available():
                not_measured.append("device memory: not measured (this machine has no accelerator)")
            for line in not_measured:
                console.print(line)
            model = Path(folder) / f"{parameters}"
            if not model.exists():
                console.print(f"writing a checkpoint of {label}, bf16")
                generate_checkpoint(
                    model, config_kind="dense", parameters=parameters, dtype=torch.bfloat16, seed=0, files=4
                )
            comparison = compare(
                str(model),
                ranks=options.ranks,
                modes=modes_named(_MODES),
                dtype=dtype,
                repeats=options.repeats,
                load_only=True,
                log_directory=directory / "logs",
                progress=console.print,
            )
            document = to_be_shown(comparison.document, model=f"{label} in {dtype}")
            console.print(f"transformers {transformers.__version__}, {label}, shards in {dtype}")
            render(document, console)
            for name, modes in _PICTURES.items():
                runs = [run for run in document["runs"] if run["mode"] in modes]
                save_picture({**document, "runs": runs}, directory / f"{dtype}-{name}.png")
            write_table(directory / f"{dtype}.md", document, notes=not_measured)
            write_figures(
                directory / f"{dtype}.json",
                "experiment",
                options,
                floor="the ranks' shards (`shard_bytes`)",
                runs=figures_of(document)["runs"],
            )
            console.print(f"written to {directory}")


def _size(options: argparse.Namespace, dtype: str, folder: Path) -> tuple[str, int, list[str]]:
    """Return the model in words, its number of parameters, and what this machine does not hold."""
    if options.parameters is not None:
        return f"{options.parameters / 1e9:.2g} B parameters", options.parameters, []
    label, parameters = _LARGE
    itemsize = getattr(torch, dtype).itemsize
    needed = {
        "memory": (options.ranks * parameters * itemsize * _EAGER_COPIES, _memory_bytes()),
        "disk": (parameters * _STORED_BYTES, shutil.disk_usage(folder).free),
    }
    short = [
        f"{wanted / _GIBIBYTE:.0f} GiB of {what} for the eager modes, of {there / _GIBIBYTE:.0f}"
        for what, (wanted, there) in needed.items()
        if wanted > there
    ]
    if not short:
        return *_LARGE, []
    return *_SMALL, [f"{label}, shards in {dtype}: not measured (it takes {' and '.join(short)})"]


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
