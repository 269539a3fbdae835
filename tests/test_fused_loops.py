"""Updates inside backward in whole training jobs: through accelerate, and through `launch/train.py`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerated import Training, alone, make_model, started_by_accelerate, through_accelerate
from patience import PATIENCE_S
from placements import full_parameters, own_group
from test_training_loops import NOISE, STEPS, Regression, offloaded_fsdp2
from test_training_loops import make_model as make_regression
from torch import nn
from train_runs import ONE_RANK, TWO_RANKS, command

import dist_optim
from dist_optim.errors import UnsupportedError
from dist_optim.integrations.accelerate import prepare
from dist_optim.testing import RankPool, relative_distance

JOBS: dict[str, dict[str, Any]] = {
    "lomo": {"lr": 1e-1, "weight_decay": 0.01},
    "adalomo": {"lr": 1e-2, "weight_decay": 0.01},
    "galore_adamw_layerwise": {"lr": 1e-2, "target_modules": ["attn", "mlp"], "rank": 8, "update_proj_gap": 3},
}
FACTOR = 10
"""Times the distance that another order of summation takes one process, as for all optimizers under accelerate."""


def in_noise_floors(name: str, strategy: str) -> float:
    """The distance of a fused job under accelerate from the stored one in one process, in noise floors."""
    options = JOBS[name]
    plain = name.removesuffix("_layerwise")
    stored = {"fused_backward": False} if plain == name else {}
    reference_job = Training(plain, {**options, **stored}, evaluate_every=2)
    start = list(full_parameters(make_model(reference_job)).values())
    reference = alone(reference_job).weights
    floor = max(relative_distance(alone(reference_job, parts).weights, reference, start) for parts in (2, 3))
    arrived = through_accelerate(Training(name, {**options, "fused_backward": True}, evaluate_every=2), strategy)
    return relative_distance(arrived.weights, reference, start) / floor


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", JOBS)
def test_a_job_under_accelerate_ends_where_one_process_does(name: str, strategy: str, two_ranks: RankPool) -> None:
    assert max(two_ranks.run(in_noise_floors, name, strategy)) < FACTOR


class WithBuffers(Regression):
    """Tied and frozen parameters, and a buffer that DDP still broadcasts from rank 0."""

    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(15))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.shift)


def loop_with_ddp_features() -> float:
    """find_unused_parameters, tied parameters, buffers: against one process with the whole batch."""
    torch.manual_seed(0)
    module = WithBuffers()
    with torch.no_grad():
        module.shift += dist.get_rank()  # rank 0's counts
    model = nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
    optimizer = dist_optim.build_optimizer(model, "adalomo", lr=1e-2, print_audit=False)
    plain = make_regression()
    stored = dist_optim.build_optimizer(
        plain, "adalomo", lr=1e-2, fused_backward=False, process_group=own_group(), print_audit=False
    )
    start = [p.detach().clone() for p in plain.parameters()]
    for step in range(STEPS):
        batch = torch.randn(24, 15, generator=torch.Generator().manual_seed(step))
        model(batch.chunk(dist.get_world_size())[dist.get_rank()]).backward()
        plain(batch).backward()
        for one in (optimizer, stored):
            one.step()
            one.zero_grad()
    return relative_distance(list(full_parameters(model).values()), list(plain.parameters()), start)


def test_ddp_goes_on_doing_what_is_not_reduction(two_ranks: RankPool) -> None:
    assert max(two_ranks.run(loop_with_ddp_features)) < NOISE


def changed_when_copies_are_awaited() -> list[int]:
    """Offloaded gradients as if on their way to pinned memory: at each wait, how many weights were changed by then."""
    model = offloaded_fsdp2()
    optimizer = dist_optim.build_optimizer(model, "lomo", lr=0.1, print_audit=False)
    parameters = [one.to_local() for one in model.parameters()]  # type: ignore[attr-defined]
    start, waits = [one.clone() for one in parameters], []

    def synchronize() -> None:
        waits.append(sum(not torch.equal(one, before) for one, before in zip(parameters, start, strict=True)))

    with (
        mock.patch.object(torch.Tensor, "is_pinned", lambda *_: True),
        mock.patch.object(torch.accelerator, "synchronize", synchronize),
    ):
        model(torch.randn(4, 15)).backward()
    optimizer.step()
    assert len(waits) == sum(one.requires_grad for one in model.parameters())
    return waits


def test_each_update_waits_for_a_gradient_that_is_copied_to_the_host(two_ranks: RankPool) -> None:
    """torch before 2.13 calls hooks while the copies run."""
    for waits in two_ranks.run(changed_when_copies_are_awaited):
        assert waits == list(range(len(waits)))


def refusals_of_prepare() -> str:
    with started_by_accelerate("ddp", Training("lomo", {}, accumulation=2)) as accelerator:
        try:
            prepare(accelerator, nn.Linear(4, 4), "lomo", lr=0.1, print_audit=False)
        except UnsupportedError as error:
            return str(error)
    return "served"


def test_accumulation_asked_of_accelerate_is_refused(two_ranks: RankPool) -> None:
    for found in two_ranks.run(refusals_of_prepare):
        assert "gradient_accumulation_steps=2 sums gradients over batches" in found
        assert "fused_backward=False" in found


@pytest.mark.parametrize(("launcher", "max_grad_norm"), [(TWO_RANKS, 0), (ONE_RANK, 1)])
def test_train_script_fuses_and_clips_in_a_backward_of_its_own(
    launcher: list[str], max_grad_norm: float, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    flags = ("--optim", "lomo", "--learning_rate", "0.1", "--max_steps", "4", "--logging_steps", "1")
    line = command(launcher, *flags, "--max_grad_norm", str(max_grad_norm), "--output_dir", out)
    done = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "updates are made inside backward" in done.stdout
    (log,) = [path for path in out.rglob("*.jsonl")]
    rows = [json.loads(row) for row in log.read_text().splitlines()]
    norms = [row["grad_norm"] for row in rows if "grad_norm" in row]
    assert (len(norms) == 4 and all(norm > 0 for norm in norms)) if max_grad_norm else not norms
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses[-1] < losses[0]
