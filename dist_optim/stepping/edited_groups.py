"""Param groups keep the parameters that they were built with: owners and positions are planned over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any

from torch import nn

from dist_optim.errors import ParameterError
from dist_optim.layouts.detect import PlacedParameter

__all__ = ["parameters_of", "why_edited"]

REMEDY = (
    "Owners and positions are planned over all parameters, once. Put param_groups back as they were (values such as lr "
    "may be changed at any time), or build the optimizer anew, with all groups: build_optimizer(model, name, "
    "params=[{'params': [...]}, ...]). What is to rest for a while stays listed, with requires_grad_(False). No "
    "parameter was changed."
)


def parameters_of(placed: Iterable[PlacedParameter]) -> list[nn.Parameter]:
    """The model's parameters of a group, each once: one that holds a stack of matrices stands for all of them."""
    return list({id(one.parameter): one.parameter for one in placed}.values())


def why_edited(built: Sequence[Sequence[PlacedParameter]], groups: Sequence[Any]) -> ParameterError | None:
    """What of the groups, or of their parameters, is not as it was built; None where all are. Local.

    Args:
        built: The parameters of each group when the optimizer was built.
        groups: As the user has them now, whatever they are.
    """
    if len(groups) == len(built) and all(map(_is_as_built, built, groups)):
        return None
    before = [[id(one) for one in parameters_of(group)] for group in built]
    now = [_ids_of(group) for group in groups]
    if now == before:
        return None
    if len(now) != len(before):
        return ParameterError(
            f"optimizer.param_groups has {len(now)} groups, and was built with {len(before)}. {REMEDY}"
        )
    at = next(number for number, ids in enumerate(now) if ids != before[number])
    missing = [one.fqn for one in built[at] if id(one.parameter) not in now[at]]
    num_new = len(set(now[at]) - set(before[at]))
    changes = [f"{name!r} is missing" for name in missing[:1]]
    changes += [f"{len(missing) - 1} more are"] if len(missing) > 1 else []
    changes += [f"{num_new} are new"] if num_new else []
    changes += [] if changes else ["they are listed otherwise"]
    return ParameterError(
        f"The parameters of optimizer.param_groups[{at}] were edited after building: {', '.join(changes)}. {REMEDY}"
    )


def _is_as_built(built: Sequence[PlacedParameter], group: Any) -> bool:
    """Whether the group lists the very parameters, one for each: as most do, and quickly told."""
    listed = group.get("params") if isinstance(group, Mapping) else None
    if not isinstance(listed, list) or len(listed) != len(built):
        return False
    return all(map(is_, map(attrgetter("parameter"), built), listed))


def _ids_of(group: Any) -> list[int]:
    listed = group.get("params") if isinstance(group, Mapping) else None
    return [id(one) for one in listed] if isinstance(listed, (list, tuple)) else []
