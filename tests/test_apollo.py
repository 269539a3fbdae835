"""apollo-torch's pitfalls, shown on plain upstream, and what dist_optim makes of them."""

from __future__ import annotations

import io
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from cases.apollo import CASES, MATRIX, apollo
from parity import Case, run_case
from torch import Tensor, nn

import dist_optim
from dist_optim.errors import HyperparameterError
from dist_optim.optimizers.apollo import ApolloDriver
from dist_optim.testing import RankPool, assert_equal

pytest.importorskip("apollo_torch")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 12)
        self.up = nn.Linear(12, 40)
        self.down = nn.Linear(40, 12, bias=False)


def build(model: nn.Module, name: str = "apollo_adamw", **hyperparameters: Any) -> dist_optim.DistributedOptimizer:
    options = {"lr": 1e-2, "target_modules": "all-linear", "print_audit": False, "rank": 4, "update_proj_gap": 2}
    return dist_optim.build_optimizer(model, name, **{**options, **hyperparameters})


def arranged_as_the_trainer_does(model: Net) -> list[dict[str, Any]]:
    """transformers gives betas and eps to the low-rank group alone; the other group keeps upstream's eps of 1e-6."""
    matrix = {**MATRIX, "rank": 4, "update_proj_gap": 2, "betas": (0.9, 0.999), "eps": 1e-8}
    plain = [model.embedding.weight, model.up.bias]
    return [{"params": plain, "lr": 1e-2}, {"params": [model.up.weight, model.down.weight], **matrix, "lr": 1e-2}]


def take_steps(optimizer: torch.optim.Optimizer, model: nn.Module, num_steps: int = 5, scale: float = 1e-4) -> None:
    """Small gradients: the difference between the two eps is then far above rounding."""
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_unset_values_are_those_of_the_trainer_in_both_kinds_of_groups() -> None:
    reference, subject = Net(), Net()
    upstream, optimizer = apollo(arranged_as_the_trainer_does(reference)), build(subject)
    take_steps(upstream, reference)
    take_steps(optimizer, subject)
    assert_equal(dict(subject.named_parameters()), dict(reference.named_parameters()))
    assert [group["eps"] for group in optimizer.param_groups] == [1e-6, 1e-8]


def test_a_given_eps_is_for_all_groups() -> None:
    assert [group["eps"] for group in build(Net(), eps=1e-5).param_groups] == [1e-5, 1e-5]


def test_a_class_has_its_own_constructors_defaults() -> None:
    from apollo_torch import APOLLOAdamW

    model = Net()
    optimizer = dist_optim.build_optimizer(model, APOLLOAdamW, target_modules="all-linear", print_audit=False)
    assert [group["eps"] for group in optimizer.param_groups] == [1e-6, 1e-6]


def test_mini_is_apollo_at_rank_one_with_one_factor_a_matrix() -> None:
    mini, long_hand = Net(), Net()
    take_steps(build(mini, "apollo_mini", rank=1), mini)
    take_steps(build(long_hand, rank=1, scale_type="tensor", scale=128), long_hand)
    assert_equal(dict(mini.named_parameters()), dict(long_hand.named_parameters()))
    defaults = {record.name: record.default for record in dist_optim.get_spec("apollo_mini").records()}
    assert (defaults["rank"], defaults["scale_type"], defaults["scale"]) == (1, "tensor", 128.0)


def test_seeds_are_positions_and_are_there_before_the_first_step() -> None:
    """Upstream counts every parameter of every group from 1, trained or not."""
    model = Net()
    model.embedding.weight.requires_grad_(False)
    state = build(model).state_dict()["state"]
    assert {name: own["seed"] for name, own in state.items()} == {"up.bias": 2, "up.weight": 3, "down.weight": 4}


def without_ghosts(
    driver: ApolloDriver, optimizer_class: type[Any], param_groups: list[dict[str, Any]], arguments: dict[str, Any]
) -> torch.optim.Optimizer:
    owned = [{**group, "params": [p for p in group["params"] if p.numel() > 0]} for group in param_groups]
    optimizer: torch.optim.Optimizer = optimizer_class(owned, **arguments)
    return optimizer


