"""This rank's parts of parameters and of gradients: read all together where they are alike, sooner than one by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress
from operator import attrgetter, is_

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_optim.layouts.detect import PlacedParameter
from dist_optim.layouts.layout import Elsewhere, Replicated

__all__ = ["PartsHere"]

_LOCAL, _SPEC = attrgetter("_local_tensor"), attrgetter("_spec")
_GRADIENT, _DTYPE, _LAYOUT = attrgetter("grad"), attrgetter("dtype"), attrgetter("layout")


class PartsHere:
    """What this rank stores of an optimizer's parameters.

    Args:
        placed: All of them, by index.
    """

    def __init__(self, placed: Sequence[PlacedParameter]) -> None:
        self._placed = placed
        self._parameters = [one.parameter for one in placed]
        self._trained_here = [
            index for index, one in enumerate(placed) if one.is_trained and type(one.layout) is not Elsewhere
        ]
        are_themselves = all(one.member is None for one in placed)
        self._are_cut = are_themselves and all(type(one) is DTensor for one in self._parameters)
        self._are_whole = are_themselves and all(
            type(one.layout) is Replicated and not isinstance(one.parameter, DTensor) for one in placed
        )
        self._dtypes = {one.dtype for one in placed}

    def all_gradients(self) -> list[Tensor | None]:
        """What every parameter, by index, has in its ``grad``."""
        return list(map(_GRADIENT, self._parameters))

    def lacking(self, has: Sequence[bool]) -> list[bool]:
        """Which of the first parameters have a part here, and no gradient."""
        if all(has):
            return [False] * len(has)
        return [not is_there and one.local().numel() > 0 for one, is_there in zip(self._placed, has, strict=False)]

    def are_usual(self, gradients: Sequence[Tensor | None], has: Sequence[bool]) -> bool:
        """Whether those that are there are dense, of the dtype that all parameters have, and lie as these do.

        False is no verdict: then each is to be looked at by itself.
        """
        parts = self._parts_of(list(compress(self._parameters, has)), list(compress(gradients, has)))
        if parts is None or len(self._dtypes) > 1:
            return False
        return self._dtypes.issuperset(map(_DTYPE, parts)) and {torch.strided}.issuperset(map(_LAYOUT, parts))

    def gradients(self, present: Sequence[bool]) -> dict[int, Tensor]:
        """This rank's part of every gradient that is to be stepped by; zeros where only other ranks have one."""
        indices = list(compress(self._trained_here, map(present.__getitem__, self._trained_here)))
        parameters = list(map(self._parameters.__getitem__, indices))
        parts = self._parts_of(parameters, list(map(_GRADIENT, parameters)))
        if parts is None:
            parts = [_gradient_or_zeros(self._placed[index]) for index in indices]
        return dict(zip(indices, parts, strict=True))

    def parameters(self, indices: Iterable[int]) -> dict[int, Tensor]:
        """This rank's part of these parameters, as plain tensors on their storage."""
        if self._are_cut:
            return {index: _LOCAL(self._parameters[index]) for index in indices}
        return {index: self._placed[index].local() for index in indices}

    def _parts_of(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Sequence[Tensor] | None:
        """Of gradients that are all there, and lie as their parameters do; None where one may not."""
        kinds = set(map(type, gradients))
        if self._are_whole and kinds <= {Tensor}:
            return gradients  # type: ignore[return-value]
        # An engine gives both the same object that says how they are placed.
        if self._are_cut and kinds <= {DTensor} and all(map(is_, map(_SPEC, gradients), map(_SPEC, parameters))):
            return list(map(_LOCAL, gradients))
        return None


def _gradient_or_zeros(one: PlacedParameter) -> Tensor:
    gradient = one.local_gradient()
    return torch.zeros_like(one.local()) if gradient is None else gradient
