"""Train a wrapped model in transformers' Trainer, and write it as a directory that from_pretrained loads.

torchrun --nproc-per-node 4 examples/trainer.py path-or-hub-id directory-to-write

Two things make the Trainer leave the sharded model alone: the strategy is made first, and `use_configured_state` keeps the
Trainer's Accelerator on its state. It then sees FSDP2, and a model that is sharded already.
"""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import shardwise as sw

ROWS = 64  # of random tokens; in their place comes your tokenised data set

strategy = sw.AccelerateStrategy(mixed_precision="bf16")
model = strategy.load_pretrained(AutoModelForCausalLM, sys.argv[1], dtype=torch.float32)
model = strategy.wrap_model(model)  # the optimizer is the Trainer's, and made later

tokens = torch.randint(0, model.config.vocab_size, (ROWS, 32), generator=torch.Generator().manual_seed(0))
arguments = TrainingArguments(
    output_dir=sys.argv[2] + "-trainer",
    max_steps=4,
    per_device_train_batch_size=2,
    learning_rate=1e-4,
    bf16=True,  # as the strategy
    use_cpu=strategy.device_mesh.device_type == "cpu",
    accelerator_config={"use_configured_state": True},
    logging_steps=1,
    report_to="none",
    save_strategy="no",
)
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
)
trainer.train()
sw.export_checkpoint(model, sys.argv[2])
dist.destroy_process_group()
