"""Plain torch: torchrun and fully_shard. On GPUs, and on two CPU ranks where there are none; run again, it goes on:

torchrun --nproc_per_node 2 launch/examples/torchrun_fsdp2.py
"""

# ruff: noqa: E402
from dist_optim.integrations.quiet import quieten_libraries

quieten_libraries()  # their warnings of kernels and accelerators that are not there; leave it out at will

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

import dist_optim
from dist_optim.planning import shipped

dist.init_process_group()
device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
mesh = init_device_mesh(device.type, (dist.get_world_size(),))  # on GPUs it also gives each rank its own
torch.manual_seed(0)  # every rank starts from the same weights
config = AutoConfig.from_pretrained(shipped.root() / "configs/models/llama_tiny.json")
model = AutoModelForCausalLM.from_config(config).to(device)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = dist_optim.build_optimizer(model, "galore_adamw", lr=2e-3, target_modules="all-linear", rank=32)

folder = Path("runs/torchrun_fsdp2")
first = dist_optim.load_checkpoint(folder, model, optimizer) if folder.exists() else 0
for step in range(first, first + 10):
    torch.manual_seed(step * dist.get_world_size() + dist.get_rank())
    starts = torch.randint(256, (4, 1), device=device)  # rows that count up in ones, twos or threes:
    batch = (starts + (1 + starts % 3) * torch.arange(64, device=device)) % 256
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.3f}")
dist_optim.save_checkpoint(folder, model, optimizer, own=first + 10)  # loads under any sharding and number of ranks
dist.destroy_process_group()
