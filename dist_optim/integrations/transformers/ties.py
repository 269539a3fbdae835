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

__all__ = ["refuse_parted_ties"]


def refuse_parted_ties(model: nn.Module, plugin: Any) -> None:
    """Refuse, before anything is placed, a tie that this FSDP would part.

    Raises:
        UnsupportedError: With the setting that keeps it whole.
    """
    wrapped = _wrapped_classes(model, plugin)
    for ends in _ties(model).values():
        units = {_unit_of(name, model, wrapped) for name in ends}
        names = ", ".join(repr(name) for name in ends)
        if len(units) > 1:
            kinds = {type(model.get_submodule(unit)).__name__ for unit in units if unit}
            kept = [kind for kind in wrapped if kind not in kinds]
            raise UnsupportedError(
                f"{names} share one weight, and FSDP would put them into different units ({', '.join(sorted(kinds))} "
                f'is wrapped). Set fsdp_config={{"transformer_layer_cls_to_wrap": {kept}, ...}}, or untie them '
                "(config.tie_word_embeddings=False)."
            )
        if getattr(plugin, "fsdp_version", 1) == 2 and _is_more_than_a_pair(model, ends):
            raise UnsupportedError(
                f"{names} share one weight, and accelerate places only the input and the output embedding together "
                'under FSDP2. Set fsdp_config={"version": 1, ...}, or untie them (config.tie_word_embeddings=False).'
            )


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


def _is_more_than_a_pair(model: nn.Module, ends: list[str]) -> bool:
    """Whether the tie of input and output embedding has further ends."""
    pair = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    modules = [model.get_submodule(name) for name in ends]
    return all(any(one is module for module in modules) for one in pair) and len(modules) > 2
