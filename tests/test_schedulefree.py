"""Schedule-free methods: the weights that evaluation sees, the swap in a checkpoint, and upstream's pitfalls."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from unittest import mock

import pytest
import torch
from cases.schedulefree import CASES
from parity import (
    Case,
    build_subject,
    differences,
    gradients,
    make_model,
    param_groups,
    set_learning_rates,
    take_step,
)
from placements import full_parameters, place
from redeclared import run_with_empty_steps_left_out
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import dist_optim
from dist_optim.errors import HyperparameterError, WrongModeError
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

schedulefree = pytest.importorskip("schedulefree")

EVALUATED_AFTER = (0, 4, 5, 8)
"""Steps after which the weights are swapped for an evaluation and back; the first and last among them."""


def plain_run(case: Case) -> list[list[dict[str, Tensor]]]:
    """For every step, upstream's weights after it: when training, and if swapped, in the evaluation and after it."""
    model = make_model(case)
    named = dict(model.named_parameters())
    optimizer = case.make_reference(param_groups(case, named))

    def weights() -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in named.items()}

    optimizer.train()  # type: ignore[attr-defined]
    history = []
    for step in range(case.steps):
        for name, gradient in gradients(case, model, step).items():
            named[name].grad = gradient
        set_learning_rates(optimizer, case, step)
        optimizer.step()
        history.append([weights()])
        if step in EVALUATED_AFTER:
            optimizer.eval()  # type: ignore[attr-defined]
            history[-1].append(weights())
            optimizer.train()  # type: ignore[attr-defined]
            history[-1].append(weights())
    return history


def evaluate_and_go_on(case: Case, placement: str) -> list[str]:
    expected = plain_run(copy.deepcopy(case))
    model = place(make_model(case), placement)
    optimizer = build_subject(case, model, bucket_bytes=6000)
    problems = []
    for step in range(case.steps):
        take_step(case, model, optimizer, step)
        problems += differences(case, expected[step][0], full_parameters(model), f"after step {step}")
        if step in EVALUATED_AFTER:
            optimizer.eval()
            optimizer.eval()  # twice is once
            problems += differences(case, expected[step][1], full_parameters(model), f"in the evaluation after {step}")
            optimizer.train()
            problems += differences(case, expected[step][2], full_parameters(model), f"after the evaluation, {step}")
    return problems[:5]


def evaluate_everywhere(case: Case) -> None:
    problems = []
    for placement in ("ddp", "fsdp2", "fsdp1"):
        problems += [f"{placement}: {problem}" for problem in evaluate_and_go_on(case, placement)]
    assert_no_problems_on_any_rank(problems)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_evaluation_sees_upstreams_averaged_weights_and_training_goes_on(case: Case, two_ranks: RankPool) -> None:
    two_ranks.run(evaluate_everywhere, case)


def test_evaluation_sees_upstreams_averaged_weights_on_three_ranks(three_ranks: RankPool) -> None:
    three_ranks.run(evaluate_everywhere, CASES[0])


def saved_in_evaluation(case: Case, placement: str) -> list[str]:
    """Swap, save, load into fresh objects, swap back, go on: equal to upstream that swapped and went on."""
    expected = plain_run(copy.deepcopy(case))[-1][0]
    first = place(make_model(case), placement)
    optimizer = build_subject(case, first)
    for step in range(6):
        take_step(case, first, optimizer, step)
        if step in EVALUATED_AFTER:
            optimizer.eval()
            if step < 5:
                optimizer.train()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = place(make_model(case), placement)
    with torch.no_grad():
        for old, new in zip(first.parameters(), second.parameters(), strict=True):
            new.copy_(old)
    resumed = build_subject(case, second)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.train()
    for step in range(6, case.steps):
        take_step(case, second, resumed, step)
    return differences(case, expected, full_parameters(second), "after a life saved in evaluation")


def every_save_in_evaluation(case: Case) -> None:
    assert_no_problems_on_any_rank([*saved_in_evaluation(case, "ddp"), *saved_in_evaluation(case, "fsdp2")])


