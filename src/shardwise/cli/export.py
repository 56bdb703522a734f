"""`shardwise export`: a saved training, or a model, as a directory that `from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli.before_ranks import check_exported
from shardwise.cli.options import DebugOption, JsonOption, RanksOption
from shardwise.cli.results import run_on_ranks
from shardwise.cli.terminal import errors_reported


def export_command(
    source: Annotated[
        str,
        typer.Argument(
            help="A training's checkpoint, as TransformersModel.save writes it; or a model, directory or hub id.",
            show_default=False,
        ),
    ],
    directory: Annotated[
        Path, typer.Argument(help="To write; not there, or empty.", show_default=False, file_okay=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="The model that was trained, directory or hub id; for its config and tokenizer alone. Default: what the checkpoint "
            "names.",
            show_default=False,
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Write the base with the adapter added to it, not the adapter alone."),
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="In which tensors are written; default: as they are.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Most bytes of one file.")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a directory of a model, and all that is in it.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    ranks: RanksOption = 1,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Write SOURCE as DIRECTORY, each rank a part; no rank holds more of it than staging buffers.

    Leaves with status 0 if the directory is there, 1 if that failed, 2 for wrong options or where there is no SOURCE.
    """
    with errors_reported(debug=debug):
        from shardwise.compare.export_worker import export_model
        from shardwise.errors import ConfigurationError
        from shardwise.export import check_max_shard_size
        from shardwise.tensors import floating_dtype
        from shardwise.transformers_model.resume import STATE_NAME

        floating_dtype(dtype, others=(None,))
        check_max_shard_size(max_shard_size)
        state = Path(source).absolute() if (Path(source) / STATE_NAME).is_file() else None
        if state is None and (merge or model is not None):
            raise ConfigurationError(
                f"export: expected a training's checkpoint with {'--merge' if merge else '--model'}, got {source} without "
                f"{STATE_NAME}"
            )
        if state is None:
            _refuse_folder_of_states(Path(source), STATE_NAME)
            check_exported(source)
        named, adapters = (source, {}) if state is None else _trained_in(state, model, merge=merge)
        arguments = {
            "model": named,
            "state": None if state is None else str(state),
            "trained_adapters": adapters,
            "adapters": "merge" if merge else None,
            "directory": str(directory.absolute()),
            "dtype": dtype,
            "max_shard_size": max_shard_size,
            "overwrite": overwrite,
            "trust_remote_code": trust_remote_code,
        }
        run_on_ranks(export_model, arguments, ranks=ranks, json_file=json_file)


def _refuse_folder_of_states(source: Path, name: str) -> None:
    """Raise if a training's output directory was given, and not one of its checkpoints."""
    from shardwise.errors import ConfigurationError

    found = sorted(path.parent for pattern in ("*", "*/*") for path in source.glob(f"{pattern}/{name}"))
    if found and not (source / "config.json").is_file():
        raise ConfigurationError(
            f"export: expected one checkpoint of a training, or a model, got {source} with {len(found)} in it. Name one, such as "
            f"{found[-1]}."
        )


def _trained_in(state: Path, model: str | None, *, merge: bool) -> tuple[str, dict[str, str]]:
    """Return the name of the model that was trained, and the config of each adapter."""
    from shardwise.errors import ConfigurationError
    from shardwise.transformers_model.resume import read_trained

    trained = read_trained(state)
    if merge and not trained.adapters:
        raise ConfigurationError(
            f"export: expected the training of an adapter with --merge, got {state}, which has none"
        )
    name = model or trained.model
    if name is None:
        raise ConfigurationError(
            f"export: expected --model with {state}, which does not name the model that was trained, got none. Give one with its "
            "config."
        )
    if model is None and Path(name).is_absolute() and not Path(name).is_dir():
        raise ConfigurationError(
            f"export: expected the model that was trained in {name}, as {state} says, got no directory. Give --model, for its config "
            "and tokenizer alone."
        )
    return name, dict(trained.adapters)
