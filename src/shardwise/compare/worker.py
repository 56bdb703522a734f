"""What one rank does for one mode: bring the model up under a memory profile, look at it, take a step."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from shardwise.compare.announce import announce
from shardwise.compare.devices import accelerator_of_ranks, launched_ranks_here
from shardwise.compare.fingerprint import check_same_on_all_ranks, model_digests, tensor_digest
from shardwise.compare.modes import MODES, Mode
from shardwise.compare.peers import PEERS, Peer, report_of_peer
from shardwise.compare.question import question_for
from shardwise.errors import CommandError
from shardwise.profiling import LoadReport, profile_memory

LOAD_PHASES: Final = ("from_pretrained", "optimizer", "wrap_model")

_SEED: Final = 0
_LEARNING_RATE: Final = 1e-5
_GROUP_TIMEOUT: Final = datetime.timedelta(minutes=10)


def measure_mode(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the model up in one mode on this rank, and return what it cost and what came out.

    Args:
        arguments: `model` (a directory), `mode` (its name), `dtype` (torch's name of it, or `auto`), `load_only`
            (whether to leave out everything after the load) and `ask` (whether to ask the model); `mesh_shape`, where it is not one
            axis: replicas and shards; `one_device`, where all ranks take the first accelerator.

    Returns:
        `rank`, `node`, `report` (a LoadReport: the strategy's, or what is known of a peer), `timeline` (over the load phases), `seconds` (of
        each), `peaks`, `step_timeline`, `step_seconds`, `digests` (by tensor), `logits` (their digest) and `answer`;
        of the last five, what was not asked for is None or empty.
    """
    announce("starting ranks")
    # Imported before the baseline: what the libraries themselves take is not what is measured.
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    mode = MODES[arguments["mode"]]
    directory = Path(arguments["model"])
    dtype = arguments["dtype"] if arguments["dtype"] == "auto" else getattr(torch, arguments["dtype"])
    device = join_group_on_one_device() if arguments.get("one_device") else join_group()
    strategy = _strategy(mode, device, arguments.get("mesh_shape") or (dist.get_world_size(),))
    config_class = type(AutoConfig.from_pretrained(directory, local_files_only=True))
    if config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        MODEL_FOR_CAUSAL_LM_MAPPING[config_class]  # the look-up imports the model's code
    torch.manual_seed(_SEED)
    dist.barrier()  # all ranks have paid for their imports, and their clocks start together

    with profile_memory(device=device) as profile:
        announce("from_pretrained")
        with profile.phase("from_pretrained"):
            model = strategy.load_pretrained(AutoModelForCausalLM, str(directory), dtype=dtype)
        if isinstance(strategy, Peer) and not strategy.optimizer_first:
            announce("wrap_model")
            with profile.phase("wrap_model"):
                model = strategy.wrap_model(model)
            with profile.phase("optimizer"):
                optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
        else:
            announce("optimizer")
            with profile.phase("optimizer"):
                optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
            announce("wrap_model")
            with profile.phase("wrap_model"):
                model, optimizer = strategy.wrap_model(model, optimizer)
    peaks = profile.peak_between(0.0, profile.seconds)
    dist.barrier()  # no rank's check may fall into another rank's load

    if arguments["load_only"]:
        looked: dict[str, Any] = {
            "digests": {},
            "logits": "",
            "step_timeline": None,
            "step_seconds": None,
            "answer": None,
        }
    else:
        looked = _look(model, optimizer, directory, device, strategy=strategy, ask=arguments["ask"])
    if isinstance(strategy, Peer):
        report: LoadReport | None = report_of_peer(
            model, optimizer, profile, mode=mode.name, model_name=str(directory)
        )
    else:
        report = strategy.last_report
    rank = dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()

    if report is None:
        raise CommandError(f"{mode.name}: expected a load report after wrap_model, got none.")
    return {
        "rank": rank,
        "node": socket.gethostname(),
        "report": report.to_json(),
        "timeline": {**profile.to_json(), "rank": rank},
        "seconds": {
            name: seconds for name, seconds in profile.phase_seconds().items() if name in LOAD_PHASES
        },
        "peaks": {
            "host_anon_peak_bytes": peaks.anon_peak_bytes,
            "device_peak_bytes": peaks.device_peak_bytes,
        },
        **looked,
    }


