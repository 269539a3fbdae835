"""galore-torch's defects, shown on plain upstream, and what dist_optim makes of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from cases.galore import CASES, galore_adafactor, galore_adamw, galore_adamw_8bit
from parity import Case, run_case
from torch import Tensor, nn

import dist_optim
from dist_optim.errors import HyperparameterError, UnsupportedError
from dist_optim.optimizers.galore import GaLoreAdamW8bitDriver, GaLoreDriver
from dist_optim.testing import RankPool, assert_equal

pytest.importorskip("galore_torch")

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens where torch has no CUDA")
MATRIX: dict[str, Any] = {"rank": 8, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std"}


def linear(rows: int = 96, columns: int = 64, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=False).to(dtype)


def gradient(parameter: Tensor, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def build(model: nn.Module, name: str, **hyperparameters: Any) -> dist_optim.DistributedOptimizer:
    options: dict[str, Any] = {"lr": 1e-2, "target_modules": "all-linear", "print_audit": False}
    return dist_optim.build_optimizer(model, name, **{**options, **MATRIX, **hyperparameters})


def take_steps(optimizer: torch.optim.Optimizer, parameter: Tensor, num_steps: int = 3) -> Tensor:
    for step in range(num_steps):
        parameter.grad = gradient(parameter, step)
        optimizer.step()
    return parameter.detach().clone()


def plain_8bit(parameter: Tensor) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW8bit

    return GaLoreAdamW8bit([{"params": [parameter], **MATRIX}], lr=1e-2, weight_decay=0.0)


# 8-bit ----------------------------------------------------------------------------------------------------------------


def test_small_matrices_never_move_in_plain_8bit_galore_and_do_here() -> None:
    plain, ours = linear().weight, linear()
    start = plain.detach().clone()
    with mock.patch("torch.cuda.synchronize"):
        assert_equal(take_steps(plain_8bit(plain), plain), start, "bitsandbytes no longer shifts the arguments")
    moved = take_steps(build(ours, "galore_adamw_8bit", weight_decay=0.0), ours.weight)
    assert (moved - start).abs().max() > 1e-3


@without_cuda
def test_8bit_galore_needs_cuda_to_wait_for_and_ours_does_not() -> None:
    ours = linear()
    synchronize = torch.cuda.synchronize
    take_steps(build(ours, "galore_adamw_8bit"), ours.weight)
    assert torch.cuda.synchronize is synchronize
    plain = linear().weight
    with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):  # nothing of the repair has leaked
        take_steps(plain_8bit(plain), plain)


def test_8bit_galore_leaves_storage_and_gradient_of_the_user_alone() -> None:
    plain, ours = linear().weight, linear()
    before = plain.data_ptr()
    with mock.patch("torch.cuda.synchronize"):
        take_steps(plain_8bit(plain), plain, 1)
    assert plain.data_ptr() != before
    assert plain.grad is not None and plain.grad.shape == (96, 8)

    before = ours.weight.data_ptr()
    take_steps(build(ours, "galore_adamw_8bit"), ours.weight, 1)
    assert ours.weight.data_ptr() == before
    assert_equal(ours.weight.grad, gradient(ours.weight))


def test_8bit_galore_keeps_no_copy_of_the_weights_between_steps() -> None:
    plain, ours = linear().weight, linear()
    with mock.patch("torch.cuda.synchronize"):
        take_steps(plain_8bit(plain), plain, 1)
    assert plain.saved_data.shape == plain.shape  # type: ignore[attr-defined]

    optimizer = build(ours, "galore_adamw_8bit")
    take_steps(optimizer, ours.weight, 1)
    shadows = [shadow for instance in optimizer.holdings.instances for shadow in instance.shadows.values()]
    assert shadows and not any(hasattr(shadow, "saved_data") for shadow in shadows)


def test_weight_decay_of_8bit_galore_survives_a_step_that_fails() -> None:
    plain, ours = linear().weight, linear()
    upstream = galore_adamw_8bit([{"params": [plain], **MATRIX, "weight_decay": 0.1}])
    optimizer = build(ours, "galore_adamw_8bit", weight_decay=0.1)
    for stepped, parameter in ((upstream, plain), (optimizer, ours.weight)):
        parameter.grad = torch.full_like(parameter, torch.nan)
        with pytest.raises(torch.linalg.LinAlgError):
            stepped.step()
    assert upstream.param_groups[0]["weight_decay"] == 0
    (instance,) = optimizer.holdings.instances
    assert instance.optimizer.param_groups[0]["weight_decay"] == 0.1
    assert "weight_decay_saved" not in instance.optimizer.param_groups[0]


def test_unknown_arguments_of_bitsandbytes_are_refused() -> None:
    from galore_torch import GaLoreAdamW8bit

    class OtherShift(GaLoreAdamW8bit):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.args.max_unorm = True

    with pytest.raises(UnsupportedError, match="max_unorm=True"):
        GaLoreAdamW8bitDriver().construct(OtherShift, [{"params": [linear().weight]}], {})


# Sides ----------------------------------------------------------------------------------------------------------------


def test_side_is_chosen_by_the_shape_that_upstream_sees() -> None:
    """A tall matrix is projected to the right; half of its rows are a wide matrix, which is projected to the left."""
    whole = linear(48, 40).weight
    halves = [nn.Parameter(part.clone()) for part in whole.detach().chunk(2)]
    for parameters in ([whole], halves):
        upstream = galore_adamw([{"params": parameters, **MATRIX, "lr": 1e-2}])
        for parameter, part in zip(parameters, gradient(whole).chunk(len(parameters)), strict=True):
            parameter.grad = part
        upstream.step()
    assert upstream.state[halves[0]]["projector"].ortho_matrix.shape == (24, 8)
    assert (torch.cat(tuple(halves)) - whole).abs().max() > 1e-4


def project_shards(case: Case) -> list[str]:
    """The parity body with upstream run on each rank's rows, which are then what the side is chosen by."""
    with mock.patch.object(GaLoreDriver, "runs_on_slices", lambda *_: True):
        return run_case(case, "fsdp2")


