"""From nothing to a sharded model with values: shardwise, and the ways and loaders of other libraries.

    python benchmarks/bench_direct.py [--kind dense | --model DIR] [--ranks 2] [--repeats 3] [--dtype auto] [--cold] [--way NAME]

The ways run in turn, each time in fresh processes on one generated Qwen3-shaped checkpoint of 1 B parameters in bf16. Of the floors one
builds the model on meta and shards it, and reads nothing; the others read the same number of bytes and build nothing. With `--kind moe`
each of 64 experts has matrices of its own on disk, which transformers 5 keeps stacked: ways that cannot do that are left out.

transformers' `DistributedConfig`, torch's DCP reader, `set_model_state_dict` and Accelerate end with shards as shardwise does.
safetensors' `load_file`, fastsafetensors, runai-model-streamer and InstantTensor hand out whole tensors, of which every rank takes all and
keeps its rows: *needed GB/s* counts the checkpoint once, whatever they read. What is not installed, or refuses, is a row with its error.

Printed are medians over the repeats: seconds until the model is ready (every parameter bound to its storage) and until it is resident
(every page of every shard touched), the former against the floor, the latter against the raw read, processor seconds of all ranks, the highest increase of anonymous host
memory on any rank and the sum of all, the bytes that all ranks requested, and those that the kernel fetched from disk for them. `--cold`
empties the page cache before each run, which needs root.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

import direct_workers
from harness import add_model_options, checkpoint_of, write_figures
from ways import FLOOR, are_equal, print_ways, run_ways


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--cold", action="store_true", help="empty the page cache before each run")
    parser.add_argument("--way", action="append", choices=tuple(direct_workers.WAYS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=160)
    left_out = direct_workers.WITHOUT_CONVERSIONS if options.kind == "moe" else ()
    with tempfile.TemporaryDirectory(prefix="bench-direct-") as folder:
        model = checkpoint_of(options, folder, console)
        runs = run_ways(
            options.way or [way for way in direct_workers.WAYS if way not in left_out],
            model,
            dtype=options.dtype,
            ranks=options.ranks,
            repeats=options.repeats,
            cold=options.cold,
            logs=Path(folder) / "logs",
            console=console,
        )
        checkpoint_bytes = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    print_ways(runs, console)
    equal = are_equal(runs)
    console.print(f"all ways ended with equal values: {equal}")
    write_figures(
        options.json,
        "direct",
        options,
        floor=FLOOR,
        checkpoint_bytes=checkpoint_bytes,
        runs=runs,
        equal=equal,
    )


if __name__ == "__main__":
    main()
