"""``optimizer.state``: this rank's state by parameter, to look at, as monitors of torch's optimizers do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from torch import Tensor

from dist_optim.errors import UnsupportedError
from dist_optim.stepping.holdings import Holdings
from dist_optim.stepping.upstream_instance import UpstreamInstance

__all__ = ["StateView"]


class _ReadOnly(dict[str, Any]):
    """The state of one parameter; its tensors are the live ones, its keys are fixed."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise UnsupportedError(
            "optimizer.state shows what upstream keeps, and takes nothing new: it would be lost. Write into its "
            "tensors in place, or call load_state_dict with what the state should be."
        )

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


class StateView(Mapping[Tensor, dict[str, Any]]):
    """State by parameter: all of what this rank owns, and its part of what each rank steps a part of.

    What a stack of matrices holds has the number of the matrix before its key. A parameter without state here, because
    another rank owns it or it never had a gradient, has an empty one, as in torch's optimizers; only those with state
    are counted and iterated over. Not a collective.
    """

    def __init__(self, held: Holdings) -> None:
        self._steppers: dict[Tensor, list[tuple[str, UpstreamInstance, int]]] = defaultdict(list)
        for instance, index in held.stepped_here():
            one = held.placed[index]
            prefix = f"{one.member.number}." if one.member and one.member.number else ""
            self._steppers[one.parameter].append((prefix, instance, index))

    def __getitem__(self, parameter: Tensor) -> dict[str, Any]:
        found = self._steppers.get(parameter, ())
        return _ReadOnly(
            {
                prefix + key: value
                for prefix, instance, index in found
                for key, value in instance.encoded_state(index).items()
            }
        )

    def __contains__(self, parameter: object) -> bool:
        return isinstance(parameter, Tensor) and bool(self[parameter])

    def get(self, parameter: Tensor, default: Any = None) -> Any:
        """The state of a parameter that has one here, or ``default``."""
        return self[parameter] or default

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for parameter in self._steppers if self[parameter])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getattr__(self, name: str) -> Any:
        if name in ("clear", "pop", "popitem", "setdefault", "update"):
            return _ReadOnly()._refuse
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        _ReadOnly()._refuse()

    def __delitem__(self, parameter: Tensor) -> None:
        _ReadOnly()._refuse()
