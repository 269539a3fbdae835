"""A loop of one's own for `launch/multinode.sh`: it saves every other step, and resumes there when started again."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_optim

STEPS, EVERY = 6, 2


def train(folder: Path, stops_at: int = STEPS) -> None:
    """All steps from the last checkpoint on, or from the start; a first life gets stuck before ``stops_at``."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))
    optimizer = dist_optim.build_optimizer(model, "adafactor", lr=1e-2, print_audit=False)
    is_resumed = (folder / "last").exists()
    first = dist_optim.load_checkpoint(folder / "last", model, optimizer) if is_resumed else 0
    print(f"resuming from step {first}" if is_resumed else "starting", flush=True)
    for step in range(first, STEPS):
        while step == stops_at and not is_resumed:
            time.sleep(1)
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % EVERY == 0:
            dist_optim.save_checkpoint(folder / "last", model, optimizer, own=step + 1)
    if dist.get_rank() == 0:
        torch.save(model.module.state_dict(), folder / "end.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume_from_checkpoint", required=True)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--stops_at", required=True, type=int)
    asked = parser.parse_args()
    dist.init_process_group("gloo")
    train(asked.output_dir, asked.stops_at)
    dist.destroy_process_group()
