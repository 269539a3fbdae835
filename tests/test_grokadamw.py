"""GrokAdamW's hidden state, positions and side effects: shown on plain upstream, and repaired or refused."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from cases.grokadamw import CASES
from parity import Case, build_subject, differences, gradients, make_model, param_groups, set_learning_rates, take_step
from patience import PATIENCE_S
from placements import full_parameters, place
from redeclared import run_on_local_slices, run_with_spec
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dist_optim
from dist_optim.errors import UnsupportedError
from dist_optim.specs.driver import UpstreamDriver
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

grokadamw = pytest.importorskip("grokadamw")


def model_with_gradients() -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    return model


def build(model: nn.Module, **hyperparameters: Any) -> dist_optim.DistributedOptimizer:
    return dist_optim.build_optimizer(model, "grokadamw", lr=1e-2, print_audit=False, **hyperparameters)


def slow_average(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    return optimizer.param_groups[0].get("state", {}).get(parameter, {}).get("grok_ema")


def test_plain_upstream_loses_its_state_on_load_and_here_it_is_kept() -> None:
    first, second = model_with_gradients(), model_with_gradients()
    plain = grokadamw.GrokAdamW(first.parameters())
    plain.step()
    loaded = grokadamw.GrokAdamW(second.parameters())
    loaded.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert slow_average(plain, first.weight) is not None
    assert slow_average(loaded, second.weight) is None  # it is keyed by copies of the first model's parameters

    ours = build(model_with_gradients())
    ours.step()
    saved = ours.state_dict()
    assert set(saved["state"]["weight"]) == {"step", "exp_avg", "exp_avg_sq", "grok_ema"}
    resumed = build(model_with_gradients())
    resumed.load_state_dict(copy.deepcopy(saved))
    assert torch.equal(resumed.state_dict()["state"]["weight"]["grok_ema"], saved["state"]["weight"]["grok_ema"])


def test_state_counts_towards_the_bytes_that_a_rank_holds() -> None:
    optimizer = build(model_with_gradients())
    optimizer.step()
    assert optimizer.optimizer_state_bytes() == 12 * (4 * 3 + 3)


def level_of_root_logger_after(statement: str) -> tuple[int, int]:
    """Handlers and level of the root logger in a fresh process."""
    code = f"import logging; {statement}; root = logging.getLogger(); print(len(root.handlers), root.level)"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    handlers, level = printed.stdout.split()
    return int(handlers), int(level)


def test_importing_plain_upstream_configures_the_root_logger_and_loading_it_here_does_not() -> None:
    assert level_of_root_logger_after("import grokadamw") == (1, logging.INFO)
    assert level_of_root_logger_after("import dist_optim; dist_optim.get_spec('grokadamw').load_class()") == (
        0,
        logging.WARNING,
    )


def test_a_step_warns_of_nothing() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build(model_with_gradients()).step()
    assert [str(warning.message) for warning in caught] == []


def test_signal_functions_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="param_groups"):
        build(nn.Linear(4, 3), grokking_signal_fns=[lambda: 0.5])


def losses_set_in_the_groups(case: Case, placement: str) -> list[str]:
    """The losses appear in the middle of the run, as a training loop reports them."""

    def report(optimizer: torch.optim.Optimizer, step: int) -> None:
        for group in optimizer.param_groups if step >= 3 else ():
            group.update(train_loss=1.0 / step, eval_loss=1.0)

    reference = make_model(case)
    named = dict(reference.named_parameters())
    plain = case.make_reference(param_groups(case, named))
    model = place(make_model(case), placement)
    ours = build_subject(case, model)
    for step in range(case.steps):
        report(plain, step)
        report(ours, step)
        for name, gradient in gradients(case, reference, step).items():
            named[name].grad = gradient
        set_learning_rates(plain, case, step)
        plain.step()
        take_step(case, model, ours, step)
    return differences(case, {n: p.detach() for n, p in named.items()}, full_parameters(model), "with losses")


def every_placement_with_losses(case: Case) -> None:
    problems = [p for placement in ("ddp", "fsdp2") for p in losses_set_in_the_groups(case, placement)]
    assert_no_problems_on_any_rank(problems)


def test_losses_set_in_the_param_groups_are_obeyed(two_ranks: RankPool) -> None:
    two_ranks.run(every_placement_with_losses, CASES[0])


@pytest.mark.parametrize("placement", ["ddp", "fsdp2"])
def test_control_places_that_are_not_told_are_noticed(placement: str, two_ranks: RankPool) -> None:
    assert any(two_ranks.run(run_without_places, CASES[0], placement))


def run_without_places(case: Case, placement: str) -> list[str]:
    driver = dist_optim.get_spec("grokadamw").driver
    blind = type("Blind", (type(driver),), {"counts_places": False})()
    assert isinstance(blind, UpstreamDriver)
    return run_with_spec(case, placement, {"driver": blind})


class Updates(TorchDispatchMode):
    """Counts upstream's last operation on a tensor."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.addcdiv_.default
        return func(*args, **(kwargs or {}))


def count_updates(bucket_bytes: int) -> tuple[int, int]:
    model = place(nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(8))), "ddp")
    optimizer = build(model, bucket_bytes=bucket_bytes)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Updates() as updates:
        optimizer.step()
    return len(optimizer.plan.buckets), updates.count


def test_each_tensor_is_stepped_once_however_many_rounds_there_are(two_ranks: RankPool) -> None:
    for num_rounds, num_updates in two_ranks.run(count_updates, 128):
        assert num_rounds > 2 and num_updates == 4  # of eight tensors, those that this rank owns


def test_control_norms_of_slices_are_noticed(two_ranks: RankPool) -> None:
    assert any(two_ranks.run(run_on_local_slices, CASES[0], "fsdp2"))
