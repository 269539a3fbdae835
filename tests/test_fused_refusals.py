"""What would make updates inside backward wrong is refused, in words that say what to do."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from patience import PATIENCE_S
from placements import place
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import dist_optim
from dist_optim import Trait
from dist_optim.errors import DistOptimError, HyperparameterError, StateDictError, UnsupportedError, WrongModeError
from dist_optim.testing import RankPool

LAYERWISE = [f"{name}_layerwise" for name in ("galore_adamw", "galore_adafactor", "galore_adamw_8bit", "apollo_adamw")]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def build(net: nn.Module, name: str = "lomo", **options: Any) -> dist_optim.DistributedOptimizer:
    return dist_optim.build_optimizer(net, name, print_audit=False, **{"lr": 0.1, **options})


def loss_of(net: nn.Module) -> torch.Tensor:
    loss: torch.Tensor = net(torch.ones(4, 6)).square().sum()
    return loss


def test_accumulation_is_refused_at_the_second_backward() -> None:
    net = model()
    kept = build(net)
    loss_of(net).backward()
    with pytest.raises(WrongModeError, match="second gradient before step.*fused_backward=False"):
        loss_of(net).backward()
    assert kept.num_steps == 0


def clip_by_total_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_, clip_by_total_norm])
def test_clipping_what_is_gone_is_refused(clip: Callable[..., Any]) -> None:
    """Also by functions that were imported before there was an optimizer."""
    net, other = model(), model()
    optimizer = build(net)
    loss_of(net).backward()
    with pytest.raises(UnsupportedError, match="max_grad_norm=0"):
        clip(net.parameters(), 1.0)
    loss_of(other).backward()
    clip(other.parameters(), 1.0)  # the guard is for fused parameters alone
    with pytest.raises(UnsupportedError, match="cannot be clipped between backward and step"):
        optimizer.clip_grad_norm_(1.0)


def test_norm_clipping_asks_for_the_two_passes() -> None:
    net = model()
    optimizer = build(net, clip_grad_norm=0.5)
    with pytest.raises(WrongModeError, match=r"optimizer.backward\(loss\) in place of loss.backward"):
        loss_of(net).backward()
    net = model()
    optimizer, plain = build(net, clip_grad_norm=0.5), model()
    norm = optimizer.backward(loss_of(net))
    loss_of(plain).backward()
    assert norm == torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    with pytest.raises(WrongModeError, match="clip_grad_norm"):
        loss_of(net).backward()  # the norm of the step before is not used again


def test_a_rate_changed_after_the_updates_is_refused() -> None:
    net = model()
    optimizer = build(net)
    loss_of(net).backward()
    optimizer.param_groups[0]["lr"] = 0.2
    with pytest.raises(WrongModeError, match="group 0, lr was changed between backward and step"):
        optimizer.step()


def test_a_gradient_set_by_hand_is_refused() -> None:
    net = model()
    optimizer = build(net)
    next(net.parameters()).grad = torch.zeros(5, 6)
    with pytest.raises(WrongModeError, match="'0.weight' has a stored gradient at step"):
        optimizer.step()
    with pytest.raises(WrongModeError, match=r"has a gradient already. Call model.zero_grad\(\)"):
        build(net, "adamw_torch", fused_backward=True)


def test_a_second_fused_backward_is_refused_until_the_first_is_removed() -> None:
    net = model()
    optimizer = build(net)
    with pytest.raises(WrongModeError, match="already updated inside backward by another"):
        build(net)
    assert optimizer.inside_backward is not None
    optimizer.inside_backward.remove()
    loss_of(net).backward()
    assert all(p.grad is not None for p in net.parameters())
    optimizer.step()
    optimizer.zero_grad()
    build(net)


def test_hooks_of_a_dropped_optimizer_do_nothing() -> None:
    net = model()
    build(net)
    loss_of(net).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_backward_on_averaged_weights_is_refused() -> None:
    net = model()
    optimizer = build(net, "schedule_free_sgd", fused_backward=True)
    optimizer.eval()
    with pytest.raises(WrongModeError, match=r"Call optimizer.train\(\)"):
        loss_of(net).backward()


def test_loss_scaling_is_refused() -> None:
    net = model()
    optimizer = build(net)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(net)).backward()
    with pytest.raises(UnsupportedError, match="GradScaler found out too late"):
        scaler.step(optimizer)
    with pytest.raises(UnsupportedError, match="fp16 gradients need loss scaling"):
        build(model().half(), fused_backward=True)


@pytest.mark.parametrize(
    ("name", "instead"), [("lomo", "fused_backward=False"), ("galore_adamw_layerwise", "galore_adamw")]
)
def test_looking_at_gradients_that_will_be_gone_is_refused(name: str, instead: str) -> None:
    more = {"target_modules": "all-linear", "rank": 2} if "galore" in name else {}
    with pytest.raises(UnsupportedError, match=f"Leave on_nonfinite out, or use {instead}, which stores gradients"):
        build(model(), name, on_nonfinite="skip", **more)
    assert build(model(), "lomo", on_nonfinite="skip", fused_backward=False).num_skipped_steps == 0
    with pytest.raises(HyperparameterError, match="on_nonfinite is 'ignore'. Give 'raise'"):
        build(model(), "adamw_torch", on_nonfinite="ignore")


def test_what_is_not_stepped_tensor_by_tensor_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="grokadamw cannot step inside backward here: only elementwise"):
        build(model(), "grokadamw", fused_backward=True)


def why(make: Callable[[], object]) -> str:
    try:
        make()
    except DistOptimError as error:
        return f"{type(error).__name__}: {error}"
    return "served"


def refusals_on_several_ranks() -> dict[str, str]:
    low_rank = {"target_modules": "all-linear", "rank": 2}
    mixed = model()
    fully_shard(mixed[0])  # type: ignore[index]
    ddp = place(model(), "ddp")
    optimizer = build(ddp)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {
            "fsdp1": why(lambda: build(place(model(), "fsdp1"), fused_backward=True)),
            "fsdp1 layerwise": why(lambda: build(place(model(), "fsdp1"), LAYERWISE[0], **low_rank)),
            "plain layerwise": why(lambda: build(model(), LAYERWISE[0], **low_rank)),
            "mixed": why(lambda: build(mixed, fused_backward=True)),
            "fsdp1 by default": str(build(place(model(), "fsdp1")).inside_backward),
            "no_sync": why(ddp.no_sync),  # type: ignore[arg-type]
            "join": why(lambda: Join([ddp])),  # type: ignore[list-item]
            "join the optimizer": why(lambda: Join([optimizer])),  # type: ignore[list-item]
        }
    assert optimizer.inside_backward is not None
    optimizer.inside_backward.remove()
    found["removed"] = why(lambda: ddp(torch.ones(4, 6)))
    return found


def test_refusals_on_several_ranks(two_ranks: RankPool) -> None:
    for found in two_ranks.run(refusals_on_several_ranks):
        assert "Use fsdp_version: 2" in found["fsdp1"] and found["fsdp1"].startswith("UnsupportedError")
        assert "Or use galore_adamw, the same algorithm with stored gradients." in found["fsdp1 layerwise"]
        assert "Wrap it in DistributedDataParallel" in found["plain layerwise"]
        assert "Or use galore_adamw," in found["plain layerwise"]
        assert "'2.weight' is not sharded" in found["mixed"]
        assert found["fsdp1 by default"] == "None"
        assert found["no_sync"].startswith("UnsupportedError: no_sync() accumulates gradients")
        assert all("drop_last=True" in found[key] for key in ("join", "join the optimizer"))
        assert "Wrap the module anew" in found["removed"]


def rates_that_differ() -> str:
    net = place(model(), "ddp")
    optimizer = build(net)
    optimizer.param_groups[0]["lr"] = 0.1 * (1 + torch.distributed.get_rank())
    return why(lambda: loss_of(net).backward())


def test_rates_that_differ_between_ranks_are_refused_before_an_update(two_ranks: RankPool) -> None:
    for found in two_ranks.run(rates_that_differ):
        assert found.startswith(
            "RanksDisagreeError: Hyperparameters differ between ranks: group 0, lr is 0.1 on rank 0"
        )


def reducer_is_gone() -> bool:
    """DDP's buckets hold a copy of every gradient for the life of the reducer."""
    ddp = DistributedDataParallel(nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(25))))
    ddp(torch.ones(1, 1000)).sum().backward()  # memory is there when it was written to
    ddp.zero_grad()
    before = resident_bytes()
    build(ddp)
    return before - resident_bytes() > 80e6


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_buckets_of_ddp_are_freed(two_ranks: RankPool) -> None:
    assert all(two_ranks.run(reducer_is_gone))


@pytest.mark.parametrize("name", LAYERWISE)
def test_layerwise_names_are_their_plain_algorithms(name: str) -> None:
    spec = dist_optim.get_spec(name)
    plain = dist_optim.get_spec(spec.instead)
    assert name == f"{plain.name}_layerwise" and Trait.FUSED_BACKWARD in spec.traits
    own, others = (  # they clip in two backward passes
        [record for record in one.records() if record.name != "clip_grad_norm"] for one in (spec, plain)
    )
    assert own == others and spec.paper and spec.licence and spec.state_bytes
    with pytest.raises(UnsupportedError, match=f"steps each parameter inside backward.*Use {plain.name},"):
        build(model(), name, fused_backward=False, target_modules="all-linear", rank=2)


def test_state_of_another_optimizer_is_refused() -> None:
    with pytest.raises(StateDictError):
        build(model()).load_state_dict(build(model(), "sgd").state_dict())


def test_registering_imports_no_upstream_package() -> None:
    check = (
        "import sys, dist_optim; dist_optim.names(); "
        "packages = {module.partition('.')[0] for module in sys.modules}; "
        "print(sorted(packages & {'lomo_optim', 'galore_torch', 'apollo_torch', 'bitsandbytes', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout.strip() == "[]"
