"""`shardwise train`: fine-tune a causal language model on shards."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from shardwise.cli.before_ranks import check_beginning, check_checkpoint, check_data, check_strategy_options
from shardwise.cli.options import DebugOption, JsonOption, RanksOption
from shardwise.cli.results import write_json
from shardwise.cli.terminal import errors_reported
from shardwise.cli.training_display import training_display

_LOG_FOLDER = "logs"
_LORA_ALPHA = 16.0
_GRACE_SECONDS = 60  # to end a step and write a checkpoint in


def train_command(
    model: Annotated[
        str, typer.Argument(help="A causal language model: directory or hub id.", show_default=False)
    ],
    data: Annotated[
        Path,
        typer.Argument(
            help='Plain text; or .jsonl, each line with "text", or with chat "messages" for the tokenizer\'s template.',
            show_default=False,
            dir_okay=False,
        ),
    ],
    output_dir: Annotated[
        Path,
        typer.Option("--output-dir", help="For checkpoints, metrics and the export.", file_okay=False),
    ],
    ranks: RanksOption = 1,
    strategy: Annotated[str, typer.Option("--strategy", help="native_fsdp or accelerate.")] = "native_fsdp",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Of the shards that the optimizer updates: float32, bfloat16 or auto (the checkpoint's). Default: float32; auto "
            "under an adapter.",
            show_default=False,
        ),
    ] = None,
    mixed_precision: Annotated[
        str, typer.Option("--mixed-precision", help="Compute dtype: no (that of the shards), bf16 or fp16.")
    ] = "bf16",
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Optimizer steps, in place of --epochs.")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Times through the data.")] = 1,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Rows of a step, over all ranks.")
    ] = 8,
    gradient_accumulation: Annotated[
        int, typer.Option("--gradient-accumulation", min=1, help="Passes in which a rank does its rows.")
    ] = 1,
    block_size: Annotated[int, typer.Option("--block-size", min=2, help="Tokens of a row.")] = 512,
    learning_rate: Annotated[float, typer.Option("--lr", help="Highest learning rate of AdamW.")] = 1e-5,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Not of biases and norms.")] = 0.01,
    warmup_steps: Annotated[
        int, typer.Option("--warmup-steps", min=0, help="Then the rate falls by a cosine.")
    ] = 0,
    max_grad_norm: Annotated[
        float, typer.Option("--max-grad-norm", help="Gradients are clipped to it; 0: not at all.")
    ] = 1.0,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Compute activations again in backward.")
    ] = False,
    reshard_after_forward: Annotated[
        bool,
        typer.Option(
            "--reshard-after-forward/--no-reshard-after-forward",
            help="Free gathered layers between forward and backward; without, the whole model stays, and less is moved.",
        ),
    ] = True,
    lora_rank: Annotated[
        int | None,
        typer.Option("--lora-rank", min=1, help="Train a LoRA adapter of this rank, not the model."),
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option("--lora-alpha", help="Default: 16.", show_default=False)
    ] = None,
    lora_dropout: Annotated[
        float | None, typer.Option("--lora-dropout", help="Default: 0.", show_default=False)
    ] = None,
    lora_target: Annotated[
        list[str] | None,
        typer.Option("--lora-target", help="A module's name; several times for several. Default: PEFT's."),
    ] = None,
    loss_on: Annotated[
        str,
        typer.Option(
            "--loss-on",
            help="Tokens of chats: assistant, all, or auto: the assistant's where the template marks them.",
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Of the data's order and of random numbers.")] = 0,
    eval_fraction: Annotated[
        float, typer.Option("--eval-fraction", help="Of the rows, from the end, that are not trained on.")
    ] = 0.0,
    eval_every: Annotated[
        int | None, typer.Option("--eval-every", min=1, help="Steps; default: at the end.")
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option("--checkpoint-every", min=1, help="Steps; default: none, but on SIGTERM."),
    ] = None,
    keep: Annotated[
        int | None, typer.Option("--keep", min=1, help="Newest checkpoints to keep; default: all.")
    ] = None,
    async_checkpoints: Annotated[
        bool,
        typer.Option("--async-checkpoints", help="Write checkpoints while training goes on; takes a copy."),
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume", help="auto: the newest good checkpoint in --output-dir, if any; or a checkpoint."
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace figures and export of another training in --output-dir."),
    ] = False,
    export: Annotated[
        bool, typer.Option("--export/--no-export", help="Write the result for from_pretrained at the end.")
    ] = True,
    export_dtype: Annotated[
        str | None,
        typer.Option(
            "--export-dtype", help="float32 or bfloat16; default: that of the shards.", show_default=False
        ),
    ] = None,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Fine-tune MODEL on DATA, each rank holding its shards, and write a directory that from_pretrained loads.

    On SIGTERM the ranks save at the end of the step and leave with status 0. Leaves with status 1 if the training failed, 2 for
    wrong options.
    """
    with errors_reported(debug=debug):
        from shardwise.compare.launch import is_rank, run_ranks
        from shardwise.compare.train_worker import train_model
        from shardwise.errors import ConfigurationError
        from shardwise.strategies import require_peft
        from shardwise.training import CHECKPOINTS, LoraSettings, TrainSettings, newest_whole

        lora = None
        if lora_rank is not None:
            lora = LoraSettings(
                rank=lora_rank,
                alpha=_LORA_ALPHA if lora_alpha is None else lora_alpha,
                dropout=lora_dropout or 0.0,
                targets=tuple(lora_target or ()),
            )
        elif lora_alpha is not None or lora_dropout is not None or lora_target:
            raise ConfigurationError(
                "--lora-alpha, --lora-dropout, --lora-target: expected --lora-rank with them, got none, which would train the whole "
                "model"
            )
        settings = TrainSettings(
            model=model,
            data=str(data),
            output_directory=str(output_dir),
            strategy=strategy,
            dtype=dtype or ("float32" if lora is None else "auto"),
            mixed_precision=mixed_precision,
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            block_size=block_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            max_grad_norm=max_grad_norm or None,
            activation_checkpointing=activation_checkpointing,
            reshard_after_forward=reshard_after_forward,
            lora=lora,
            loss_on=loss_on,
            seed=seed,
            eval_fraction=eval_fraction,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
            keep=keep,
            async_checkpoints=async_checkpoints,
            resume=resume,
            overwrite=overwrite,
            export=export,
            export_dtype=export_dtype,
        )
        if not is_rank(os.environ):
            settings.rows_of_rank(ranks)  # refused here, and not by ranks that were started for it
        if lora is not None:
            require_peft("--lora-rank")
        check_strategy_options(strategy, mixed_precision=mixed_precision, ranks=ranks)
        check_beginning(output_dir, resume=resume)
        check_checkpoint(model)
        check_data(data)
        output_dir.mkdir(parents=True, exist_ok=True)
        go_on = _command_to_go_on(sys.argv)
        try:
            with training_display() as progress:
                outcomes = run_ranks(
                    train_model,
                    {"settings": settings.to_json(), "go_on": go_on},
                    ranks=ranks,
                    log_directory=output_dir / _LOG_FOLDER,
                    progress=progress,
                    grace_seconds=_GRACE_SECONDS,
                )
        except KeyboardInterrupt as error:
            saved = newest_whole(output_dir / CHECKPOINTS)
            raise KeyboardInterrupt(
                "No checkpoint was saved (--checkpoint-every saves some)."
                if saved is None
                else f"The newest checkpoint is {saved}. Go on with: {go_on}"
            ) from error
        # Under a launcher every rank is here with its own outcome, and all are equal: the first one speaks.
        if 0 in outcomes:
            if json_file is not None:
                write_json(outcomes[0], json_file)  # first: who reads the output may have closed it
            _say(outcomes[0], output_dir)


