"""Write a model, sharded or not, as a checkpoint that `from_pretrained` loads: each rank writes its own bytes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.conversion import is_transformers_model, saved_tensors
from shardwise.errors import ConfigurationError
from shardwise.export.adapters import agreed_names, plan_adapters, write_configs
from shardwise.export.base_names import base_names
from shardwise.export.beside import check_tokenizer, write_config
from shardwise.export.chunks import Chunks
from shardwise.export.content import Content
from shardwise.export.directory import OutputDirectory
from shardwise.export.execution import write_content
from shardwise.export.file_plan import plan_files
from shardwise.export.held import held_of
from shardwise.export.merging import terms_of
from shardwise.export.parts import LowRank, Part
from shardwise.export.report import ExportReport, gathered_ranks
from shardwise.materialization.agreement import Agreement
from shardwise.materialization.argument_kinds import check_model, check_staging_bytes
from shardwise.materialization.arguments import argument_lines
from shardwise.materialization.begin_call import begin_call
from shardwise.materialization.collector import resting_collector
from shardwise.materialization.comparing import comparable_lines, comparable_structure
from shardwise.materialization.device import device_of_model
from shardwise.materialization.layouts import agreed_layouts
from shardwise.materialization.names import model_inside, without_wrappers
from shardwise.materialization.staging import default_staging_bytes
from shardwise.materialization.storage import local_of, reshard
from shardwise.materialization.structure import Entry, Structure, entries_of
from shardwise.materialization.timeouts import timeout_seconds_of
from shardwise.plan import Layout
from shardwise.profiling import profile_memory
from shardwise.tensors import Region, dtype_name, floating_dtype

_WEIGHTS_NAME = "model.safetensors"
ALONE, MERGE = "alone", "merge"


def export_checkpoint(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    tokenizer: Any = None,
    adapters: str | None = None,
    staging_bytes: int | None = None,
    group: dist.ProcessGroup | None = None,
    timeout: float | timedelta | None = None,
) -> ExportReport:
    """Write a model as a directory that `from_pretrained` loads, each rank its own part, without gathering anything.

    All ranks of the group call this together; without a process group it writes a model of one process. Names and layouts are
    those of the model's checkpoints, as `save_pretrained` of the installed transformers writes them: stacked experts are apart
    again, a tied tensor is written once. A module that is not of transformers is written under its own names.
    The directory
    appears under its name when everything in it is on storage. The model stays as it is.

    Args:
        model: With values; sharded in any way that `materialize` fills, or not at all.
        directory: Not there, or empty. Ranks that do not see the first rank's file system send their parts to those that do.
        dtype: In which floating point tensors are written, but for those that the model's class keeps in another: a torch dtype
            or its name; None for their own.
        max_shard_size: Most bytes of tensors in one file, or a text such as `"5GB"`.
        overwrite: Replace a directory of that name that holds a model, and all that is in it.
        tokenizer: A tokenizer or processor to save beside the weights.
        adapters: Of a PEFT model: `"alone"`, as None, writes its adapters, as PEFT's own `save_pretrained` does; `"merge"` writes the
            base model with the active LoRA adapters added to its weights, one at a time and in copies of shards.
        staging_bytes: Bound of the host buffers, in bytes; None is 64 MiB on CPU ranks and 256 MiB on accelerators.
        group: Ranks that take part; None is the default group.
        timeout: How long to wait for a rank that does not arrive, in seconds or as a timedelta; None is the group's own timeout.

    Returns:
        What was written, by whom, and what it did cost; the same on all ranks.

    Raises:
        CheckpointError: The directory is there already, or cannot be written to; nothing has changed there.
        ConfigurationError: An argument is not possible, or the model has no way back to its checkpoint's layout.
        LeftOnMetaError: The model has no values yet.
        RankError: Ranks differ, one failed, or one did not arrive.
        UnsupportedFormatError: safetensors lacks a dtype.
        UnsupportedParameterError: A tie that the model's class does not declare.
    """
    agreement = begin_call("export_checkpoint", group=group)
    with agreement.phase("arguments"):
        agreement.timeout_seconds = timeout_seconds_of(timeout, group=group)
        check_model(model)
        check_staging_bytes(staging_bytes)
        if not isinstance(directory, (str, os.PathLike)):
            raise ConfigurationError(f"directory: expected a path, got {directory!r}")
        path = Path(directory).absolute()
    return export_agreed(
        model,
        path,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        tokenizer=tokenizer,
        adapters=adapters,
        staging_bytes=staging_bytes,
        agreement=agreement,
    )


def export_agreed(
    model: nn.Module,
    directory: Path,
    *,
    dtype: torch.dtype | str | None,
    max_shard_size: int | str,
    overwrite: bool,
    tokenizer: Any,
    adapters: str | None,
    staging_bytes: int | None,
    agreement: Agreement,
    chunks: Chunks | None = None,
) -> ExportReport:
    """Do what `export_checkpoint` does, which explains the arguments, over the ranks of a call.

    `chunks` says where the values are, if not in the model, which may be on meta then.
    """
    with agreement.whole_call(), ExitStack() as stack:
        model = without_wrappers(model)
        device = device_of_model(model)
        staging = staging_bytes or default_staging_bytes(device.type)
        profile = stack.enter_context(profile_memory(device=device, proportional=False))
        stack.enter_context(torch.no_grad())
        with agreement.phase("check") as check:
            floating = floating_dtype(dtype, others=(None,))
            if isinstance(floating, str):  # never: no word is among the others
                raise ConfigurationError(f"dtype: {floating}")
            check_tokenizer(tokenizer)
            adapters = _checked_adapters(model, adapters)
            _refuse_model(model_inside(model))
            reshard(model)
            check.same = comparable_structure(
                Structure.of(entries_of(model)),
                argument_lines(
                    directory=directory,
                    dtype=floating,
                    max_shard_size=max_shard_size,
                    overwrite=overwrite,
                    adapters=adapters,
                    staging_bytes=staging,
                ),
                remedy="Pass the same model and arguments on every rank.",
            )
        with agreement.phase("compare plans") as compare, resting_collector():
            content = _content(
                model, floating, max_shard_size, adapters=adapters, chunks=chunks, agreement=agreement
            )
            compare.same = comparable_lines(
                "what is to be written",
                list(content.lines()),
                remedy="Load or build the model in the same way on every rank.",
            )

        def beside(unfinished: Path) -> None:
            if adapters == ALONE:
                write_configs(model, unfinished)
            else:
                write_config(model_inside(model), unfinished, dtype=content.dtype)
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)

        output = OutputDirectory(directory, rank=agreement.rank)
        written = write_content(
            content,
            output,
            beside=beside,
            overwrite=overwrite,
            device=device,
            staging_bytes=staging,
            agreement=agreement,
        )
    with agreement.phase("report"):
        ranks = gathered_ranks(
            agreement, profile, written_bytes=written.written_bytes, network_bytes=written.network_bytes
        )
    stored = content.files.stored.values()
    return ExportReport(
        directory=str(output.path),
        kind="adapter" if adapters == ALONE else "model",
        world_size=len(agreement.ranks),
        writers=written.writers,
        files={planned.name: planned.nbytes for planned in content.files.files},
        tensors=len(stored),
        dtypes=dict(Counter(dtype_name(of.dtype) for of in stored)),
        whole=content.whole,
        seconds=max(of.seconds for of in ranks),
        phases=profile.phase_seconds(),
        written_bytes=sum(of.written_bytes for of in ranks),
        network_bytes=sum(of.network_bytes for of in ranks),
        ranks=ranks,
    )


def _content(
    model: nn.Module,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    *,
    adapters: str | None,
    chunks: Chunks | None,
    agreement: Agreement,
) -> Content:
    name_of = base_names(model) if adapters == MERGE else None
    held = held_of(model, dtype, chunks=chunks, name_of=name_of)
    if not held.stored:
        raise ConfigurationError(
            f"export_checkpoint: expected a model with parameters or persistent buffers, got {type(model).__name__} with none"
        )
    if adapters == ALONE:
        saved, files = plan_adapters(agreed_names(model, held.stored, agreement), held.stored)
    else:
        inside = model_inside(model)
        saved = saved_tensors(inside, held.stored, held.ties)
        files = plan_files(
            saved,
            weights_name=_WEIGHTS_NAME,
            max_shard_size=max_shard_size,
            parameters=held.parameters,
        )
    parts, shards = _parts_of(held.entries, chunks, agreement)
    first_fqn = {slot.fqn: entry.fqn for entry in held.entries for slot in entry.slots}
    terms: dict[str, tuple[LowRank, ...]] = {}
    for fqn, of_weight in terms_of(model).items() if adapters == MERGE else ():
        terms[first_fqn[fqn]] = terms.get(first_fqn[fqn], ()) + of_weight
    for names in held.ties:
        if held.first_name[names[0]] in terms:
            raise ConfigurationError(
                f"{' = '.join(names)}: expected adapters on weights of their own to merge, got one on a tied weight, of which the "
                "other use would change too. Export the adapter alone (adapters='alone')."
            )
    return Content(
        saved=saved,
        files=files,
        held=held.stored,
        parts={name: parts[first] for name, first in held.first_name.items()},
        shards=shards,
        terms=terms,
        dtype=held.dtype,
        parts_of_fqn=parts,
    )


def _parts_of(
    entries: Sequence[Entry], chunks: Chunks | None, agreement: Agreement
) -> tuple[dict[str, tuple[Part, ...]], dict[str, torch.Tensor]]:
    """Return the parts of each tensor, by first fqn, and what this rank holds, by their keys."""
    parts: dict[str, tuple[Part, ...]] = {}
    shards: dict[str, torch.Tensor] = {}
    if chunks is None:
        layouts = agreed_layouts(entries, agreement=agreement)
        is_sharded = any(isinstance(entry.tensor, DTensor) for entry in entries)
        of_first_rank = Layout.replicated(agreement.ranks[:1])
        for entry in entries:
            layout = layouts[entry.fqn]
            if not isinstance(entry.tensor, DTensor) and (is_sharded or entry.role == "buffer"):
                # Nothing keeps such copies equal (statistics of batches, `ignored_params`): all are taken from one rank.
                layout = of_first_rank
            whole = Region.whole(tuple(entry.tensor.shape))
            parts[entry.fqn] = (Part(key=entry.fqn, region=whole, layout=layout),)
            shards[entry.fqn] = local_of(entry.tensor)
        return parts, shards
    layout = Layout.replicated(agreement.ranks)
    for fqn, of_tensor in chunks.items():
        shards |= {f"{fqn} {number}": chunk.tensor for number, chunk in enumerate(of_tensor)}
        parts[fqn] = tuple(
            Part(key=f"{fqn} {number}", region=chunk.region, layout=layout)
            for number, chunk in enumerate(of_tensor)
        )
    return parts, shards


def _checked_adapters(model: nn.Module, adapters: str | None) -> str | None:
    """Return what of a PEFT model is written; None of other models, which have no adapters around them."""
    is_peft = model_inside(model) is not model
    if adapters not in (None, ALONE, MERGE) or (adapters is not None and not is_peft):
        got = (
            repr(adapters)
            if is_peft or adapters not in (ALONE, MERGE)
            else f"{adapters!r} for {type(model).__name__}"
        )
        raise ConfigurationError(
            f"adapters: expected '{ALONE}' or '{MERGE}' for a PEFT model, None for another one, got {got}"
        )
    return (adapters or ALONE) if is_peft else None


def _refuse_model(model: nn.Module) -> None:
    if not is_transformers_model(model):
        return
    if getattr(model, "hf_quantizer", None) is not None:
        raise ConfigurationError(
            f"export_checkpoint: expected a model that is not quantised, got {type(model).__name__} with "
            f"{type(model.hf_quantizer).__name__}. Its save_pretrained knows its format."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigurationError(
            f"export_checkpoint: expected adapters around the model, as strategy.add_adapter and peft.get_peft_model put them, got "
            f"{type(model).__name__} with adapters inside, from its own add_adapter. Its save_pretrained writes these."
        )
