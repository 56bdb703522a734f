"""What another training has left in the output directory: it is not replaced unasked, and that is said before the first step."""

from __future__ import annotations

from pathlib import Path

from shardwise.errors import ConfigurationError
from shardwise.export.directory import OutputDirectory
from shardwise.materialization import Agreement
from shardwise.training.metrics import METRICS_NAME


def refuse_results(
    directory: Path,
    *,
    export: Path | None,
    replaces_export: bool,
    replaces_metrics: bool,
    agreement: Agreement,
) -> None:
    """Raise if there are results that this training would replace and may not. All ranks call this together.

    Args:
        directory: Of the training.
        export: Where the trained model will go; None where it is not written.
        replaces_export: Whether the directory of a model may be replaced there.
        replaces_metrics: Whether figures of steps may be.
        agreement: Of the call.

    Raises:
        CheckpointError: There is something where the export will go.
        ConfigurationError: There are figures of another training.
        PeerError: As above, on the ranks that have not looked.
    """
    with agreement.phase("look at results"):
        if agreement.rank == agreement.ranks[0]:
            if export is not None:
                OutputDirectory(export, rank=agreement.rank).refuse(overwrite=replaces_export)
            metrics = directory / METRICS_NAME
            if not replaces_metrics and metrics.is_file() and metrics.stat().st_size:
                raise ConfigurationError(
                    f"{metrics}: expected no figures, got those of another training. Give another --output-dir, or --overwrite to "
                    "replace them and the export."
                )
