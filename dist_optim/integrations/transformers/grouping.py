"""The Trainer's param groups: those that decay and those that do not, within the groups that patterns make."""

from __future__ import annotations

from typing import Any

from torch import nn

from dist_optim.building.patterns import by_pattern, has_patterns, meta_parameter
from dist_optim.errors import ParameterError
from dist_optim.layouts.detect import detect, named_parameters
from dist_optim.layouts.detect_zero import logical_shape

__all__ = ["groups_for_trainer", "groups_of_patterns"]

Groups = list[dict[str, Any]]


def groups_for_trainer(model: nn.Module, decays: set[str], decay: float | None, patterns: Any) -> Groups:
    """As the Trainer groups parameters: those that decay, then those that do not; group by group, where there are any.

    Args:
        model: Before it is placed.
        decays: Names of the parameters that decay.
        decay: Weight decay of those; None leaves it to the optimizer.
        patterns: Groups by pattern, from ``optim_args``; None for all that is trained.

    Raises:
        ParameterError: The patterns do not fit the model.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decaying = {id(parameter) for name, parameter in model.named_parameters() if name in decays}
    kept, none = ({}, {}) if decay is None else ({"weight_decay": decay}, {"weight_decay": 0.0})
    groups: Groups = []
    for group in groups_of_patterns(model, patterns) or [{"params": trained}]:
        with_decay = [one for one in group["params"] if id(one) in decaying]
        without = [one for one in group["params"] if id(one) not in decaying]
        groups += [{**kept, **group, "params": with_decay}, {**group, **none, "params": without}]
    return groups


def groups_of_patterns(model: nn.Module, patterns: Any) -> Groups | None:
    """Groups with the model's parameters in the place of patterns; None where there are no patterns.

    Raises:
        ParameterError: They do not fit the model, or are no patterns.
    """
    if patterns is None:
        return None
    if not has_patterns(patterns):
        raise ParameterError(
            f"params={patterns!r:.80} are no groups by pattern. Give a list of them: "
            '[{"params": "*.weight", "lr": 1e-3}, {"params": "*"}].'
        )
    parameters, placed = dict(named_parameters(model)), detect(model)

    def meta(name: str) -> nn.Parameter:
        one, parameter = placed[name], parameters[name]
        shape = logical_shape(parameter)  # of DeepSpeed's placeholders; any other engine's are in the layout
        return meta_parameter(one.shape if shape == parameter.shape else shape, one.dtype, parameter.requires_grad)

    return by_pattern(patterns, parameters, meta)
