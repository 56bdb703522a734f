"""Fine-tune through the facade, save, and go on: the model is sharded at its first forward.

torchrun --nproc-per-node 4 examples/transformers_model.py path-or-hub-id directory-for-the-state
"""

import sys

import torch
import torch.distributed as dist

import shardwise as sw

model = sw.TransformersModel(sys.argv[1], strategy="native_fsdp", mixed_precision="bf16", dtype=torch.float32)
model.set_optimizer("AdamW", lr=1e-5, weight_decay=0.01)
model.set_lr_scheduler("cosine", num_warmup_steps=2, num_training_steps=10)

tokens = torch.randint(0, model.model.config.vocab_size, (1, 64))
for _ in range(4):  # two optimizer steps of two passes each
    loss = model.forward_backward(input_ids=tokens, labels=tokens).loss
    model.clip_grad_and_step(max_grad_norm=1.0, gradient_accumulation_steps=2)
model.save(sys.argv[2])

again = sw.TransformersModel(sys.argv[1], strategy="native_fsdp", mixed_precision="bf16", dtype=torch.float32)
again.set_optimizer("AdamW")
again.set_lr_scheduler("cosine", num_warmup_steps=2, num_training_steps=10)
again.load(sys.argv[2])
if dist.get_rank() == 0:
    print(
        f"loss {loss.item():.3f} after {again.global_step} steps, {again.last_report.seconds:.2f} s to shard"
    )
dist.destroy_process_group()
