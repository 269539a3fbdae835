"""What a rank holds: its share of the state, and in a step no more full tensors than the rounds in flight need."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from placements import inject, place
from torch import Tensor, nn

import dist_optim
from dist_optim.stepping.upstream_instance import UpstreamInstance
from dist_optim.testing import RankPool

NUM_MATRICES = 24
SHAPE = (96, 64)
MATRIX_BYTES = 4 * SHAPE[0] * SHAPE[1]
SHAPES = (SHAPE, SHAPE[::-1]) * (NUM_MATRICES // 2)
LOW_RANK = {"target_modules": "all-linear", "rank": 8}


def make_net() -> nn.Module:
    """Matrices alone: under FSDP1 biases follow their unit's last rank, which shows in models as small as this one."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(cols, rows, bias=False) for rows, cols in SHAPES))


def build_and_step(placement: str, name: str, **options: Any) -> dist_optim.DistributedOptimizer:
    model = place(make_net(), placement)
    optimizer = dist_optim.build_optimizer(model, name, lr=1e-3, print_audit=False, **options)
    inject(model, {name: torch.randn(p.shape) for name, p in make_net().named_parameters()})
    optimizer.step()
    return optimizer


def state_bytes(placement: str, name: str, options: dict[str, Any]) -> int:
    return build_and_step(placement, name, **options).optimizer_state_bytes()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("galore_adamw", LOW_RANK),
        ("apollo_adamw", LOW_RANK),
        ("adafactor", {}),
        ("adamw_torch", {}),
        ("stable_adamw", {}),
    ],
)
@pytest.mark.parametrize(
    ("placement", "pool"),
    [
        *((placement, pool) for placement in ("ddp", "fsdp2", "fsdp1") for pool in ("two_ranks", "four_ranks")),
        ("hsdp", "four_ranks"),
        ("fsdp1 hybrid", "four_ranks"),
    ],
)
def test_state_of_every_rank_is_its_share(
    name: str, options: dict[str, Any], placement: str, pool: str, one_rank: RankPool, request: pytest.FixtureRequest
) -> None:
    (total,) = one_rank.run(state_bytes, "none", name, options)
    held = request.getfixturevalue(pool).run(state_bytes, placement, name, options)
    assert sum(held) >= total > 0
    # Replicas share what is stepped whole; what is stepped on slices, each of the two has.
    is_halved = placement in ("hsdp", "fsdp1 hybrid") and name == "adamw_torch"
    assert max(held) <= 1.1 * total / (2 if is_halved else len(held))


def peak_of_full_tensors() -> tuple[int, int, int]:
    """Bytes of full parameters and gradients that exist at once, at most in a step, and after it; and what is kept."""
    held: list[int] = []
    upstream_step = UpstreamInstance.step

    def step(self: UpstreamInstance, parameters: Any, gradients: Any, present: Any, closure: Any = None) -> Any:
        shown = [tensor for field in (parameters, gradients) for tensor in field.values()]
        others = [shadow for other in created if other is not self for shadow in matrices(other)]
        held.append(bytes_of([*shown, *others]))
        return upstream_step(self, parameters, gradients, present, closure)

    created: list[UpstreamInstance] = []
    upstream_init = UpstreamInstance.__init__

    def init(self: UpstreamInstance, *arguments: Any) -> None:
        created.append(self)
        upstream_init(self, *arguments)

    with mock.patch.object(UpstreamInstance, "step", step), mock.patch.object(UpstreamInstance, "__init__", init):
        options = {**LOW_RANK, "bucket_bytes": 2 * MATRIX_BYTES}
        optimizer = build_and_step("fsdp2", "galore_adamw", **options)
    for _ in range(3):
        optimizer.step()
    kept = [block for blocks in optimizer.training_step._memory._free.values() for block in blocks]
    after = bytes_of([shadow for one in optimizer.holdings.instances for shadow in matrices(one)])
    return max(held), after, bytes_of(kept)


def matrices(instance: UpstreamInstance) -> list[Tensor]:
    return [shadow for shadow in instance.shadows.values() if shadow.ndim == 2]


def bytes_of(tensors: list[Tensor]) -> int:
    """Of their storage, which several may share."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_a_step_holds_no_more_than_the_rounds_in_flight(two_ranks: RankPool) -> None:
    for peak, after, kept in two_ranks.run(peak_of_full_tensors):
        # A round is two matrices an owner, each with its gradient; two are full at the same time.
        assert 0 < peak <= 2 * 2 * 2 * MATRIX_BYTES
        assert after < MATRIX_BYTES / 10
        # For the next step: what three rounds in flight take. So small parts are packed: for each field half a round
        # goes and comes, and on the way back once more.
        assert MATRIX_BYTES <= kept <= 3 * (2 * 2 + 2 * 2 + 2) * MATRIX_BYTES
