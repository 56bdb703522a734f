"""What a comparison found, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.errors import listed


def agreement_lines(comparison: Mapping[str, Any]) -> list[str]:
    """Say whether the modes ended with the same model, and name what differs."""
    found: dict[str, Any] = comparison["agreement"]
    counted = f"{found['parameters']} parameters and {found['buffers']} buffers"
    if found["equal"] is None:
        return ["Values were not compared: fewer than two runs looked at theirs."]
    if found["equal"]:
        failed_modes = [run["mode"] for run in comparison["runs"] if run["status"] != "ok"]
        failed = f"; failed: {', '.join(failed_modes)}" if failed_modes else ""
        compared = "All runs" if not failed else "The runs that came to their end"
        return [
            f"{compared} ended with equal parameters, buffers and logits ({counted}, byte for byte){failed}."
        ]
    lines = []
    for difference in found["differences"]:
        names = difference["tensors"]
        what = [f"{len(names)} of {counted} ({listed(names)})"] if names else []
        what += ["the logits"] if difference["logits"] else []
        lines.append(
            f"NOT EQUAL: {difference['mode']} differs from {found['reference']} in {' and in '.join(what)}."
        )
    return lines


def fine_tuning_lines(found: Mapping[str, Any] | None) -> list[str]:
    """Say how a fine-tuning on shards compares with the same in one process; nothing where there was none."""
    if found is None:
        return []
    losses = found["losses"]
    same = "the same tokens" if found["answers_alike"] else "OTHER TOKENS"
    return [
        f"Fine-tuned {len(losses)} steps on {found['ranks']} ranks: loss {losses[0]:.4f}, at the end {losses[-1]:.4f}. One process: "
        f"{found['plain_losses'][0]:.4f}, at the end {found['plain_losses'][-1]:.4f}; no step differs by more than "
        f"{100 * found['largest_difference']:.2g} %.",
        f"Exported; a plain from_pretrained in one process goes on from the same words with {same} as the sharded model: "
        f'"{found["answer"].strip()}"',
    ]
