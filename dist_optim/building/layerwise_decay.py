"""Rates that fall with the distance from the output: groups by pattern, for fine-tuning."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from torch import nn

from dist_optim.building.patterns import LR_SCALE
from dist_optim.errors import HyperparameterError, ParameterError
from dist_optim.layouts.detect import named_parameters

__all__ = ["layerwise_decay"]


def layerwise_decay(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Groups for ``params=`` of ``build_optimizer``: each layer has ``decay`` times the rate of the one after it.

    Layers are the numbered modules of the model's longest list of them (``layers.0``, ``layers.1``, ...). What the
    model lists before them (embeddings) counts as one more layer; what it lists after them (the last norm, the head)
    has the full rate.

    Args:
        model: Placed or plain; the groups hold names.
        decay: More than 0, and at most 1.

    Raises:
        ParameterError: The model has no numbered layers.
        HyperparameterError: ``decay`` is no such number.
    """
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay <= 1:
        raise HyperparameterError(f"decay={decay!r} is no number above 0 and up to 1.")
    names = [name for name, _ in named_parameters(model)]
    stack, depth = _longest_stack(names)
    first = min(at for at, name in enumerate(names) if name.startswith(stack))
    groups: dict[int, list[str]] = defaultdict(list)
    for at, name in enumerate(names):
        number = re.match(re.escape(stack) + r"(\d+)\.", name)
        layer = int(number[1]) + 1 if number else 0 if at < first else depth + 1
        groups[layer].append(name)
    return [{"params": own, LR_SCALE: float(decay) ** (depth + 1 - layer)} for layer, own in sorted(groups.items())]


def _longest_stack(names: list[str]) -> tuple[str, int]:
    """The name of the list with the most numbered modules, with its dot, and how many there are."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        for found in re.finditer(r"(?:^|(?<=\.))(\d+)\.", name):
            numbers[name[: found.start()]].add(int(found[1]))
    if not numbers:
        raise ParameterError(
            "The model has no numbered layers (as layers.0 and layers.1), by which rates could decay. Write groups by "
            'pattern yourself: params=[{"params": "embed.*", "lr_scale": 0.1}, ..., {"params": "*"}].'
        )
    stack = max(numbers, key=lambda name: (len(numbers[name]), -len(name)))
    return stack, max(numbers[stack]) + 1
