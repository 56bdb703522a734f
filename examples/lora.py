"""Train a new LoRA adapter on a base whose values each rank reads at the wrap, and write the adapter alone.

torchrun --nproc-per-node 4 examples/lora.py path-or-hub-id directory-to-write
"""

import sys

import torch
import torch.distributed as dist
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import shardwise as sw

strategy = sw.NativeFSDPStrategy(mixed_precision="bf16")
model = strategy.load_pretrained(
    AutoModelForCausalLM, sys.argv[1]
)  # frozen: the checkpoint's own dtype will do
model = strategy.add_adapter(
    model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
model, optimizer = strategy.wrap_model(model, optimizer)

tokens = torch.randint(0, model.config.vocab_size, (1, 64), device=strategy.device_mesh.device_type)
for _ in range(2):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

report = sw.export_checkpoint(model, sys.argv[2])  # as PEFT's own save_pretrained writes it
if dist.get_rank() == 0:
    print(f"loss {loss.item():.3f}; {report.summary()}")
dist.destroy_process_group()
