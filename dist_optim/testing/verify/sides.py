"""One of the two sides: the ranks of a strategy, with dist_optim. The other one is ``alone``."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_optim.building.build import build_optimizer
from dist_optim.building.choice import resolve
from dist_optim.integrations.cpu_rehearsal import choose_cpu_for_deepspeed
from dist_optim.ranks.agreement import num_ranks, own_rank
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.specs.verdict import Verdict
from dist_optim.testing.placements import full_parameters, inject, place
from dist_optim.testing.verify.job import DECAY, Job, make_model

__all__ = ["Side", "make_side", "rates_of", "set_rates"]

PLACEMENTS = {"ddp": "ddp", "fsdp1": "fsdp1", "fsdp2": "fsdp2 units", "hsdp": "hsdp"}
Tensors = Mapping[str, Tensor]


class Side(ABC):
    """A model in training, by given gradients. All methods are collective."""

    audit = ""
    verdict: Verdict | None = None
    """Of the proof, where it is a class that nobody described."""

    @abstractmethod
    def step(self, given: Tensors, at: int) -> None:
        """Take one step by these gradients."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Copies of the whole weights, put together by the engine's own means, on every rank."""


def make_side(job: Job) -> Side:
    """The model under its strategy, and the optimizer on it. Collective.

    Raises:
        DistOptimError: On all ranks: what is asked for is not served.
    """
    return _UnderTorch(job) if job.stage is None else _UnderZero(job)


class _UnderTorch(Side):
    def __init__(self, job: Job) -> None:
        spec = resolve(job.optimizer, inside_backward=True)
        self._is_inside = bool(spec.instead)
        self._has_backward = self._is_inside or bool(job.options.get("reduce_to_owner"))
        model = make_model(job)
        if self._has_backward:
            _let_losses_be_given(model)
        self._model = place(model, PLACEMENTS[job.strategy])
        self._optimizer = build_optimizer(
            self._model,
            job.optimizer,
            **{"print_audit": False, "fused_backward": self._is_inside, **job.options},
        )
        self._optimizer.train()
        self._rates = rates_of(self._optimizer.param_groups, self._optimizer.spec)
        self.audit, self.verdict = self._optimizer.route_audit(), self._optimizer.spec.verdict

    def step(self, given: Tensors, at: int) -> None:
        set_rates(self._optimizer.param_groups, self._rates, at)
        if self._has_backward:
            self._optimizer.zero_grad()
            self._model(_of_rank_0(given)).backward()
        else:
            inject(self._model, dict(given))
        self._optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return full_parameters(self._model)


class _UnderZero(Side):
    def __init__(self, job: Job) -> None:
        if job.device == "cpu":
            choose_cpu_for_deepspeed()
        import deepspeed

        from dist_optim.integrations.deepspeed import register
        from dist_optim.integrations.deepspeed.engine import build_optimizer_for_engine

        register()
        model = make_model(job)
        self._names = [name for name, _ in model.named_parameters()]
        _let_losses_be_given(model)
        built = build_optimizer_for_engine(model, job.optimizer, print_audit=False, **job.options)
        self._engine = deepspeed.initialize(model=model, optimizer=built, config=_engine_config(job))[0]
        built.train()
        self._optimizer, self._gathered = built, deepspeed.zero.GatheredParameters
        self._is_split = job.stage == 3
        self._rates = rates_of(built.param_groups, built.spec)
        self.audit, self.verdict = built.route_audit(), built.spec.verdict

    def step(self, given: Tensors, at: int) -> None:
        set_rates(self._optimizer.param_groups, self._rates, at)
        self._engine.backward(self._engine(_of_rank_0(given)))
        self._engine.step()

    def weights(self) -> dict[str, Tensor]:
        parameters = list(self._engine.module.parameters())
        with self._gathered(parameters, enabled=self._is_split):
            return {name: one.detach().clone() for name, one in zip(self._names, parameters, strict=True)}


def _engine_config(job: Job) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": job.stage},
        "zero_force_ds_cpu_optimizer": False,
    }


# Losses whose gradients are given ----------------------------------------------------------------------------------


def _let_losses_be_given(model: nn.Module) -> None:
    """From now on a call with a tensor for each parameter returns the loss whose gradients those are."""
    for module in model.modules():
        module.forward = functools.partial(_given_loss, module)


def _given_loss(module: nn.Module, given: Tensors) -> Tensor:
    own = [(one * given[name]).float().sum() for name, one in module.named_parameters(recurse=False) if name in given]
    loss = torch.stack(own).sum() if own else torch.zeros((), device=next(iter(given.values())).device)
    for name, child in module.named_children():
        below = {key.removeprefix(f"{name}."): one for key, one in given.items() if key.startswith(f"{name}.")}
        loss = loss + child(below) if below else loss
    return loss


def _of_rank_0(given: Tensors) -> dict[str, Tensor]:
    """Rank 0's alone, so that the engine's average is the gradient whatever the order of summation."""
    share = num_ranks() if own_rank() == 0 else 0
    return {name: one * share for name, one in given.items()}


# Learning rates ----------------------------------------------------------------------------------------------------


def rates_of(groups: list[dict[str, Any]], spec: OptimizerSpec) -> list[float | None]:
    """Of every group at the start; None where upstream computes its own, or nobody knows whether it does."""
    return [None if spec.is_undescribed or group.get("lr") is None else float(group["lr"]) for group in groups]


def set_rates(groups: list[dict[str, Any]], rates: list[float | None], at: int) -> None:
    """Another rate at every step, as a schedule sets it."""
    for group, rate in zip(groups, rates, strict=True):
        if rate is None:
            continue
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * DECAY**at)
        else:
            group["lr"] = rate * DECAY**at