def _command_to_go_on(argv: Sequence[str]) -> str:
    """Return the command line that goes on from the newest checkpoint."""
    kept: list[str] = []
    words = iter(argv[1:])
    for word in words:
        if word == "--resume":
            next(words, None)
        elif not word.startswith("--resume="):
            kept.append(word)
    called = argv[0] if Path(argv[0]).name == "shardwise" else "python -m shardwise"
    return f"{called} {shlex.join([*kept, '--resume', 'auto'])}"


def _say(outcome: dict[str, Any], directory: Path) -> None:
    if outcome["stopped"]:
        return  # the ranks have said where to go on, also where this process was told to end
    steps, ranks = _counted(outcome["step"], "step"), _counted(outcome["ranks"], "rank")
    said = [f"{steps} on {ranks} in {outcome['seconds']:.1f} s"]
    if outcome["loss"] is not None:
        said.append(f"loss {outcome['first_loss']:.4f} at the first, {outcome['loss']:.4f} at the last")
    if outcome["eval_loss"] is not None:
        said.append(f"eval loss {outcome['eval_loss']:.4f}")
    lines = ["; ".join(said), f"Figures of each step: {directory / 'metrics.jsonl'}"]
    if outcome["checkpoint"] is not None:
        lines.append(f"Checkpoint: {outcome['checkpoint']}")
    if outcome["export"] is not None:
        lines.append(f"Written for from_pretrained: {outcome['export']}")
    console = Console(highlight=False)
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
