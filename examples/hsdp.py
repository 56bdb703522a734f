"""Hybrid sharding: two replicas, each sharded over half of the ranks, that share the reading of the checkpoint.

torchrun --nproc-per-node 4 examples/hsdp.py path-or-hub-id
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

import shardwise as sw

accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
mesh = init_device_mesh(
    accelerator.type if accelerator is not None else "cpu",
    (2, int(os.environ["WORLD_SIZE"]) // 2),
    mesh_dim_names=("dp_replicate", "dp_shard"),
)
strategy = sw.NativeFSDPStrategy(device_mesh=mesh, mixed_precision="bf16")
model = strategy.load_pretrained(AutoModelForCausalLM, sys.argv[1], dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
model, optimizer = strategy.wrap_model(model, optimizer)

tokens = torch.randint(0, model.config.vocab_size, (1, 64), device=mesh.device_type)
loss = model(input_ids=tokens, labels=tokens).loss
loss.backward()
optimizer.step()

if dist.get_rank() == 0:
    report = strategy.last_report
    print(
        f"loss {loss.item():.3f}; route {report.route} ({report.route_reason}); "
        f"{report.storage_bytes / 2**20:.1f} MiB read by all ranks together"
    )
dist.destroy_process_group()
