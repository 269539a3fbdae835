"""fp16's loss scaling: a step that overflows is skipped on all ranks and advances nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import Net
from placements import full_parameters, inject, place
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import dist_optim
from dist_optim.testing import RankPool

SHAPES = ((6, 4), (4, 6))
SCALE = 8.0


def run(placement: str, overflows: bool) -> tuple[list[tuple[int, float]], dict[str, torch.Tensor]]:
    """Three steps, the middle one with an overflow in one element, which lies in one rank's slice."""
    torch.manual_seed(0)
    model = place(Net(SHAPES, ()), placement)
    optimizer = dist_optim.build_optimizer(model, "adafactor", lr=1e-2, print_audit=False)
    # FSDP1 needs the scaler that reduces what it finds over the ranks; FSDP2's tensors do so by themselves.
    scaler: Any = ShardedGradScaler("cpu", SCALE) if placement == "fsdp1" else torch.amp.GradScaler("cpu", SCALE)
    scaler.scale(torch.ones(()))
    history = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        full = {
            name: SCALE * torch.randn(p.shape, generator=generator) for name, p in Net(SHAPES, ()).named_parameters()
        }
        if step == 1:
            if not overflows:
                continue
            full["linears.0.weight"][0, 0] = torch.inf
        if step == 2 and overflows:
            full = {name: gradient * scaler.get_scale() / SCALE for name, gradient in full.items()}
        inject(model, full)  # type: ignore[arg-type]
        scaler.step(optimizer)
        scaler.update()
        history.append((optimizer.num_steps, scaler.get_scale()))
    return history, full_parameters(model)


@pytest.mark.parametrize("placement", ["ddp", "fsdp2", "fsdp1"])
def test_overflow_skips_the_step_on_all_ranks(placement: str, two_ranks: RankPool) -> None:
    for (history, skipped), (_, never) in zip(
        two_ranks.run(run, placement, True), two_ranks.run(run, placement, False), strict=True
    ):
        assert history == [(1, SCALE), (1, SCALE / 2), (2, SCALE / 2)]
        assert all(torch.equal(skipped[name], never[name]) for name in never)
