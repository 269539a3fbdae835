"""A step taken apart: contenders that each do all that the one before does and one thing more, up to dist_optim.

To step whole tensors on one rank each takes upstream on this rank's share of them, and messages. Under FSDP2 upstream
also needs what its rank holds of a tensor in one piece with what came, and the rank its part back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_optim.exchange.copies import copy
from dist_optim.ranks.agreement import agree_on_bits, host_group, num_ranks, own_rank
from measuring.contenders import (
    ALONE,
    FLOOR,
    OURS,
    SHARE,
    Build,
    Contender,
    Problem,
    alone,
    bare_messages,
    floor,
    giving,
    has_floor,
    on_dtensors,
    ours,
    owners_of,
    share,
)

__all__ = ["AGREED", "COPIED", "EACH", "SLICES", "apart"]

SLICES = "slices"
"""Upstream on this rank's part of every tensor, of what it can step so."""
AGREED = "and two agreements"
"""What ranks tell each other before a step and after it."""
COPIED = "and own parts copied"
"""Gradients and weights into whole tensors, and weights back."""
EACH = "and a message each"
"""For each tensor and rank one message, from where it lies to where it is read, in place of three in all."""


def apart(problem: Problem, layout: str) -> dict[str, Build]:
    """How to build each contender under ddp or fsdp2, one process first."""
    builders: dict[str, Build] = {ALONE: lambda: alone(problem)}
    if not has_floor(problem.recipe, layout):
        builders |= {"DTensors": lambda: on_dtensors(problem), SLICES: lambda: _slices(problem)}
        builders[AGREED] = lambda: _agreed(problem)
    else:
        builders |= {SHARE: lambda: share(problem), FLOOR: lambda: floor(problem, layout)}
        if layout == "fsdp2":
            builders |= {COPIED: lambda: _copied(problem), EACH: lambda: _each_from_parts(problem)}
        else:
            builders[EACH] = lambda: _each_of_replicas(problem)
    return builders | {OURS: lambda: ours(problem, layout, OURS, {})}


def _slices(problem: Problem) -> Contender:
    held = _held(problem)
    return Contender(name=SLICES, prepare=_gives(problem, held), step=problem.recipe.upstream_optimizer(held).step)


def _agreed(problem: Problem) -> Contender:
    slices, group = _slices(problem), host_group()
    told = [True] * len(problem.gradients)

    def step() -> None:
        agree_on_bits(told, told, group)
        slices.step()
        agree_on_bits([False], [False], group)

    return replace(slices, name=AGREED, step=step)


def _copied(problem: Problem) -> Contender:
    owned, held = _Owned(problem), _held(problem)
    send = bare_messages(sum(one.numel() for one in problem.gradients), "fsdp2", problem.device)

    def step() -> None:
        owned.take_in(held)
        send()
        owned.optimizer.step()
        owned.give_back(held)

    return Contender(name=COPIED, prepare=_gives(problem, held), step=step)


def _each_from_parts(problem: Problem) -> Contender:
    owned, held, mail = _Owned(problem), _held(problem), _Mail()

    def step() -> None:
        for at, whole in owned.numbered():
            for peer in _others():
                mail.receive(_part(owned.gradients[at], peer), peer, at, "gradient")
                mail.receive(_part(whole, peer), peer, at, "weight")
        for at, part in enumerate(held):
            if owned.owners[at] != own_rank():
                mail.send(_gradient_of(part), owned.owners[at], at, "gradient")
                mail.send(part.data, owned.owners[at], at, "weight")
        owned.take_in(held)
        mail.wait()
        owned.optimizer.step()
        for at, part in enumerate(held):
            if owned.owners[at] != own_rank():
                mail.receive(part.data, owned.owners[at], at, "back")
        for at, whole in owned.numbered():
            for peer in _others():
                mail.send(_part(whole, peer), peer, at, "back")
        owned.give_back(held)
        mail.wait()

    def weights() -> list[Tensor]:
        parts = [[torch.empty_like(one) for _ in range(num_ranks())] for one in held]
        for everyones, one in zip(parts, held, strict=True):
            dist.all_gather(everyones, one.detach())
        return [torch.cat(everyones) for everyones in parts]

    return Contender(name=EACH, prepare=_gives(problem, held), step=step, weights=weights)


