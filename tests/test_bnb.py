"""bitsandbytes: whole tensors decide, embeddings keep 32 bits, and overrides of other models stay out."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from cases.bnb import CASES
from parity import Case, place, run_case
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import dist_optim
from dist_optim import Trait
from dist_optim.errors import HyperparameterError, UnsupportedError
from dist_optim.specs import registry
from dist_optim.testing import RankPool, assert_equal, assert_no_problems_on_any_rank

bitsandbytes = pytest.importorskip("bitsandbytes")


class Net(nn.Module):
    """Both weights have more than 4096 elements; half of the linear's, on one of two ranks, has fewer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(110, 64)
        self.linear = nn.Linear(64, 80)


@pytest.fixture(autouse=True)
def _own_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes has one manager of overrides for the process: every test gets a fresh one."""
    monkeypatch.setattr(bitsandbytes.optim.GlobalOptimManager, "_instance", None)


def build(model: nn.Module, name: Any = "adamw_bnb_8bit", **options: Any) -> dist_optim.DistributedOptimizer:
    return dist_optim.build_optimizer(model, name, **{"lr": 1e-2, "print_audit": False, **options})


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def take_steps(optimizer: torch.optim.Optimizer, model: nn.Module, num_steps: int = 4) -> dict[str, Tensor]:
    for step in range(num_steps):
        for parameter, full in zip(model.parameters(), gradients(model, step).values(), strict=True):
            if isinstance(parameter, DTensor):
                full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = full
        optimizer.step()
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def as_the_trainer_does(model: Net) -> torch.optim.Optimizer:
    optimizer = bitsandbytes.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, optim_bits=8)
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.register_module_override(model.embedding, "weight", {"optim_bits": 32})
    return optimizer


def state_dtypes(optimizer: dist_optim.DistributedOptimizer) -> dict[str, torch.dtype]:
    return {name: own["state1"].dtype for name, own in optimizer.state_dict()["state"].items()}


def test_halves_of_a_tensor_are_not_quantized_as_the_whole_is() -> None:
    """Why tensors are stepped whole: 80 x 64 elements are quantized, 40 x 64 are fewer than 4096 and are not."""
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(80, 64))
    halves = [nn.Parameter(whole.detach()[:40].clone()), nn.Parameter(whole.detach()[40:].clone())]
    ours = nn.Linear(64, 80, bias=False)
    ours.weight.data.copy_(whole.detach())
    for parameters in ([whole], halves, [ours.weight]):
        is_ours = parameters[0] is ours.weight
        optimizer = build(ours) if is_ours else bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, weight_decay=0.0)
        for step in range(4):
            full = torch.randn(80, 64, generator=torch.Generator().manual_seed(step))
            for parameter, part in zip(parameters, full.chunk(len(parameters)), strict=True):
                parameter.grad = part
            optimizer.step()
    assert (torch.cat(tuple(halves)) - whole).abs().max() > 1e-4
    assert_equal(ours.weight.detach(), whole.detach())


def stepped_on_shards(case: Case) -> list[str]:
    """The parity body with the family declared elementwise: each rank quantizes its own rows."""
    spec = dist_optim.get_spec(case.name)
    with mock.patch.dict(registry._specs, {case.name: replace(spec, traits=frozenset({Trait.ELEMENTWISE}))}):
        return run_case(case, "fsdp2")


@pytest.mark.parametrize("case", CASES[:1], ids=str)
def test_parity_notices_sizes_and_blocks_of_shards(case: Case, two_ranks: RankPool) -> None:
    assert all(two_ranks.run(stepped_on_shards, case))


# Embeddings -----------------------------------------------------------------------------------------------------------


def equals_the_trainers(placement: str) -> None:
    reference = Net()
    expected = take_steps(as_the_trainer_does(reference), reference)
    model = place(Net(), placement)
    actual = take_steps(build(model), model)
    names = [name for name in expected if not torch.equal(expected[name], actual[name])]
    assert_no_problems_on_any_rank([f"{placement}: {name} differs" for name in names])


@pytest.mark.parametrize("placement", ["ddp", "fsdp2"])
def test_embeddings_keep_32_bits_as_under_the_trainer(placement: str, two_ranks: RankPool) -> None:
    two_ranks.run(equals_the_trainers, placement)


def test_only_unset_bits_differ_for_embeddings() -> None:
    model = Net()
    optimizer = build(model)
    take_steps(optimizer, model, 1)
    assert state_dtypes(optimizer) == {
        "embedding.weight": torch.float32,
        "linear.weight": torch.uint8,
        "linear.bias": torch.float32,
    }
    assert [group.get("optim_bits") for group in optimizer.param_groups] == [None, 32]


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "lion_8bit"])
def test_given_bits_are_for_all_and_equal_plain_bitsandbytes(name: str) -> None:
    reference, subject = Net(), Net()
    upstream_class = {"adamw_bnb_8bit": "AdamW8bit", "lion_8bit": "Lion8bit"}[name]
    upstream = getattr(bitsandbytes.optim, upstream_class)(
        reference.parameters(), lr=1e-2, weight_decay=0.0, betas=(0.9, 0.999)
    )
    optimizer = build(subject, name, optim_bits=8)
    assert_equal(take_steps(optimizer, subject), take_steps(upstream, reference))
    assert state_dtypes(optimizer)["embedding.weight"] is torch.uint8


def test_a_groups_own_bits_win() -> None:
    model = Net()
    groups = [
        {"params": [model.embedding.weight], "optim_bits": 8},
        {"params": list(model.linear.parameters()), "optim_bits": 32},
    ]
    optimizer = build(model, params=groups)
    take_steps(optimizer, model, 1)
    assert state_dtypes(optimizer)["embedding.weight"] is torch.uint8
    assert state_dtypes(optimizer)["linear.weight"] is torch.float32


def test_a_class_has_its_own_constructors_defaults() -> None:
    reference, subject = Net(), Net()
    upstream = bitsandbytes.optim.AdamW(reference.parameters(), lr=1e-2, optim_bits=8)
    optimizer = build(subject, bitsandbytes.optim.AdamW, optim_bits=8)
    assert_equal(take_steps(optimizer, subject), take_steps(upstream, reference))
    assert len(optimizer.param_groups) == 1


# The manager of overrides ---------------------------------------------------------------------------------------------


def test_overrides_of_another_model_reach_plain_bitsandbytes_but_not_ours() -> None:
    other, reference, subject = Net(), Net(), Net()
    take_steps(as_the_trainer_does(other), other, 1)
    del other
    upstream = bitsandbytes.optim.AdamW8bit(reference.linear.parameters(), lr=1e-2)
    take_steps(upstream, reference.linear, 1)
    # The other model's embedding was parameter 0 of group 0, as this linear's weight is.
    assert upstream.state[reference.linear.weight]["state1"].dtype is torch.float32
    optimizer = build(subject.linear)
    take_steps(optimizer, subject.linear, 1)
    assert state_dtypes(optimizer)["weight"] is torch.uint8


def test_overrides_of_this_models_parameters_are_obeyed() -> None:
    model = Net()
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.override_config(model.linear.weight, "optim_bits", 32)
    manager.register_module_override(model.embedding, "weight", {"optim_bits": 8})
    optimizer = build(model)
    take_steps(optimizer, model, 1)
    assert state_dtypes(optimizer)["linear.weight"] is torch.float32
    assert state_dtypes(optimizer)["embedding.weight"] is torch.uint8


def test_overrides_that_cannot_be_obeyed_are_refused() -> None:
    model = Net()
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.override_config(model.linear.weight, "max_unorm", 0.1)
    with pytest.raises(HyperparameterError, match="has no hyperparameter 'max_unorm'"):
        build(model)
    pytest.importorskip("galore_torch")
    with pytest.raises(UnsupportedError, match="GlobalOptimManager holds overrides for 1"):
        build(model, "galore_adamw_8bit", target_modules="all-linear")
    with pytest.raises(UnsupportedError, match="use adamw_bnb_8bit, which obeys them"):
        build(model, bitsandbytes.optim.RMSprop8bit)


def test_overrides_of_another_model_do_not_reach_a_class_without_a_name() -> None:
    """They are kept by ``id``, which later tensors get again, and by position in the groups."""
    other, model = Net(), Net()
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.override_config(list(other.parameters()), "optim_bits", 32)
    manager.register_parameters(other.parameters())
    optimizer = build(model, bitsandbytes.optim.RMSprop8bit)
    take_steps(optimizer, model, 1)
    assert state_dtypes(optimizer)["linear.weight"] is torch.uint8


# State ----------------------------------------------------------------------------------------------------------------


def test_state_dict_is_flat_and_loads_as_plain_tensors() -> None:
    """bitsandbytes wraps quantized state in a nested dict of its own, to hide it from FSDP1."""
    model = Net()
    take_steps(upstream := bitsandbytes.optim.AdamW8bit(model.parameters()), model, 1)
    assert any("__bnb_optimizer_quant_state__" in own for own in upstream.state_dict()["state"].values())

    optimizer = build(model := Net())
    take_steps(optimizer, model, 1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    own = torch.load(file, weights_only=True)["state"]["linear.weight"]
    assert set(own) == {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}
    assert own["state1"].dtype is torch.uint8 and own["absmax1"].shape == (20,)


def test_values_that_bitsandbytes_would_ignore_are_refused() -> None:
    """``AdamW`` accepts ``amsgrad`` and does nothing with it."""
    with pytest.raises(HyperparameterError, match="has no hyperparameter 'amsgrad'"):
        build(Net(), amsgrad=True)