def test_state_saved_in_evaluation_resumes_training_exactly(two_ranks: RankPool) -> None:
    two_ranks.run(every_save_in_evaluation, CASES[0])


def forward_after_an_evaluation() -> None:
    """FSDP2 leaves its root gathered after a forward pass without backward; the next one must see the swap."""

    def run(is_sharded: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        batch = torch.randn(3, 6)
        if is_sharded:
            mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
            fully_shard(model[0], mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = dist_optim.build_optimizer(model, "schedule_free_adamw", lr=0.1, print_audit=False)
        outputs = []
        for _ in range(3):
            model(batch).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.eval()
            with torch.no_grad():
                outputs.append(model(batch))
            optimizer.train()
            with torch.no_grad():
                outputs.append(model(batch))
        return outputs

    pairs = zip(run(is_sharded=False), run(is_sharded=True), strict=True)
    gaps = [(plain - sharded).abs().max().item() for plain, sharded in pairs]
    assert_no_problems_on_any_rank([f"forward passes differ: {gaps}"] if max(gaps) > 1e-5 else [])


def test_forward_pass_under_fsdp2_sees_the_swapped_weights(two_ranks: RankPool) -> None:
    two_ranks.run(forward_after_an_evaluation)


def forward_on_what_was_left_gathered() -> None:
    with mock.patch.object(FSDPModule, "reshard", lambda self: None):
        forward_after_an_evaluation()


def test_control_a_forward_pass_on_weights_from_before_the_swap_is_noticed(two_ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="forward passes differ"):
        two_ranks.run(forward_on_what_was_left_gathered)


def step_in_evaluation(case: Case) -> str:
    model = place(make_model(case), "ddp")
    optimizer = build_subject(case, model)
    take_step(case, model, optimizer, 0)
    optimizer.eval()
    with pytest.raises(WrongModeError) as caught:
        take_step(case, model, optimizer, 1)
    return str(caught.value)


def test_step_in_evaluation_is_refused_on_every_rank(two_ranks: RankPool) -> None:
    messages = two_ranks.run(step_in_evaluation, CASES[0])
    assert all("Call optimizer.train()" in message for message in messages)


def test_plain_upstream_starts_where_it_cannot_step_and_here_it_starts_in_training() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    with pytest.raises(Exception, match="not in train mode"):
        schedulefree.AdamWScheduleFree([parameter]).step()
    model = nn.Linear(3, 2)
    model(torch.ones(3)).sum().backward()
    dist_optim.build_optimizer(model, "schedule_free_adamw", print_audit=False).step()


def test_fractional_warmup_multiplies_the_rate_in_plain_upstream_and_is_refused_here() -> None:
    parameter = nn.Parameter(torch.ones(3))
    plain = schedulefree.AdamWScheduleFree([parameter], lr=1e-3, warmup_steps=0.1)
    plain.train()
    parameter.grad = torch.ones(3)
    plain.step()
    assert plain.param_groups[0]["scheduled_lr"] == pytest.approx(1e-2)  # ten times the learning rate
    with pytest.raises(HyperparameterError, match="multiply a fraction by the number of training steps"):
        dist_optim.build_optimizer(nn.Linear(3, 2), "schedule_free_adamw", lr=1e-3, warmup_steps=0.1)


def test_first_beta_of_zero_fails_at_evaluation_in_plain_upstream_and_is_refused_here() -> None:
    parameter = nn.Parameter(torch.ones(3))
    plain = schedulefree.AdamWScheduleFree([parameter], betas=(0.0, 0.9))
    plain.train()
    parameter.grad = torch.ones(3)
    plain.step()
    with pytest.raises(ZeroDivisionError):
        plain.eval()
    with pytest.raises(HyperparameterError, match="betas"):
        dist_optim.build_optimizer(nn.Linear(3, 2), "schedule_free_adamw", betas=(0.0, 0.9))


def test_control_counters_that_lag_in_some_rounds_are_noticed(two_ranks: RankPool) -> None:
    one_tensor_a_round = {"bucket_bytes": 1}
    alone = replace(CASES[0], label="control")
    assert any(two_ranks.run(run_with_empty_steps_left_out, alone, "ddp", **one_tensor_a_round))
