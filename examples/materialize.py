"""Fill a module that is not from Hugging Face, sharded by your own code, from a safetensors file.

torchrun --nproc-per-node 4 examples/materialize.py directory-with-safetensors

Where the directory is empty or not there, rank 0 writes a file of random values first, so that the example has something to read.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardwise as sw


class Net(nn.Module):
    """Layers under names of their own, and a buffer that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the layers make of x."""
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x * self.scale


def stored_name(name: str) -> str:
    """Return under which name the file has a parameter of the model."""
    return name.replace("layers.", "h.")


dist.init_process_group()
directory = Path(sys.argv[1])
if dist.get_rank() == 0 and not any(directory.glob("*.safetensors")):
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {stored_name(n): p.detach() for n, p in Net().named_parameters()}, directory / "model.safetensors"
    )
dist.barrier()

with torch.device("meta"):
    model = Net()
for layer in model.layers:
    fully_shard(layer)
fully_shard(model)
report = sw.materialize(model, directory, rename=stored_name, buffers={"scale": torch.full((1,), 0.5)})
verified = sw.verify_shards(model, directory, rename=stored_name)

device = next(model.parameters()).device
loss = model(torch.ones(2, 64, device=device)).square().mean()
loss.backward()
if dist.get_rank() == 0:
    print(f"loss {loss.item():.3f}; route {report.route}; {verified.summary()}")
dist.destroy_process_group()
