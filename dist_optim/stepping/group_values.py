"""The values of param groups between the user and an upstream optimizer: hyperparameters in, counters out.

Of a class that nobody described both ways are open for every value: what was changed outside is pushed, and what the
class wrote itself is the truth.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_optim.specs.driver import ParamGroup

__all__ = ["GroupValues", "counters_in", "is_same"]

_OF_TENSORS = ("params", "param_names")


class GroupValues:
    """What one upstream optimizer has in its groups.

    Args:
        optimizer: Upstream's.
        is_two_way: Of each group, whether its class may write hyperparameters.
    """

    def __init__(self, optimizer: Optimizer, is_two_way: Sequence[bool]) -> None:
        self._optimizer = optimizer
        self.is_two_way = list(is_two_way)
        self._shown = [dict(group) for group in optimizer.param_groups]

    def note_new_group(self, is_two_way: bool) -> None:
        """Upstream has one group more, with its own values."""
        self.is_two_way.append(is_two_way)
        self._shown.append(dict(self._optimizer.param_groups[-1]))

    def drop_groups(self, num_groups: int) -> None:
        """Forget all but the first groups."""
        del self.is_two_way[num_groups:], self._shown[num_groups:]

    def push(self, groups: Sequence[ParamGroup], keys: Collection[str]) -> None:
        """Write hyperparameters of the user's groups into upstream's (schedules change the user's).

        Args:
            groups: The user's.
            keys: Which values are hyperparameters, where somebody described the class.
        """
        every = zip(groups, self._optimizer.param_groups, self._shown, self.is_two_way, strict=True)
        for outer, inner, shown, is_two_way in every:
            if is_two_way:
                _push_changes(outer, inner, shown)
                continue
            for key in keys & inner.keys() & outer.keys():
                if isinstance(inner[key], Tensor):
                    _write(inner[key], outer[key])  # kept as a tensor where upstream wants one
                else:
                    inner[key] = outer[key]

    def why_unheard(self, groups: Iterable[tuple[int, ParamGroup]], keys: Collection[str]) -> str:
        """Which value of the user's groups is another than upstream's, and is not handed to it; empty where none is.

        Tensors are not looked at: they may be on an accelerator, which would be waited for.

        Args:
            groups: The user's, with the number that each has here.
            keys: What is handed to upstream, where somebody described the class.
        """
        for number, outer in groups:
            inner = self._optimizer.param_groups[number]
            for key in () if self.is_two_way[number] else inner.keys() - keys - set(_OF_TENSORS):
                own, given = inner[key], outer.get(key, inner[key])
                if not (is_same(own, given) or isinstance(own, Tensor) or isinstance(given, Tensor)):
                    return f"param_groups[{number}][{key!r}] = {given!r}, where upstream has {own!r}"
        return ""

    def published(self) -> list[dict[str, Any]]:
        """Upstream's groups as they are now, without parameters; from now on they count as what the user was shown."""
        values = [
            {key: value for key, value in group.items() if key not in _OF_TENSORS}
            for group in self._optimizer.param_groups
        ]
        for shown, own in zip(self._shown, values, strict=True):
            shown.update(own)
        return values

    def take_over(self, groups: Sequence[tuple[Collection[str], Mapping[str, Any]]]) -> None:
        """Have in upstream's groups these keys, and no others, and of them these values, where they are given."""
        for own, shown, (keys, values) in zip(self._optimizer.param_groups, self._shown, groups, strict=True):
            for group in (own, shown):
                for key in group.keys() - set(keys):
                    del group[key]
                group.update(values)

    def counters(self, keys: Collection[str]) -> list[dict[str, Any]]:
        """What upstream itself counts in its groups (steps, running sums), group by group: not under these keys."""
        return [
            {key: value for key, value in group.items() if key not in keys and _is_plain(value)}
            for group in self._optimizer.param_groups
        ]

    def write_counters(self, counters: Sequence[Mapping[str, Any]]) -> None:
        """Install what ``counters`` returned."""
        for group, values in zip(self._optimizer.param_groups, counters, strict=True):
            for key, value in values.items():
                group[key] = value.clone() if isinstance(value, Tensor) else value


def counters_in(group: ParamGroup, keys: Collection[str]) -> dict[str, Any]:
    """Copies of what upstream itself keeps in a group."""
    found = {key: value for key, value in group.items() if key not in keys and key != "params" and _is_plain(value)}
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in found.items()}


def _push_changes(outer: ParamGroup, inner: ParamGroup, shown: ParamGroup) -> None:
    for key, value in outer.items():
        if isinstance(inner.get(key), Tensor):
            if inner[key] is not value:
                _write(inner[key], value)
        elif key != "params" and not (key in shown and is_same(shown[key], value)):
            shown[key] = inner[key] = value


def _write(target: Tensor, value: Any) -> None:
    """A device is not waited for where the value goes to it; where it comes from one, the host has to have it."""
    source = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    target.copy_(source, non_blocking=target.device.type != "cpu")


def is_same(shown: Any, value: Any) -> bool:
    """Whether a value of a group is still what the user was shown; a tensor that is not the same one is pushed."""
    if shown is value:
        return True
    if isinstance(shown, Tensor) or isinstance(value, Tensor) or type(shown) is not type(value):
        return False
    try:
        return bool(shown == value)
    except Exception:  # values that cannot be compared are pushed
        return False


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, tuple, Tensor))