def _look(
    model: Any, optimizer: Any, directory: Path, device: torch.device, *, strategy: Any, ask: bool
) -> dict[str, Any]:
    """Fingerprint the wrapped model, train it for one step, and ask it."""
    announce("gathering every tensor to compare it")
    question = question_for(directory, vocabulary=model.config.get_text_config().vocab_size, device=device)
    digests = model_digests(model)
    logits = _logits_digest(model, question.token_ids)
    answer = None
    if ask:
        announce("asking the model")
        answer = question.answer(model)
    announce("one training step")
    dist.barrier()
    # A profile of its own: what lies between is not part of bringing a model up.
    with profile_memory(device=device) as step_profile, step_profile.phase("step"):
        _step(model, optimizer, question.batch, strategy=strategy)
    rank = dist.get_rank()
    return {
        "digests": digests if rank == 0 else {},
        "logits": logits,
        "step_timeline": {**step_profile.to_json(), "rank": rank},
        "step_seconds": step_profile.phase_seconds()["step"],
        "answer": answer,
    }


def join_group() -> torch.device:
    """Make the default group, on the accelerators where each local rank can have one of its own."""
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator = accelerator_of_ranks(launched_ranks_here())
    if accelerator is None:
        dist.init_process_group("gloo", timeout=_GROUP_TIMEOUT)
        return torch.device("cpu")
    backend = dist.get_default_backend_for_device(accelerator)
    torch.accelerator.set_device_index(local_rank)
    device = torch.device(accelerator.type, local_rank)
    torch.zeros(1, device=device)  # the device's context is not what is measured
    dist.init_process_group(
        f"cpu:gloo,{accelerator.type}:{backend}", timeout=_GROUP_TIMEOUT, device_id=device
    )
    return device


def join_group_on_one_device() -> torch.device:
    """Make the default group over gloo, all ranks on the first accelerator; on the CPU where there is none.

    NCCL takes one rank for each device. What a load moves goes through host memory then, and a training step is not possible.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    os.environ["LOCAL_RANK"] = "0"  # other libraries take the device of this number
    device = torch.device("cpu")
    if accelerator is not None:
        torch.accelerator.set_device_index(0)
        device = torch.device(accelerator.type, 0)
        torch.zeros(1, device=device)  # the device's context is not what is measured
    dist.init_process_group("gloo", timeout=_GROUP_TIMEOUT)
    return device


def _strategy(mode: Mode, device: torch.device, mesh_shape: Sequence[int]) -> Any:
    from shardwise.strategies import STRATEGIES

    names = ("dp_replicate", "dp_shard")[-len(mesh_shape) :]
    mesh = init_device_mesh(device.type, tuple(mesh_shape), mesh_dim_names=names)
    if mode.strategy == "peer":
        return PEERS[mode.name](mesh)
    # Computed in the stored dtype: with mixed precision, stock Accelerate would store another one than was asked for.
    return STRATEGIES[mode.strategy](
        device_mesh=mesh,
        mixed_precision="no",
        memory_efficient_init=mode.memory_efficient_init,
        route=mode.route,
    )


@torch.no_grad()
def _logits_digest(model: Any, token_ids: torch.Tensor) -> str:
    model.eval()
    logits = model(input_ids=token_ids, use_cache=False).logits
    digest = tensor_digest(logits)
    check_same_on_all_ranks({"logits": digest})
    return digest


def _step(model: Any, optimizer: Any, batch: torch.Tensor, *, strategy: Any) -> None:
    model.train()
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    accelerator = getattr(strategy, "accelerator", None)
    if accelerator is None:
        loss.backward()
    else:
        accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if batch.device.type != "cpu":
        torch.accelerator.synchronize()
