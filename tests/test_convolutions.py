"""The filters of a convolution are one matrix to Muon that is told to take them: upstream on the reshaped weight."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from placements import full_parameters, inject, place
from torch import Tensor, nn

import dist_optim
from dist_optim.errors import UnsupportedError
from dist_optim.layouts import detect
from dist_optim.layouts.stack import Filters
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

TAKEN = ("line.weight", "plane.weight", "space.weight", "fc.weight")
GROUPS: list[dict[str, Any]] = [
    {"params": list(TAKEN), "optim": "muon", "weight_decay": 0.1},
    {"params": "*", "optim": "adamw_torch"},
]
STEPS = 4


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Conv1d(4, 7, 3)
        self.plane = nn.Conv2d(6, 9, (3, 2), groups=3)
        self.space = nn.Conv3d(2, 1, 2, bias=False)
        self.turned = nn.ConvTranspose2d(3, 4, 2)
        self.fc = nn.Linear(6, 5)


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in Convolutions().named_parameters()}


def reference() -> dict[str, Tensor]:
    model = dict(Convolutions().named_parameters())
    leaves = {
        name: nn.Parameter(p.detach().flatten(1).clone() if name in TAKEN else p.detach()) for name, p in model.items()
    }
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon([leaves[name] for name in TAKEN], lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW([one for name, one in leaves.items() if name not in TAKEN], lr=1e-2, weight_decay=0.0),
    ]
    for step in range(STEPS):
        for name, full in gradients(step).items():
            leaves[name].grad = full.view(leaves[name].shape)
        for optimizer in optimizers:
            optimizer.step()
    return {name: one.detach().view(model[name].shape) for name, one in leaves.items()}


def build(
    model: nn.Module, name: str = "muon", groups: list[dict[str, Any]] = GROUPS, **options: Any
) -> dist_optim.DistributedOptimizer:
    return dist_optim.build_optimizer(model, name, params=groups, lr=1e-2, print_audit=False, **options)


def differences(placements: list[str], folder: Path) -> list[str]:
    """From equal gradients; saved under each placement, and gone on with under the next."""
    expected, problems = reference(), []
    for placement, after in zip(placements, [*placements[1:], placements[0]], strict=True):
        model = place(Convolutions(), placement)
        optimizer = build(model, check_ranks_every=2, verify_steps=2)
        for step in range(STEPS):
            if step == 2:
                dist_optim.save_checkpoint(folder / placement, model, optimizer)
                model = place(Convolutions(), after)
                optimizer = build(model, check_ranks_every=2)
                dist_optim.load_checkpoint(folder / placement, model, optimizer)
            inject(model, dict(gradients(step)))
            optimizer.clip_grad_norm_(1e6)
            optimizer.step()
        actual = full_parameters(model)
        problems += [f"{placement}: {name}" for name in expected if not torch.equal(actual[name], expected[name])]
        owned = {len(optimizer.state[one.parameter]) for one in detect(model).values()}
        assert owned <= {0, 1, 3}, "what is kept of a convolution has no number"
    return problems


def test_filters_are_stepped_as_upstream_steps_the_reshaped_weight(
    one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    assert_no_problems_on_any_rank(one_rank.run(differences, ["none"], tmp_path / "1")[0])
    for problems in two_ranks.run(differences, ["ddp", "fsdp2", "fsdp1"], tmp_path / "2"):
        assert not problems


def differences_of_another_view() -> list[str]:
    """The defect: as many rows as there are columns of a filter."""

    def turned(self: Filters, full: Tensor) -> Tensor:
        return full.view(self.shape[1:].numel(), -1).T

    with mock.patch.object(Filters, "out_of", turned), tempfile.TemporaryDirectory() as folder:
        return differences(["none"], Path(folder))


def test_control_another_view_of_the_weight_is_noticed(one_rank: RankPool) -> None:
    assert "none: line.weight" in one_rank.run(differences_of_another_view)[0]


def test_by_default_and_where_filters_do_not_lie_in_rows_they_are_not_taken() -> None:
    audit = dist_optim.build_optimizer(Convolutions(), "muon", lr=1e-2, print_audit=False).route_audit()
    assert "careful: muon as matrices" in audit
    rest = {"params": "*", "optim": "adamw_torch"}
    with pytest.raises(UnsupportedError, match="'turned.weight'.*filters are one"):
        build(Convolutions(), groups=[{"params": ["turned.weight"], "optim": "muon"}, rest])
    with pytest.raises(UnsupportedError, match="'plane.weight'.*where they lie whole"):
        model = Convolutions()
        model.plane.weight.data = model.plane.weight.data.contiguous(memory_format=torch.channels_last)
        build(model)
    low = {"params": ["plane.weight"], "rank": 2, "update_proj_gap": 2, "scale": 1.0, "proj_type": "std"}
    with pytest.raises(UnsupportedError, match="takes matrices, but this parameter has 4 dimensions"):
        build(Convolutions(), "galore_adamw", [low, {"params": "*"}])