def test_parity_notices_sides_chosen_by_shards(two_ranks: RankPool) -> None:
    # Two halves of 48 x 40 are wide; nothing else is in the model, so only the side can differ.
    case = replace(CASES[0], linear=((48, 40),), extra=(), frozen=(), without_gradient=())
    assert all(two_ranks.run(project_shards, case))


# Projectors -----------------------------------------------------------------------------------------------------------


def plain_bytes(state: dict[str, Any]) -> tuple[int, int]:
    """Bytes that plain upstream's state keeps alive, and bytes of its elements."""
    projector = state["projector"].ortho_matrix
    tensors = [value for value in (*state.values(), projector) if isinstance(value, Tensor)]
    return sum(t.untyped_storage().nbytes() for t in tensors), sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("shape", [(256, 256), (256, 192), (192, 256)])
def test_projector_holds_its_own_rows_and_not_the_whole_svd_factor(shape: tuple[int, int]) -> None:
    plain, ours = linear(*shape).weight, linear(*shape)
    upstream = galore_adamw([{"params": [plain], **MATRIX, "lr": 1e-2}])
    optimizer = build(ours, "galore_adamw")
    assert_equal(take_steps(optimizer, ours.weight), take_steps(upstream, plain))
    alive, needed = plain_bytes(upstream.state[plain])
    short, long = min(shape), max(shape)
    assert needed == 4 * 8 * (2 * long + short)
    # Upstream's view keeps all of a short x short factor (of a wide matrix: short x short as well, from U).
    assert alive - needed == 4 * short * (short - 8)
    assert optimizer.optimizer_state_bytes() == needed


def test_state_loads_as_plain_tensors_where_upstreams_does_not() -> None:
    plain, ours = linear().weight, linear()
    upstream, optimizer = galore_adamw([{"params": [plain], **MATRIX}]), build(ours, "galore_adamw")
    for stepped, parameter in ((upstream, plain), (optimizer, ours.weight)):
        take_steps(stepped, parameter, 1)
    with pytest.raises(Exception, match="weights_only|Weights only"):
        reloaded(upstream.state_dict())
    assert reloaded(optimizer.state_dict())["state"]["weight"]["projector.ortho_matrix"].shape == (8, 64)


def reloaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_fp32_state_of_bf16_parameters_is_not_rounded_by_loading() -> None:
    """torch's ``load_state_dict`` casts state to the dtype of the parameter."""
    plain, ours = linear(dtype=torch.bfloat16).weight, linear(dtype=torch.bfloat16)
    groups = [{"params": [plain], **MATRIX, "lr": 1e-2}]
    upstream = galore_adafactor(groups)
    take_steps(upstream, plain)
    assert upstream.state[plain]["exp_avg_sq_row"].dtype is torch.float32
    upstream.load_state_dict(upstream.state_dict())
    assert upstream.state[plain]["exp_avg_sq_row"].dtype is torch.bfloat16

    optimizer = build(ours, "galore_adafactor")
    take_steps(optimizer, ours.weight)
    saved = reloaded(optimizer.state_dict())
    resumed = build(ours, "galore_adafactor")
    resumed.load_state_dict(saved)
    assert saved["state"]["weight"]["exp_avg_sq_row"].dtype is torch.float32
    for key, value in resumed.state_dict()["state"]["weight"].items():
        if isinstance(value, Tensor):
            assert_equal(value, saved["state"]["weight"][key], key)


# Arguments ------------------------------------------------------------------------------------------------------------


def test_relative_step_of_galore_adafactor_equals_upstream() -> None:
    from galore_torch import GaLoreAdafactor

    plain, ours = linear().weight, linear()
    relative = {"lr": None, "relative_step": True, "scale_parameter": True, "warmup_init": True}
    upstream = GaLoreAdafactor([{"params": [plain], **MATRIX}], **relative)
    optimizer = build(ours, "galore_adafactor", **relative)
    assert_equal(take_steps(optimizer, ours.weight), take_steps(upstream, plain))


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({"relative_step": True}, HyperparameterError, "relative_step"),
        ({"lr": None}, UnsupportedError, "Give lr, or set relative_step=True"),
        ({"warmup_init": True}, HyperparameterError, "warmup_init"),
        ({"clip_threshold": 0.0}, HyperparameterError, "clip_threshold is float > 0"),
    ],
)
def test_rates_that_exclude_each_other_are_refused(values: dict[str, Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        build(linear(), "galore_adafactor", **values)


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adafactor", "galore_adamw_8bit"])
def test_only_matrices_are_projected(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match="takes matrices, but this parameter has 4 dimensions"):
        build(model, name, target_modules=None, params=[{"params": list(model.parameters()), "rank": 2}])


def test_reverse_std_is_refused_exactly_where_upstream_fails() -> None:
    driver = dist_optim.get_spec("galore_adamw").driver
    for shape in ((4, 9), (9, 4), (6, 6)):
        for rank in (1, 3, 4, 5, 6, 9):
            values = {**MATRIX, "rank": rank, "proj_type": "reverse_std"}
            refused = driver.why_refused(torch.Size(shape), torch.float32, torch.device("cpu"), values) != ""
            assert refused == fails(galore_adamw, shape, values), (shape, rank)


def fails(make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], shape: tuple[int, int], values: Any) -> bool:
    parameter = linear(*shape).weight
    try:
        take_steps(make([{"params": [parameter], **values}]), parameter)
    except RuntimeError:
        return True
    return False
