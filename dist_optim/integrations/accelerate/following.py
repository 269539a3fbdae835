"""accelerate: groups of the plain model's parameters, followed into the model that accelerate makes of it.

FSDP2 puts new parameters in the place of the plain ones, while the groups that a user has made before hold those. Both
have the same name. Nothing is kept alive for it: what nobody holds any more, nobody can pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dist_optim.layouts.detect import named_parameters

__all__ = ["followed", "names_before", "remember"]

_successors: Any = WeakTensorKeyDictionary()
"""A plain parameter to a reference to what stands in its place: also for the second optimizer of a model."""


def names_before(model: nn.Module) -> Any:
    """The name of each parameter, before the model is placed; it holds no parameter."""
    names: Any = WeakTensorKeyDictionary()
    for name, parameter in named_parameters(model):
        names[parameter] = name
    return names


def remember(names: Any, placed: nn.Module) -> None:
    """Note what has come in the place of each parameter that somebody still holds.

    Args:
        names: What ``names_before`` returned.
        placed: The model as accelerate made it.
    """
    after = dict(named_parameters(placed))
    for parameter, name in names.items():
        if name in after and after[name] is not parameter:
            _successors[parameter] = weakref.ref(after[name])


def followed(params: Any) -> Any:
    """``params`` of ``build_optimizer``, with the placed parameter for each plain one; all else as it is."""
    if isinstance(params, Tensor):
        return _successor_of(params)
    if params is None or isinstance(params, (str, bytes, Mapping, set)) or not isinstance(params, Iterable):
        return params
    return [_followed_entry(entry) for entry in params]


def _followed_entry(entry: Any) -> Any:
    if isinstance(entry, Mapping) and "params" in entry:
        return {**entry, "params": followed(entry["params"])}
    if isinstance(entry, tuple):  # a name and its parameter
        return tuple(_followed_entry(part) for part in entry)
    return _successor_of(entry) if isinstance(entry, Tensor) else entry


def _successor_of(parameter: Tensor) -> Any:
    reference = _successors.get(parameter)
    successor = None if reference is None else reference()
    return parameter if successor is None else successor
