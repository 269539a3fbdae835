"""Param groups by pattern: ``{"params": "layers.*.weight", "lr": ...}`` in place of lists of parameters.

A pattern is compared with whole logical names, as ``model.named_parameters()`` of the model without wrappers gives
them: so it means the same under every engine. It is a glob (``"*.bias"``; ``*`` goes across dots), a regular
expression after ``re:`` (``"re:.*[qk]_proj.weight"``; it has to match the whole name), a list of either, or a function
of name and parameter. The function sees a parameter without values, whose shape and dtype are the whole tensor's.

The first group that matches takes a parameter.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_optim.errors import HyperparameterError, ParameterError

__all__ = ["LR_SCALE", "Meta", "by_pattern", "has_patterns", "meta_parameter", "scaled"]

LR_SCALE = "lr_scale"
"""Key of a group: its rate, as a multiple of the one that the optimizer is built with."""
REGULAR = "re:"
EVERYTHING = "*"

Meta = Callable[[str], nn.Parameter]
"""By name, a parameter without values: what a function is asked with."""


def has_patterns(params: Any) -> bool:
    """Whether these are groups of which one is given by a pattern."""
    return isinstance(params, (list, tuple)) and any(
        isinstance(group, Mapping) and _patterns_of(group.get("params")) for group in params
    )


def meta_parameter(shape: torch.Size, dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    """A parameter without values."""
    is_float = dtype.is_floating_point or dtype.is_complex
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=requires_grad and is_float)


def by_pattern(groups: Sequence[Any], parameters: Mapping[str, Tensor], meta: Meta) -> list[dict[str, Any]]:
    """The groups with the parameters that their patterns match, in the model's order; others stay as they are.

    Args:
        groups: As given; each a dict with the key ``params``.
        parameters: All of the model's, by logical name.
        meta: For functions: the parameter of a name, without values.

    Raises:
        ParameterError: A pattern matches nothing, or nothing that the groups before it have left; or a parameter that
            is trained is in no group.
    """
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    taken: dict[str, int] = {}
    found: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        if not isinstance(group, Mapping) or "params" not in group:
            raise ParameterError(f"params: group {number} is {group!r:.80}, not a dict with the key 'params'.")
        patterns = _patterns_of(group["params"])
        if patterns:
            names = _matched(patterns, number, list(parameters), taken, meta)
            found.append({**group, "params": [parameters[name] for name in names]})
        else:
            names = [name_of[id(one)] for one in _tensors(group["params"]) if id(one) in name_of]
            _refuse_taken(names, number, taken)
            found.append(dict(group))
        taken |= dict.fromkeys(names, number)
    _refuse_left_out([name for name in parameters if name not in taken and parameters[name].requires_grad])
    return found


def scaled(group: Mapping[str, Any], number: int, rate: float | None) -> dict[str, Any]:
    """The group with ``lr`` in place of ``lr_scale``, where it has one.

    Args:
        group: As given.
        number: Which group it is, for the message.
        rate: The rate that is scaled.

    Raises:
        HyperparameterError: The scale is no number, stands beside a rate, or there is no rate to scale.
    """
    own = dict(group)
    if LR_SCALE in own:
        own["lr"] = _rate(own.pop(LR_SCALE), own, number, rate)
    return own


def _rate(scale: Any, group: Mapping[str, Any], number: int, rate: float | None) -> float:
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool) and 0 <= scale < float("inf")
    if not is_number:
        raise HyperparameterError(f"params: {LR_SCALE}={scale!r} of group {number} is no number from 0 up.")
    if "lr" in group or rate is None:
        why = "also has a rate, lr" if "lr" in group else "has no rate to scale: the optimizer is built without lr"
        raise HyperparameterError(f"params: group {number} has {LR_SCALE}={scale!r} and {why}. Give one of the two.")
    return float(rate) * float(scale)


def _patterns_of(given: Any) -> list[Any]:
    """A group's patterns; none where it lists parameters."""
    if isinstance(given, str) or (callable(given) and not isinstance(given, (Tensor, nn.Module))):
        return [given]
    listed = list(given) if isinstance(given, (list, tuple)) else []
    return listed if listed and all(isinstance(one, str) for one in listed) else []


def _tensors(given: Any) -> list[Any]:
    listed = [given] if isinstance(given, Tensor) else list(given) if isinstance(given, (list, tuple)) else []
    return [one[1] if isinstance(one, tuple) and len(one) == 2 else one for one in listed]


def _matched(patterns: list[Any], number: int, names: list[str], taken: Mapping[str, int], meta: Meta) -> list[str]:
    """Names that one of the patterns matches and no group before has taken."""
    matched: set[str] = set()
    for pattern in patterns:
        own = {name for name in names if _matches(pattern, number, name, meta)}
        if not own:
            raise ParameterError(_no_match(pattern, number, names))
        left = own - taken.keys()
        if not left and pattern != EVERYTHING:
            groups = sorted({taken[name] for name in own})
            raise ParameterError(
                f"params: all that {_said(pattern)} of group {number} matches ({_listed(sorted(own))}) is in group "
                f"{', '.join(map(str, groups))} already: the first group that matches takes a parameter. Put the "
                "narrower pattern first."
            )
        matched |= left
    return [name for name in names if name in matched]


def _matches(pattern: Any, number: int, name: str, meta: Meta) -> bool:
    if callable(pattern):
        answer = pattern(name, meta(name))
        if not isinstance(answer, bool):
            raise ParameterError(
                f"params: the function of group {number} returned {answer!r:.80} for {name!r}. Return True or False."
            )
        return answer
    if not pattern.startswith(REGULAR):
        return pattern == name or fnmatch.fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern.removeprefix(REGULAR), name) is not None
    except re.error as error:
        raise ParameterError(f"params: {pattern!r} of group {number} is no regular expression: {error}.") from error


def _no_match(pattern: Any, number: int, names: list[str]) -> str:
    plain = "" if callable(pattern) else pattern.removeprefix(REGULAR)
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.3) or names[:3]
    return (
        f"params: {_said(pattern)} of group {number} matches no parameter. Some names are: {_listed(near)}. Names are "
        "whole, as model.named_parameters() of the model without wrappers gives them; write *.weight for all that end "
        "so, re:... for a regular expression."
    )


def _refuse_taken(names: list[str], number: int, taken: Mapping[str, int]) -> None:
    for name in names:
        if name in taken:
            raise ParameterError(
                f"params: group {number} lists {name!r}, which a pattern of group {taken[name]} has taken. Put the "
                "group that lists parameters before it."
            )


def _refuse_left_out(names: list[str]) -> None:
    if names:
        raise ParameterError(
            f"params: {len(names)} parameters that are trained are in no group: {_listed(names)}. Add a last group "
            '{"params": "*"} for all that is left, or freeze them (requires_grad_(False)).'
        )


def _said(pattern: Any) -> str:
    return f"the function {getattr(pattern, '__qualname__', pattern)!r}" if callable(pattern) else repr(pattern)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
