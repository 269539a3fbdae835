"""``replicate="elementwise"``: every rank steps what it holds whole, as a stock optimizer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from placements import full_parameters, inject, own_group, place
from test_counts import AGREEMENTS, collectives_counted
from torch import Tensor, nn

import dist_optim
from dist_optim.errors import HyperparameterError
from dist_optim.testing import RankPool

OPTIONS: dict[str, Any] = {"lr": 1e-2, "print_audit": False}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 4))


def gradients(step: int) -> dict[str, Tensor | None]:
    torch.manual_seed(1 + step)
    return {name: torch.randn_like(one) for name, one in net().named_parameters()}


def steps(model: nn.Module, optimizer: dist_optim.DistributedOptimizer, numbers: range) -> None:
    for number in numbers:
        inject(model, gradients(number))
        optimizer.step()


def goes_on_elsewhere(directory: Path) -> None:
    """Saved with state on every rank, loaded where it is divided, and back."""
    ways: tuple[tuple[str, dict[str, Any]], ...] = (
        ("ddp", {"replicate": "elementwise"}),
        ("fsdp2", {}),
        ("ddp", {}),
        ("ddp", {"replicate": "elementwise"}),
    )
    alone = net()
    reference = dist_optim.build_optimizer(alone, "adamw_torch", process_group=own_group(), **OPTIONS)
    for at, (placement, options) in enumerate(ways):
        model = place(net(), placement)
        optimizer = dist_optim.build_optimizer(model, "adamw_torch", **options, **OPTIONS)
        if at:
            dist_optim.load_checkpoint(directory, model, optimizer)
        steps(model, optimizer, range(2 * at, 2 * at + 2))
        steps(alone, reference, range(2 * at, 2 * at + 2))
        expected = full_parameters(alone)
        assert all(torch.equal(one, expected[name]) for name, one in full_parameters(model).items())
        dist_optim.save_checkpoint(directory, model, optimizer)


def test_its_checkpoint_knows_no_strategy(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(goes_on_elsewhere, tmp_path / "saved")


def what_travels() -> tuple[dict[str, int], int, str]:
    model = place(net(), "ddp")
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", replicate="elementwise", **OPTIONS)
    steps(model, optimizer, range(2))
    inject(model, gradients(2))
    with collectives_counted() as counted:
        optimizer.step()
    return dict(counted), optimizer.optimizer_state_bytes(), optimizer.route_audit()


def test_nothing_travels_and_every_rank_has_all_state(two_ranks: RankPool) -> None:
    numel = sum(one.numel() for one in net().parameters())
    for counted, state_bytes, audit in two_ranks.run(what_travels):
        assert counted == {"all_to_all_single": AGREEMENTS}
        assert state_bytes >= 2 * 4 * numel
        assert "stepped by every rank alike, state and all: 4 of 4 tensors" in audit


def test_another_word_is_refused() -> None:
    with pytest.raises(HyperparameterError, match="replicate='all' is none of 'elementwise', None"):
        dist_optim.build_optimizer(net(), "adamw_torch", replicate="all", **OPTIONS)
