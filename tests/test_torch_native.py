"""torch's fused kernels on slices, and Muon with what it does not step."""

from __future__ import annotations

import pytest
import torch
from cases.torch_native import CASES
from parity import Case
from redeclared import run_on_local_slices, run_with_spec
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dist_optim
from dist_optim.errors import UnsupportedError
from dist_optim.specs.driver import UpstreamDriver
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

FUSED = next(case for case in CASES if case.name == "adamw_torch_fused")
MUON = next(case for case in CASES if case.name == "muon")


def fused_steps(start: Tensor, gradients: list[Tensor]) -> Tensor:
    parameter = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, fused=True)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_fused_kernel_on_a_cpu_rounds_the_tail_of_a_slice_otherwise() -> None:
    """Slices shorter than a SIMD vector are all tail; the same elements of the whole tensor are not."""
    torch.manual_seed(0)
    whole = torch.randn(7 * 512)
    gradients = [torch.randn(7 * 512) for _ in range(5)]
    slices = [slice(start, start + 7) for start in range(0, 7 * 512, 7)]
    apart = torch.cat([fused_steps(whole[part], [gradient[part] for gradient in gradients]) for part in slices])
    gap = (fused_steps(whole, gradients) - apart).abs().max()
    assert 0 < gap <= 1e-6


def fused_on_slices(case: Case) -> list[str]:
    return run_with_spec(case, "fsdp2", {"driver": UpstreamDriver()})


def test_control_fused_kernels_on_slices_are_noticed(two_ranks: RankPool) -> None:
    assert any(two_ranks.run(fused_on_slices, FUSED))


def test_control_orthogonalized_slices_are_noticed(two_ranks: RankPool) -> None:
    assert any(two_ranks.run(run_on_local_slices, MUON, "fsdp2"))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 9)
        self.norm = nn.LayerNorm(9)
        self.head = nn.Linear(9, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.hidden(self.embedding(tokens))))
        return result


def test_muon_names_all_parameters_that_it_cannot_step_and_the_way_out() -> None:
    model = Model()
    with pytest.raises(UnsupportedError, match="3 parameters 'hidden.bias', 'norm.weight', 'norm.bias'") as caught:
        dist_optim.build_optimizer(model, "muon", lr=1e-2, params=list(model.parameters()))
    assert 'rest="adamw_torch"' in str(caught.value)


def test_frozen_vectors_are_refused_by_plain_muon_and_left_alone_here() -> None:
    layer = nn.Linear(4, 3)
    layer.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="only supports 2D"):
        torch.optim.Muon(layer.parameters())
    layer.weight.grad = torch.randn(3, 4)
    bias = layer.bias.clone()
    dist_optim.build_optimizer(layer, "muon", print_audit=False).step()
    assert torch.equal(layer.bias, bias)


def muon_next_to_adamw() -> None:
    """The way out that the refusal names: two optimizers on one sharded model, as a plain run has them."""

    def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        named = dict(model.named_parameters())
        return [named.pop("hidden.weight")], list(named.values())

    def train(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Tensor:
        for step in range(4):
            model(torch.arange(step, step + 5)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        output: Tensor = model(torch.arange(11)).detach()
        return output

    torch.manual_seed(0)
    plain, sharded = Model(), Model()
    sharded.load_state_dict(plain.state_dict())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    matrices, rest = split(plain)
    expected = train(plain, [torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.0)])
    matrices, rest = split(sharded)
    muon = dist_optim.build_optimizer(sharded, "muon", lr=0.1, params=matrices, print_audit=False)
    adamw = dist_optim.build_optimizer(sharded, "adamw_torch", lr=1e-2, params=rest, print_audit=False)
    gap = (train(sharded, [muon, adamw]) - expected).abs().max().item()
    assert_no_problems_on_any_rank([f"outputs differ by {gap}"] if gap > 1e-4 else [])


def test_muon_and_adamw_train_the_parts_of_one_sharded_model(two_ranks: RankPool) -> None:
    two_ranks.run(muon_next_to_adamw)
