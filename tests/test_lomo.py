"""LOMO and AdaLomo as ordinary optimizers: what the parity cases do not ask."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dist_optim
from dist_optim.errors import UnsupportedError


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def build(name: str, net: nn.Module, **options: object) -> dist_optim.DistributedOptimizer:
    return dist_optim.build_optimizer(net, name, print_audit=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_gradients_are_left_as_they_are(name: str) -> None:
    net = model()
    optimizer = build(name, net, lr=0.1, clip_grad_value=1e-3, clip_grad_norm=1e-3, fused_backward=False)
    net(torch.ones(4, 6)).sum().backward()
    before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    optimizer.step()
    assert all(torch.equal(p.grad, old) for p, old in zip(net.parameters(), before, strict=True) if p.grad is not None)


@pytest.mark.parametrize("upstream", ["Lomo", "AdaLomo"])
def test_upstreams_class_means_our_optimizer(upstream: str) -> None:
    lomo_optim = pytest.importorskip("lomo_optim")
    optimizer = dist_optim.build_optimizer(model(), getattr(lomo_optim, upstream), lr=0.1, print_audit=False)
    assert optimizer.spec.name == upstream.lower()


def test_adalomo_refuses_tensors_that_it_does_not_factor() -> None:
    with pytest.raises(UnsupportedError, match=r"adalomo, parameter 'weight': .*4 dimensions.*use adafactor"):
        build("adalomo", nn.Conv2d(2, 2, 3), lr=0.1)


def test_adalomo_refuses_a_loss_scale_that_rounds() -> None:
    with pytest.raises(UnsupportedError, match="loss_scale=1000 is not a power of two"):
        build("adalomo", model(), lr=0.1, loss_scale=1000.0)
