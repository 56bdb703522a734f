"""Bring a pretrained model into FSDP2 form with torch alone, take one step, and say what it did cost.

torchrun --nproc-per-node 4 examples/native.py path-or-hub-id
"""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import shardwise as sw

strategy = sw.NativeFSDPStrategy(mixed_precision="bf16")
model = strategy.load_pretrained(AutoModelForCausalLM, sys.argv[1], dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
model, optimizer = strategy.wrap_model(model, optimizer)

tokens = torch.randint(0, model.config.vocab_size, (1, 64), device=strategy.device_mesh.device_type)
loss = model(input_ids=tokens, labels=tokens).loss
loss.backward()
optimizer.step()

if dist.get_rank() == 0:
    report = strategy.last_report
    print(
        f"loss {loss.item():.3f}; shards of {report.ranks[0].shard_bytes / 2**20:.0f} MiB in {report.seconds:.2f} s"
    )
dist.destroy_process_group()
