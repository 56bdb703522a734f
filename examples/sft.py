"""Train a wrapped model in TRL's SFTTrainer on chats, and write it as a directory that from_pretrained loads.

torchrun --nproc-per-node 4 examples/sft.py path-or-hub-id directory-to-write

It needs `pip install trl datasets` beside shardwise, and a model with its tokenizer. As in examples/trainer.py the strategy is
made first, and `use_configured_state` keeps the trainer on its state.
"""

import sys

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import shardwise as sw

strategy = sw.AccelerateStrategy(mixed_precision="bf16")
model = strategy.load_pretrained(AutoModelForCausalLM, sys.argv[1], dtype=torch.float32)
model = strategy.wrap_model(model)

chats = Dataset.from_list(
    [{"prompt": f"What is {n} plus {n}?", "completion": f" It is {n + n}."} for n in range(64)]
)
arguments = SFTConfig(
    output_dir=sys.argv[2] + "-trainer",
    max_steps=4,
    per_device_train_batch_size=2,
    learning_rate=1e-4,
    bf16=True,  # as the strategy
    gradient_checkpointing=False,
    use_cpu=strategy.device_mesh.device_type == "cpu",
    accelerator_config={"use_configured_state": True},
    logging_steps=1,
    report_to="none",
    save_strategy="no",
)
trainer = SFTTrainer(
    model=model,
    args=arguments,
    train_dataset=chats,
    processing_class=AutoTokenizer.from_pretrained(sys.argv[1]),
)
trainer.train()
sw.export_checkpoint(model, sys.argv[2], tokenizer=trainer.processing_class)
dist.destroy_process_group()
