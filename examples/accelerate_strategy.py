"""The same through Hugging Face Accelerate, which drives the step.

torchrun --nproc-per-node 4 examples/accelerate_strategy.py path-or-hub-id
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import shardwise as sw

strategy = sw.AccelerateStrategy(mixed_precision="bf16")
accelerator = strategy.accelerator
model = strategy.load_pretrained(AutoModelForCausalLM, sys.argv[1], dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
model, optimizer = strategy.wrap_model(model, optimizer)

tokens = torch.randint(0, model.config.vocab_size, (1, 64), device=accelerator.device)
with accelerator.accumulate(model):
    loss = model(input_ids=tokens, labels=tokens).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

accelerator.print(f"loss {loss.item():.3f}; {strategy.last_report.seconds:.2f} s to shard")
accelerator.end_training()
