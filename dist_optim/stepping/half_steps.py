"""Which parameters a failed step has left half updated: known by themselves, whichever optimizer's save meets them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["heal", "leave_half", "text_of", "why_not_saved"]

_torn = WeakTensorKeyDictionary()  # the number of the step, by parameter


def leave_half(parameters: Iterable[nn.Parameter], step: int) -> None:
    """Note that this step failed after a part of its updates was made. On all ranks alike, as what follows."""
    for parameter in parameters:
        _torn[parameter] = step


def heal(parameters: Iterable[nn.Parameter]) -> None:
    """Note that other weights were loaded into them."""
    for parameter in parameters:
        _torn.pop(parameter, None)


def why_not_saved(parameters: Iterable[nn.Parameter]) -> str:
    """Why these must not be saved, and what to do; empty where they may be. Its answer is equal on all ranks."""
    steps = [_torn[parameter] for parameter in parameters if parameter in _torn]
    return text_of(steps[0]) if steps else ""


def text_of(step: int) -> str:
    """What to say of weights, or state, that are of no step at all."""
    return (
        f"Step {step} failed after a part of its updates was made: the weights are half of a step, and would be saved "
        "so. Load the last checkpoint into model and optimizer, or build both anew, and go on from there."
    )
