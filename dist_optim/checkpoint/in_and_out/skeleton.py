"""A model of names and shapes alone, and the optimizer that a record describes on it: nothing of a run is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_optim.building.build import build_optimizer
from dist_optim.building.groups import KEYS_OF_TORCH
from dist_optim.errors import DistOptimError, UsageError
from dist_optim.ranks.agreement import num_ranks
from dist_optim.specs.composed import OPTIM
from dist_optim.specs.hyperparameters import Scope
from dist_optim.specs.registry import OptimizerSpec, get_spec
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["Choice", "build_on", "one_process", "skeleton", "specs_of"]

Choice = str | type[Optimizer] | Callable[..., Optimizer]


@contextmanager
def one_process(call: str) -> Iterator[None]:
    """What is inside is done by one process, without the others of a job.

    Raises:
        UsageError: This process is one of several ranks, which would wait for each other.
    """
    if dist.is_initialized() and num_ranks(None) > 1:
        raise UsageError(
            f"{call} is done by one process, and this is one of {num_ranks(None)} ranks. Run it by itself."
        )
    yield


def skeleton(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module whose parameters have these names, in this order within each module, on these tensors' storage."""
    root = nn.Module()
    for name, tensor in tensors.items():
        at = root
        *path, last = name.split(".")
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(last, nn.Parameter(tensor))
    return root


def specs_of(name: str, choice: Choice | None = None) -> dict[str, OptimizerSpec]:
    """The registered specs that a recorded name is made of, by name; empty where ``choice`` is a class of its own.

    Raises:
        UsageError: Nobody registered it, and no class was given.
    """
    if choice is not None and not isinstance(choice, str):
        return {}
    try:
        return {part: get_spec(part) for part in (choice or name).split("+")}
    except DistOptimError as error:
        raise UsageError(
            f"The optimizer {name!r} is of a class that has no name here. Give the class: optimizer=TheClass, or "
            "--optim package.module:TheClass."
        ) from error


def build_on(
    model: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    name: str,
    arguments: Mapping[str, Any],
    *,
    choice: Choice | None = None,
    master_weights: bool = False,
) -> DistributedOptimizer:
    """The optimizer that a record or a state dict of upstream's describes.

    Args:
        model: Has the parameters that the groups name.
        groups: As upstream has them, counters included; ``params`` are names.
        name: As it is recorded: names of several are joined by ``+``.
        arguments: What upstream takes in its constructor alone, and no group says.
        choice: A class in place of a registered name.
        master_weights: As in ``build_optimizer``.

    Raises:
        DistOptimError: As ``build_optimizer``.
    """
    parameters, specs = dict(model.named_parameters()), specs_of(name, choice)
    given = []
    for group in groups:
        spec = specs.get(group.get(OPTIM, name)) or next(iter(specs.values()), None)
        values = {key: value for key, value in group.items() if _is_given(key, value, spec)}
        given.append({**values, "params": [parameters[one] for one in group["params"]]})
    first = next(iter(specs.values()), None)
    chosen: Any = choice if choice is not None else (first.name if first else name)
    return build_optimizer(
        model,
        chosen,
        params=given,
        master_weights=master_weights,
        fused_backward=None if first is not None and first.instead else False,
        independent=None if first is not None else False,
        print_audit=False,
        **_constructor_values(first, groups, arguments),
    )


def _is_given(key: str, value: Any, spec: OptimizerSpec | None) -> bool:
    """Whether a group's value is one that a user gives; what upstream counts there comes with the state."""
    if key in ("params", "param_names") or isinstance(value, Tensor) or _is_encoded(value):
        return False
    if spec is None or key in KEYS_OF_TORCH or key == OPTIM:
        return True
    return key in _of_groups(spec)


def _of_groups(spec: OptimizerSpec) -> set[str]:
    return {record.name for record in spec.records() if record.scope is not Scope.CONSTRUCTOR}


def _is_encoded(value: Any) -> bool:
    return isinstance(value, dict)


def _constructor_values(
    spec: OptimizerSpec | None, groups: Sequence[Mapping[str, Any]], given: Mapping[str, Any]
) -> dict[str, Any]:
    """What was given, and what every group says alike; the rest are the defaults."""
    if spec is None:
        return dict(given)
    said: dict[str, Any] = {}
    for record in spec.records():
        values = [group[record.name] for group in groups if record.name in group and OPTIM not in group]
        plain = [one for one in values if not isinstance(one, (Tensor, dict))]
        is_settled = record.scope is Scope.CONSTRUCTOR and record.default is None  # by upstream, when it is built
        if plain and record.scope is not Scope.MATRIX and not is_settled:
            said[record.name] = plain[0]
        elif record.required:
            said[record.name] = 0.0 if record.kind == "float" else None
    for group in groups:
        said |= {key: one for key, one in spec.driver.built_with(group).items() if OPTIM not in group}
    return {**said, **given}


def room(shape: torch.Size, dtype: torch.dtype, *, is_written: bool) -> Tensor:
    """A tensor of this shape, all zeros: on one element of storage unless it will be written to."""
    return torch.zeros(shape if is_written else (), dtype=dtype, device="cpu").expand(shape)