def _each_of_replicas(problem: Problem) -> Contender:
    owned, mail = _Owned(problem), _Mail()

    def step() -> None:
        for at, other in enumerate(owned.parameters):
            if owned.owners[at] != own_rank():
                mail.receive(other.data, owned.owners[at], at, "back")
        owned.optimizer.step()
        for at, whole in owned.numbered():
            for peer in _others():
                mail.send(whole, peer, at, "back")
        mail.wait()

    return Contender(name=EACH, prepare=owned.gives(problem), step=step, weights=lambda: owned.parameters)


class _Owned:
    """The model's tensors whole; upstream steps those that this rank owns, by gradients in rooms that stay."""

    def __init__(self, problem: Problem) -> None:
        self.parameters = list(problem.model().parameters())
        self.owners = owners_of(self.parameters)
        self.mine = [at for at, owner in enumerate(self.owners) if owner == own_rank()]
        self.gradients = {at: torch.empty_like(self.parameters[at].data) for at in self.mine}
        for at, gradient in self.gradients.items():
            self.parameters[at].grad = gradient
        self.optimizer = problem.recipe.upstream_optimizer([self.parameters[at] for at in self.mine])

    def numbered(self) -> Iterator[tuple[int, Tensor]]:
        return ((at, self.parameters[at].data) for at in self.mine)

    def gives(self, problem: Problem) -> Callable[[], None]:
        """Gives those that it owns their whole gradients."""
        return giving([self.parameters[at] for at in self.mine], [problem.gradients[at] for at in self.mine])

    def take_in(self, held: list[nn.Parameter]) -> None:
        """Copy what this rank holds of the tensors that it owns into them, gradients too."""
        wholes = [*self.gradients.values(), *(whole for _, whole in self.numbered())]
        mine = [held[at] for at in self.mine]
        parts = [*map(_gradient_of, mine), *(one.data for one in mine)]
        copy([_part(one, own_rank()) for one in wholes], parts)

    def give_back(self, held: list[nn.Parameter]) -> None:
        """Copy what this rank holds of the tensors that it owns out of them."""
        copy([held[at].data for at in self.mine], [_part(whole, own_rank()) for _, whole in self.numbered()])


class _Mail:
    """Messages, each with a tag of its own."""

    FIELDS = ("gradient", "weight", "back")

    def __init__(self) -> None:
        self._works: list[Any] = []

    def send(self, part: Tensor, to: int, at: int, field: str) -> None:
        self._works.append(dist.isend(part, to, tag=self._tag(at, field)))

    def receive(self, part: Tensor, source: int, at: int, field: str) -> None:
        self._works.append(dist.irecv(part, source, tag=self._tag(at, field)))

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works.clear()

    def _tag(self, at: int, field: str) -> int:
        return at * len(self.FIELDS) + self.FIELDS.index(field)


def _held(problem: Problem) -> list[nn.Parameter]:
    """What this rank holds of every tensor under FSDP2."""
    return [nn.Parameter(_part(one.detach(), own_rank()).clone()) for one in problem.model().parameters()]


def _gives(problem: Problem, held: list[nn.Parameter]) -> Callable[[], None]:
    """Gives them their gradients."""
    return giving(held, [_part(one, own_rank()) for one in problem.gradients])


def _gradient_of(part: nn.Parameter) -> Tensor:
    assert part.grad is not None  # ``prepare`` has given it one
    return part.grad


def _part(whole: Tensor, rank: int) -> Tensor:
    """The rows that a rank holds: the models' tensors divide evenly."""
    return whole.tensor_split(num_ranks())[rank]


def _others() -> Iterator[int]:
    return (rank for rank in range(num_ranks()) if rank != own_rank())
