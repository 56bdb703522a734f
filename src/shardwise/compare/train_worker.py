"""What one rank does for `shardwise train`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from shardwise.compare.announce import announce
from shardwise.compare.worker import join_group


def train_model(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Train on this rank.

    Args:
        arguments: `settings`, as `TrainSettings.to_json` gives them; `go_on`, the command that goes on from a checkpoint.

    Returns:
        The outcome, as `train` gives it. What happens on the way is announced as one JSON object a line.
    """
    announce(json.dumps({"kind": "note", "text": "starting ranks"}))
    from shardwise.training import TrainSettings, train

    join_group()

    def report(event: Mapping[str, Any]) -> None:
        announce(json.dumps(event))

    outcome = train(TrainSettings.from_json(arguments["settings"]), report=report)
    if outcome["stopped"]:
        where = f"Stopped at step {outcome['step']} of {outcome['steps']}, saved as {outcome['checkpoint']}."
        report({"kind": "note", "text": f"{where} Go on with: {arguments['go_on']}"})
    dist.destroy_process_group()
    return outcome
