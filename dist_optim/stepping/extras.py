"""What an optimizer keeps outside ``optimizer.state``: attributes, an inner optimizer, state that is no parameter's."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_optim.errors import StateDictError, UnsupportedError
from dist_optim.specs.driver import STRUCTURE
from dist_optim.specs.state_codec import Leaves, encode, parameters_in, restore

__all__ = ["Extras"]

LEAST_ADDRESS = 1 << 16
"""No object lies lower: smaller numbers are not asked what they mean."""


@functools.cache
def _of_torch() -> frozenset[str]:
    """Attributes of every optimizer; found out when first asked, since making one imports much of torch."""
    own = vars(Optimizer([nn.Parameter(torch.empty(0, device="cpu"))], {}))
    return frozenset(own) | {"_opt_called", "_warned_capturable_if_run"}


class Extras:
    """Everything that an upstream instance holds besides its groups and the state of its parameters.

    Args:
        optimizers: The objects of upstream's, by name, just constructed: one, or several in one instance.
        parameters: What stands in its groups, by position among all parameters.
        stepped: Positions of what is stepped here; all when None.

    Raises:
        UnsupportedError: It keeps something that is no data, so that it could never be saved.
    """

    def __init__(
        self,
        optimizers: Mapping[str, Optimizer],
        parameters: Mapping[int, nn.Parameter],
        stepped: Collection[int] | None = None,
    ) -> None:
        self._objects = dict(optimizers)
        self._stepped = set(parameters if stepped is None else stepped)
        self._parameters = parameters
        self._index_of = {id(parameter): index for index, parameter in parameters.items()}
        try:
            self._at_start = _mark(*self._encoded())
        except StateDictError as error:
            names = ", ".join(type(one).__name__ for one in optimizers.values())
            raise UnsupportedError(
                f"{names} could not be saved: {error} Register an OptimizerSpec whose driver stores it, or leave it "
                "out of the class."
            ) from error

    def read(self) -> dict[str, Any]:
        """Plain tensors, and one text that says how they belong together; empty where there is nothing.

        What was never changed is in it too: it may come from the weights that the instance was constructed on.

        Raises:
            StateDictError: There is something in it that is no data.
        """
        text, leaves = self._encoded()
        return {**leaves, STRUCTURE: text} if any(any(kept.values()) for kept in self._found().values()) else {}

    def is_as_constructed(self) -> bool:
        """Whether nothing was changed or replaced since."""
        return _mark(*self._encoded()) == self._at_start

    def why_not_written(self, encoded: Mapping[str, Any]) -> str:
        """Why ``write`` cannot install this here, and what to do; empty where it can."""
        tree = json.loads(encoded[STRUCTURE]) if encoded else {}
        missing = sorted(set(parameters_in(tree)) - self._stepped)
        if not missing:
            return ""
        return (
            f"It was saved by one rank that steps all tensors, and keeps parameter {missing[0]} outside their state; "
            "here several ranks step them. Build the optimizer with independent=False, as it was."
        )

    def write(self, encoded: Mapping[str, Any]) -> None:
        """Install what ``read`` returned, in what is there already: what two objects share, they share afterwards."""
        if not encoded:
            return
        leaves = {key: value.clone() for key, value in encoded.items() if key != STRUCTURE}
        found = self._found()
        restore(found, json.loads(encoded[STRUCTURE]), leaves, self._parameter)
        for name, optimizer in self._objects.items():
            vars(optimizer).update(found[name]["attributes"])
            state = optimizer.state
            for key in [key for key in state if not isinstance(key, Tensor)]:
                del state[key]
            state.update(found[name]["state"])

    def _encoded(self) -> tuple[str, Leaves]:
        leaves: Leaves = {}
        return json.dumps(encode(self._found(), "extras", leaves, self._index)), leaves

    def _found(self) -> dict[str, Any]:
        return {name: _kept_by(optimizer) for name, optimizer in self._objects.items()}

    def _index(self, given: Tensor | int) -> Any:
        """Which parameter a tensor is, or lies on, or a number means: a class may keep any of them."""
        if isinstance(given, int):
            return self._meaning(given)
        if id(given) in self._index_of or not given.numel():
            return self._index_of.get(id(given))
        place = given.data_ptr(), given.shape, given.stride()
        same = (at for at, one in self._parameters.items() if (one.data_ptr(), one.shape, one.stride()) == place)
        return next(same, None)

    def _meaning(self, number: int) -> dict[str, int] | None:
        if number < LEAST_ADDRESS:
            return None
        if number in self._index_of:
            return {"id of": self._index_of[number]}
        at = next((at for at, one in self._parameters.items() if one.data_ptr() == number), None)
        return None if at is None else {"address of": at}

    def _parameter(self, index: int) -> Tensor:
        if index not in self._parameters:
            raise StateDictError(f"Saved state refers to parameter {index}, which this optimizer does not step.")
        return self._parameters[index]


def _kept_by(optimizer: Optimizer) -> dict[str, Any]:
    attributes = {key: value for key, value in vars(optimizer).items() if key not in _of_torch()}
    return {"attributes": attributes, "state": {k: v for k, v in optimizer.state.items() if not isinstance(k, Tensor)}}


def _mark(text: str, leaves: Leaves) -> tuple[str, list[tuple[int, int]]]:
    """Equal as long as nothing was changed or replaced."""
    return text, [(tensor.data_ptr(), tensor._version) for tensor in leaves.values()]