def run_without_ghosts(case: Case, placement: str) -> list[str]:
    with mock.patch.object(ApolloDriver, "construct", without_ghosts):
        return run_case(case, placement)


@pytest.mark.parametrize("placement", ["ddp", "fsdp2"])
def test_parity_notices_missing_ghosts(placement: str, two_ranks: RankPool) -> None:
    """Without empty parameters in the places of the other ranks' tensors, seeds are positions among the owned ones."""
    assert any(two_ranks.run(run_without_ghosts, CASES[0], placement))


@pytest.mark.parametrize("proj", ["random", "svd"])
def test_state_loads_as_plain_tensors_where_upstreams_does_not(proj: str) -> None:
    reference, subject = Net(), Net()
    groups = arranged_as_the_trainer_does(reference)
    groups[1]["proj"] = proj
    upstream, optimizer = apollo(groups), build(subject, proj=proj)
    take_steps(upstream, reference)
    take_steps(optimizer, subject)
    with pytest.raises(Exception, match="weights_only|Weights only"):
        reloaded(upstream.state_dict())
    saved = reloaded(optimizer.state_dict())
    own = saved["state"]["up.weight"]
    assert all(isinstance(value, (Tensor, int, float, str, bool)) for value in own.values())

    resumed_model = Net()
    resumed_model.load_state_dict(subject.state_dict())
    resumed = build(resumed_model, proj=proj)
    resumed.load_state_dict(saved)
    take_steps(optimizer, subject)
    take_steps(resumed, resumed_model)
    assert_equal(dict(resumed_model.named_parameters()), dict(subject.named_parameters()))


def reloaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_svd_projector_holds_its_own_rows_only() -> None:
    reference, subject = Net(), Net()
    groups = arranged_as_the_trainer_does(reference)
    groups[1]["proj"] = "svd"
    upstream, optimizer = apollo(groups), build(subject, proj="svd")
    take_steps(upstream, reference, 1)
    take_steps(optimizer, subject, 1)
    basis = upstream.state[reference.up.weight]["projector"].ortho_matrix
    assert basis.untyped_storage().nbytes() == 4 * 12 * 12 and basis.nbytes == 4 * 4 * 12
    kept = optimizer.state_dict()["state"]["up.weight"]["projector.ortho_matrix"]
    assert kept.untyped_storage().nbytes() == kept.nbytes == basis.nbytes


def test_projections_are_refused_exactly_where_upstream_fails() -> None:
    driver = dist_optim.get_spec("apollo_adamw").driver
    kinds = itertools.product(("random", "svd"), ("std", "reverse_std", "left", "right"), ("channel", "tensor"))
    for (proj, proj_type, scale_type), shape, rank in itertools.product(
        kinds, ((5, 9), (9, 5), (6, 6)), (1, 3, 5, 6, 9, 12)
    ):
        values = {**MATRIX, "rank": rank, "proj": proj, "proj_type": proj_type, "scale_type": scale_type}
        refused = driver.why_refused(torch.Size(shape), torch.float32, torch.device("cpu"), values) != ""
        assert refused == fails(shape, values), (shape, values)


def fails(shape: tuple[int, int], values: dict[str, Any]) -> bool:
    model = nn.Linear(shape[1], shape[0], bias=False)
    try:
        take_steps(apollo([{"params": [model.weight], **values}]), model, 2)
    except RuntimeError:
        return True
    return False


def test_projection_of_both_sides_fails_upstream_and_is_refused() -> None:
    for proj, error in (("random", NotImplementedError), ("svd", AttributeError)):
        model = nn.Linear(5, 9, bias=False)
        values = {**MATRIX, "proj": proj, "proj_type": "full", "scale_type": "tensor"}
        with pytest.raises(error):
            take_steps(apollo([{"params": [model.weight], **values}]), model, 2)
    with pytest.raises(HyperparameterError, match="proj_type is str in"):
        build(Net(), proj_type="full")


@pytest.mark.parametrize("name", ["apollo_adamw", "apollo_mini", "apollo_adamw_layerwise"])
def test_licence_says_that_it_is_non_commercial(name: str) -> None:
    assert "non-commercial" in dist_optim.get_spec(name).licence
