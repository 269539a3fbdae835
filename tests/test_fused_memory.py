"""How many gradients exist at once, and how much is called in backward, with updates inside backward and without."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from placements import place
from torch import Tensor, nn

import dist_optim
from dist_optim.inside_backward.handle import FusedBackward
from dist_optim.layouts.detect import local_of
from dist_optim.testing import RankPool

NUM_MATRICES = 16
SIZE = 1024
MATRIX_BYTES = 4 * SIZE * SIZE
ALL_BYTES = NUM_MATRICES * MATRIX_BYTES
M_MMAP_THRESHOLD = -3
PLACEMENTS = ("one process", "ddp", "fsdp2 units")


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(NUM_MATRICES)))


def peaks(placement: str, name: str) -> tuple[int, int]:
    """Of a warm step, while gradients come: bytes of gradients on this rank, and growth of the process's memory."""
    give_memory_back()
    model = make_net() if placement == "one process" else place(make_net(), placement)
    optimizer = dist_optim.build_optimizer(model, name, lr=1e-6, bucket_bytes=MATRIX_BYTES, print_audit=False)
    fused = optimizer.inside_backward
    assert (fused is not None) == (name != "sgd")
    parameters = list(model.parameters())
    gradient_bytes, resident = [0], [0]

    def look(parameter: Tensor) -> None:
        """Called when the gradient is there, before it is applied: hooks run in the order of registration."""
        stored = sum(local_of(p.grad).nbytes for p in parameters if p.grad is not None)
        gradient_bytes.append(stored + (fused.held_bytes() if isinstance(fused, FusedBackward) else 0))
        resident.append(resident_bytes())

    def step() -> None:
        model(torch.ones(2, SIZE)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    for parameter in parameters:
        hooks = dict(parameter._post_accumulate_grad_hooks or {})
        for handle in hooks:
            del parameter._post_accumulate_grad_hooks[handle]
        parameter.register_post_accumulate_grad_hook(look)
        parameter._post_accumulate_grad_hooks.update(hooks)  # ours looks first
    give_memory_back()
    before = resident_bytes()
    step()
    return max(gradient_bytes), max(resident) - before


def peaks_of_both(placement: str) -> tuple[tuple[int, int], tuple[int, int]]:
    return peaks(placement, "sgd"), peaks(placement, "lomo")


def give_memory_back() -> None:
    """And let every large tensor be mapped by itself from here on, so that freeing it shows."""
    gc.collect()
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
    libc.malloc_trim(0)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_at_most_two_gradients_exist_at_once(placement: str, one_rank: RankPool, two_ranks: RankPool) -> None:
    pool = one_rank if placement == "one process" else two_ranks
    for (stored, grown), (fused, fused_grown) in pool.run(peaks_of_both, placement):
        print(f"{placement}: gradients {stored / 1e6:.1f} -> {fused / 1e6:.1f} MB, memory {grown / 1e6:.0f} -> "
              f"{fused_grown / 1e6:.0f} MB")  # fmt: skip
        share = 2 if placement.startswith("fsdp2") else 1  # of a gradient that this rank keeps
        assert stored == ALL_BYTES / share
        assert 0 < fused <= 2 * 1.001 * MATRIX_BYTES / share
        assert fused_grown < 0.6 * grown


def calls_of_backward(num_tensors: int, install: Callable[[nn.Module], Callable[[Tensor], None]]) -> int:
    """Functions called, in Python and from it, by a warm backward pass with updates, over so many 16 x 16 matrices."""
    net = nn.ParameterList(nn.Parameter(torch.randn(16, 16)) for _ in range(num_tensors))
    backward = install(net)
    counted = 0

    def count(_: FrameType, event: str, __: Any) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    for profile in (None, count):
        loss = torch.stack([p.sum() for p in net]).sum()
        gc.collect()
        gc.disable()  # what it would finalize here is not of this pass
        sys.setprofile(profile)
        try:
            backward(loss)
        finally:
            sys.setprofile(None)
            gc.enable()
    return counted


def ours(name: str) -> Callable[[nn.Module], Callable[[Tensor], None]]:
    def install(net: nn.Module) -> Callable[[Tensor], None]:
        optimizer = dist_optim.build_optimizer(net, name, lr=1e-6, print_audit=False)

        def backward(loss: Tensor) -> None:
            loss.backward()
            optimizer.step()

        return backward

    return install


def upstreams(name: str) -> Callable[[nn.Module], Callable[[Tensor], None]]:
    lomo_optim = pytest.importorskip("lomo_optim")

    def install(net: nn.Module) -> Callable[[Tensor], None]:
        with mock.patch.object(Tensor, "cuda", lambda tensor: tensor):
            optimizer = getattr(lomo_optim, name)(net)
        return lambda loss: optimizer.fused_backward(loss, 1e-6)

    return install


@pytest.mark.parametrize(("name", "upstream"), [("lomo", "Lomo"), ("adalomo", "AdaLomo")])
def test_work_grows_with_the_number_of_tensors_and_not_with_its_square(name: str, upstream: str) -> None:
    """Four times the tensors make four times the calls; upstream makes 16 times as many in the end."""
    few, many = (calls_of_backward(count, ours(name)) for count in (50, 200))
    theirs_few, theirs_many = (calls_of_backward(count, upstreams(upstream)) for count in (50, 200))
    print(f"{name}: {few} -> {many} calls, upstream {theirs_few} -> {theirs_many}")
    assert 50 < few < many <= 4 * few
    assert theirs_many > 2 * 4 * theirs_few, "lomo-optim no longer walks all parameters in each hook: say so"
