"""What one rank fails at inside a step, all ranks raise in that step while the engine runs; then they go on alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from placements import full_parameters, place
from torch import Tensor, nn

import dist_optim
from dist_optim.errors import CheckpointError, DistOptimError, RankFailedError, StepFailedError
from dist_optim.ranks.agreement import agree_on_bits
from dist_optim.ranks.together import together
from dist_optim.stepping import presence
from dist_optim.testing import RankFailure, RankPool


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def fail_in_upstream(model: nn.Module, optimizer: dist_optim.DistributedOptimizer) -> None:
    for instance in optimizer.holdings.instances:
        instance.optimizer.step = mock.Mock(side_effect=[MemoryError("no room"), None])  # type: ignore[method-assign]


def give_odd_gradient(model: nn.Module, optimizer: dist_optim.DistributedOptimizer) -> None:
    parameter = next(model.parameters())
    parameter.grad = torch.zeros_like(parameter).to_sparse()


def replace_parameter(model: nn.Module, optimizer: dist_optim.DistributedOptimizer) -> None:
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    linear.bias = nn.Parameter(linear.bias.detach().clone())


def lose_gradient(model: nn.Module, optimizer: dist_optim.DistributedOptimizer) -> None:
    next(model.parameters()).grad = None


FAULTS: dict[str, Callable[[nn.Module, dist_optim.DistributedOptimizer], None]] = {
    "upstream": fail_in_upstream,
    "odd gradient": give_odd_gradient,
    "replaced parameter": replace_parameter,
    "lost gradient": lose_gradient,
}


def fail_on_rank_1(placement: str, name: str, fault: str) -> tuple[str, bool]:
    """What the step raised here, and whether weights are as before it."""
    model = place(net(), placement)
    optimizer = dist_optim.build_optimizer(model, name, lr=1e-2, print_audit=False)
    for step in range(3):
        model(torch.ones(2, 6)).square().mean().backward()
        if step == 2:
            before = full_parameters(model)
            if dist.get_rank() == 1:
                FAULTS[fault](model, optimizer)
            try:
                optimizer.step()
            except DistOptimError as error:
                if fault == "replaced parameter":
                    return f"{type(error).__name__}: {error}", True
                unchanged = all(map(torch.equal, before.values(), full_parameters(model).values()))
                optimizer.zero_grad()
                model(torch.ones(2, 6)).square().mean().backward()  # the engine's own collectives still match
                optimizer.step()
                return f"{type(error).__name__}: {error}", unchanged
        optimizer.step()
        optimizer.zero_grad()
    return "nothing", True


@pytest.mark.parametrize(
    ("placement", "name"), [("ddp", "adamw_torch"), ("fsdp2", "adamw_torch"), ("fsdp2", "adafactor")]
)
def test_upstream_failing_on_one_rank(placement: str, name: str, two_ranks: RankPool) -> None:
    for text, _ in two_ranks.run(fail_on_rank_1, placement, name, "upstream"):
        assert "StepFailedError" in text and "step 3 failed on rank 1 with MemoryError: no room" in text


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("odd gradient", "UnsupportedError.*is sparse"),
        ("replaced parameter", "ParameterError.*is no longer the model's"),
        ("lost gradient", "RanksDisagreeError.*has a gradient on some ranks and none on others"),
    ],
)
def test_what_forbids_the_step_on_one_rank_is_raised_on_all_and_changes_nothing(
    fault: str, message: str, two_ranks: RankPool
) -> None:
    import re

    for text, unchanged in two_ranks.run(fail_on_rank_1, "ddp", "adamw_torch", fault):
        assert re.search(message, text) and unchanged


def with_silent_end() -> None:
    """Ranks that do not agree after the step: rank 1 raises alone."""

    def own_bits_only(has: list[bool], lacks: list[bool], group: object) -> tuple[list[bool], list[bool]]:
        return (list(has), list(lacks)) if len(has) == 1 else agree_on_bits(has, lacks, group)  # type: ignore[arg-type]

    with mock.patch.object(presence, "agree_on_bits", own_bits_only):
        fail_on_rank_1("ddp", "adamw_torch", "upstream")


def test_control_without_the_agreement_after_a_step_one_rank_fails_alone(two_ranks: RankPool) -> None:
    with pytest.raises(RankFailure):
        two_ranks.run(with_silent_end, timeout_s=5)


def raise_what_is_not_ours() -> str:
    def action() -> Tensor:
        if dist.get_rank() == 1:
            return {}["nothing"]  # type: ignore[index]
        return torch.ones(())

    try:
        together(action, doing="Looking up", remedy="Do not.")
    except RankFailedError as error:
        cause = type(error.__cause__).__name__
        return f"{error} ({cause})"
    return "nothing"


def test_together_raises_every_exception_everywhere(two_ranks: RankPool) -> None:
    assert two_ranks.run(raise_what_is_not_ours) == [
        "[from rank 1] Looking up failed with KeyError: 'nothing'. Do not. (NoneType)",
        "Looking up failed with KeyError: 'nothing'. Do not. (KeyError)",
    ]


def test_a_gradient_of_a_failed_step_is_not_stepped_by_later() -> None:
    model = net()
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", lr=1e-2, print_audit=False)
    state = optimizer.state_dict()
    model(torch.ones(2, 6)).square().mean().backward()
    fail_in_upstream(model, optimizer)
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.load_state_dict(state)
    for instance in optimizer.holdings.instances:
        del instance.optimizer.step
    first, *others = model.parameters()
    before, first.grad = first.detach().clone(), None
    optimizer.step()
    assert torch.equal(first, before) and all(parameter.grad is not None for parameter in others)


def saved_by_another_optimizer(placement: str, folder: Path) -> None:
    """Two optimizers on one model: the second one's step fails half way on rank 1, and the first one is saved."""
    model = place(net(), placement)
    first, *others = model.parameters()
    one, two = (
        dist_optim.build_optimizer(model, "adamw_torch", lr=1e-2, params=[{"params": own}], print_audit=False)
        for own in ([first], others)
    )
    dist_optim.save_checkpoint(folder / "before", model, one)
    model(torch.ones(2, 6)).square().mean().backward()
    one.step()
    if dist.get_rank() == 1:
        fail_in_upstream(model, two)
    with pytest.raises(StepFailedError):
        two.step()
    with pytest.raises(CheckpointError, match="Step 1 failed after a part"):
        dist_optim.save_checkpoint(folder / "after", model, one)
    del two  # the weights stay as they are
    with pytest.raises(CheckpointError, match="Load the last checkpoint"):
        dist_optim.save_checkpoint(folder / "after", model, one)
    dist_optim.load_checkpoint(folder / "before", model, one)
    dist_optim.save_checkpoint(folder / "after", model, one)


@pytest.mark.parametrize("placement", ["ddp", "fsdp2"])
def test_weights_that_another_optimizer_left_half_stepped_are_not_saved(
    placement: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(saved_by_another_optimizer, placement, tmp_path)
