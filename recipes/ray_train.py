"""Bring a pretrained model into FSDP2 form on the workers of Ray Train, and take one step.

python recipes/ray_train.py CHECKPOINT --workers 4            # one machine, or a cluster that RAY_ADDRESS names
python recipes/ray_train.py CHECKPOINT --workers 2 --cpu      # without accelerators
"""

from __future__ import annotations

import argparse
from typing import Any


def train(config: dict[str, Any]) -> None:
    """Run on every worker. Ray has made the process group, and set RANK, LOCAL_RANK and WORLD_SIZE."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    import shardwise as sw

    strategy = sw.NativeFSDPStrategy(mixed_precision="no" if config["cpu"] else "bf16")
    model = strategy.load_pretrained(AutoModelForCausalLM, config["checkpoint"], dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model, optimizer = strategy.wrap_model(model, optimizer)
    verified = sw.verify_shards(model, config["checkpoint"])
    tokens = torch.randint(0, model.config.vocab_size, (1, 16), device=strategy.device_mesh.device_type)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    if dist.get_rank() == 0:
        report = strategy.last_report
        print(
            f"loss {loss.item():.3f}; route {report.route} on {report.world_size} workers; {verified.summary()}"
        )


def main() -> None:
    """Start the workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        train,
        train_loop_config={"checkpoint": arguments.checkpoint, "cpu": arguments.cpu},
        scaling_config=ScalingConfig(num_workers=arguments.workers, use_gpu=not arguments.cpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=0)),
        torch_config=TorchConfig(backend="gloo" if arguments.cpu else "nccl"),
    )
    trainer.fit()  # raises where a worker fails; what they print comes to this terminal


if __name__ == "__main__":
    main()
