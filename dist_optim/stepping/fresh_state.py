"""What state will look like, for who has to make room for it before the first step: taken from a step aside."""

from __future__ import annotations

import torch

from dist_optim.generators import generators_kept
from dist_optim.specs.driver import UpstreamDriver
from dist_optim.stepping.holdings import Holdings
from dist_optim.stepping.upstream_instance import UpstreamInstance
from dist_optim.stepping.whole_state import StateByName

__all__ = ["instances_aside", "state_after_a_step"]


def state_after_a_step(held: Holdings) -> StateByName:
    """Keys, shapes and dtypes of this rank's state after a first step; the values mean nothing. Not a collective.

    New instances of upstream step tensors of their own: no parameter, no state and no random generator is touched.
    """
    state: StateByName = {}
    with generators_kept(), torch.no_grad():
        for instance in instances_aside(held):
            _step(instance, held.spec.driver, len(held.placed), held.needs_total_norm)
            found = {held.placed[index].fqn: instance.encoded_state(index) for index in instance.shadows}
            state |= {fqn: own for fqn, own in found.items() if own}
    return state


def instances_aside(held: Holdings) -> list[UpstreamInstance]:
    """New instances of upstream, as this rank has them, without state, on tensors of their own. Not a collective."""
    values = None
    if held.division.keeps_tensors:
        values = {
            index: one.detach().clone() for instance, index in held.stepped_here() for one in [instance.shadows[index]]
        }
    with generators_kept(), torch.no_grad():
        local, owners = held.division.build_instances(values)
    return list({id(one): one for one in [*([local] if local else []), *owners]}.values())


def _step(instance: UpstreamInstance, driver: UpstreamDriver, num_parameters: int, needs_total_norm: bool) -> None:
    parameters = {index: torch.ones_like(one) for index, one in instance.shadows.items()}
    parameters = {index: one.detach().contiguous() for index, one in parameters.items()}
    gradients = {index: torch.randn(one.shape, device="cpu").to(one) for index, one in parameters.items()}
    if needs_total_norm:
        driver.take_total_norm(instance.optimizer, torch.ones((), device="cpu"))
    instance.step(parameters, gradients, [True] * num_parameters)
