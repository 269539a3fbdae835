"""Tied weights under FSDP: a parameter that several modules share must lie in one unit, or the first forward fails.

FSDP takes a model apart by classes of layers. Where a class holds one end of a tie (BERT's embeddings, whose weight is
the decoder's too), or FSDP2's own group of input and output embedding holds two of four (T5), torch ends in an error
that names neither.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from dist_optim.errors import UnsupportedError

__all__ = ["parted_ties", "refuse_parted_ties"]


def refuse_parted_ties(model: nn.Module, plugin: Any) -> None:
    """Refuse, before anything is placed, ties that this FSDP would part.

    Raises:
        UnsupportedError: With the settings that keep them whole.
    """
    parted, settings = parted_ties(model, plugin)
    if parted:
        changes = ", ".join(f'"{key}": {value!r}' for key, value in settings.items())
        raise UnsupportedError(
            f"{', '.join(repr(name) for name in parted[0])} share one weight, and FSDP would put them into different "
            f"units. Set in fsdp_config: {changes}."
        )


def parted_ties(model: nn.Module, plugin: Any) -> tuple[list[list[str]], dict[str, Any]]:
    """Names of modules that share a weight which FSDP would part, and the settings of FSDP that keep them whole."""
    wrapped = _wrapped_classes(model, plugin)
    parted: list[list[str]] = []
    settings: dict[str, Any] = {}
    for ends in _ties(model).values():
        units = {_unit_of(name, model, wrapped) for name in ends}
        if len(units) > 1:
            kinds = {type(model.get_submodule(unit)).__name__ for unit in units if unit}
            left = settings.get("transformer_layer_cls_to_wrap", wrapped)
            settings["transformer_layer_cls_to_wrap"] = [kind for kind in left if kind not in kinds]
            parted.append(ends)
        if getattr(plugin, "fsdp_version", 1) == 2 and _is_parted_by_fsdp2(model, ends):
            settings["version"] = 1
            parted.append(ends)
    return parted, settings


def _ties(model: nn.Module) -> dict[int, list[str]]:
    """Names of modules that share a parameter, by the parameter."""
    ends: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            ends[id(parameter)].append(name)
    return {key: names for key, names in ends.items() if len(names) > 1}


def _wrapped_classes(model: nn.Module, plugin: Any) -> list[str]:
    policy = getattr(plugin, "auto_wrap_policy", None)
    if "transformer" not in str(getattr(policy, "__name__", policy)).lower():
        return []
    asked = getattr(plugin, "transformer_cls_names_to_wrap", None)
    return sorted(asked or getattr(model, "_no_split_modules", None) or [])


def _unit_of(name: str, model: nn.Module, wrapped: list[str]) -> str:
    """The innermost wrapped module that holds this one; the whole model by ''."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        outer = ".".join(parts[:length])
        if type(model.get_submodule(outer)).__name__ in wrapped:
            return outer
    return ""


def _is_parted_by_fsdp2(model: nn.Module, ends: list[str]) -> bool:
    """accelerate gives input and output embedding a unit of their own: a tie lies in it with all ends, or with none."""
    pair = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    inside = [any(model.get_submodule(name) is one for one in pair) for name in ends]
    return any(inside) and not all(inside)
