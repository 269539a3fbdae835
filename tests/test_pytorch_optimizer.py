"""What is special about the optimizers of pytorch-optimizer: names, rates, and what is refused."""

from __future__ import annotations

import pytest
from end_to_end import make_llama
from placements import place

import dist_optim
from dist_optim.errors import HyperparameterError, UnsupportedError
from dist_optim.testing import RankPool


def names_in_groups(placement: str) -> list[str]:
    model = place(make_llama(), placement)
    optimizer = dist_optim.build_optimizer(model, "adam_mini", lr=1e-2, num_embeds=33, num_heads=11, print_audit=False)
    listed = [names for names in optimizer.holdings.names_by_group()]
    assert [[group["name"]] for group in optimizer.param_groups] == listed
    return [group["name"] for group in optimizer.param_groups]


def test_adam_mini_goes_by_logical_names_under_every_engine(two_ranks: RankPool) -> None:
    plain = [name for name, _ in make_llama().named_parameters()]
    for placement in ("ddp", "fsdp1", "fsdp2 units"):
        assert two_ranks.run(names_in_groups, placement) == [plain, plain]


def test_adam_mini_says_which_tensor_its_heads_do_not_divide() -> None:
    with pytest.raises(UnsupportedError, match="[qk]_proj.weight.*num_heads = 131072 elements"):
        dist_optim.build_optimizer(make_llama(), "adam_mini", lr=1e-2, print_audit=False)


def test_mars_is_not_built_with_a_rate_of_zero() -> None:
    with pytest.raises(HyperparameterError, match="mars: lr=0 cannot be built with"):
        dist_optim.build_optimizer(make_llama(), "mars", lr=0.0, print_audit=False)
