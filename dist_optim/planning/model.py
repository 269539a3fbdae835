"""The model that is planned, on the meta device: what transformers builds from a config, or a module of your own."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_optim.errors import MissingPackageError, UsageError
from dist_optim.layouts.detect import detect
from dist_optim.overrides import check
from dist_optim.planning.shipped import find_model_config

__all__ = ["PlannedModel", "read_model"]


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """What a plan needs to know of a model."""

    name: str
    module: nn.Module
    """On the meta device; in any dtype: the plan says in which it is held."""
    units: tuple[tuple[str, ...], ...]
    """Names of the parameters that an engine gathers together: each layer's, and at the end what is in none."""
    shapes: dict[str, torch.Size]
    """Of all parameters, tied ones once."""
    config: Any = None
    """Of transformers, where it was built from one."""
    known: dict[Any, Any] = field(default_factory=dict)
    """What was found out about its shapes, for the next plan."""

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(shape.numel() for shape in self.shapes.values())


def read_model(
    source: str | Path | nn.Module | PlannedModel, unit_classes: Collection[str] | None = None
) -> PlannedModel:
    """The model of a config: a file, a folder with ``config.json``, the name of a packaged one, or a module as it is.

    Args:
        source: ``llama_8b`` or ``configs/models/llama_8b.json``; or a name of the Hub, as transformers takes it. What
            has been read is returned as it is.
        unit_classes: Names of the classes that an engine wraps one by one; None: the model's own layer classes, as
            accelerate's TRANSFORMER_BASED_WRAP takes them.

    Raises:
        UsageError: It cannot be read, or transformers cannot build it.
    """
    if isinstance(source, PlannedModel):
        return source
    if isinstance(source, nn.Module):
        return _planned(type(source).__name__, _without_storage(source), unit_classes)
    found = find_model_config(str(source))
    config = _config_of(str(found or source))
    name = Path(found or source)
    return _planned(
        name.stem if name.suffix == ".json" else name.name, _built(config, str(source)), unit_classes, config
    )


def _planned(name: str, module: nn.Module, classes: Collection[str] | None, config: Any = None) -> PlannedModel:
    shapes = {name: one.shape for name, one in detect(module).items()}
    return PlannedModel(name, module, _units_of(module, classes), shapes, config)


def with_layers(model: PlannedModel, count: int) -> Any:
    """The config with so many layers; None where it does not say how many it has."""
    if not isinstance(getattr(model.config, "num_hidden_layers", None), int):
        return None
    values = {**model.config.to_dict(), "num_hidden_layers": count}
    values.pop("layer_types", None)  # one a layer
    return type(model.config).from_dict(values)


def build_from(config: Any, **keywords: Any) -> nn.Module:
    """The model of a config, where tensors are made now: on the device that is the default one."""
    import transformers

    kind: Any = getattr(transformers, (config.architectures or [""])[0], None) or transformers.AutoModelForCausalLM
    make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    module: nn.Module = make(config, **keywords)
    return module


def _config_of(path: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            f"a model is read by transformers, which cannot be imported ({error}). Install it with: "
            "pip install 'dist-optim[train]'"
        ) from error
    check("models of transformers")
    if "/" not in path and not Path(path).exists():
        raise UsageError(
            f"--model {path!r} is neither a file or folder here nor a packaged name (dist-optim ls models). A name of "
            "the Hub has its owner before it: owner/name."
        )
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--model {path!r} cannot be read: {str(error).splitlines()[0]} Give a config.json, a folder that has one, "
            "or a packaged name (dist-optim ls models)."
        ) from error


def _built(config: Any, source: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return build_from(config)
    except Exception as error:  # a class's own, on values that the config holds
        raise UsageError(
            f"--model {source!r}: transformers cannot build it ({type(error).__name__}: {error}). Check its config."
        ) from error


def _without_storage(module: nn.Module) -> nn.Module:
    """A copy on the meta device, for which nothing is copied."""
    tensors: list[torch.Tensor] = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {}
    for one in tensors:
        bare = one.detach().to("meta")
        memo[id(one)] = nn.Parameter(bare, one.requires_grad) if isinstance(one, nn.Parameter) else bare
    return copy.deepcopy(module, memo)


def _units_of(module: nn.Module, classes: Collection[str] | None) -> tuple[tuple[str, ...], ...]:
    wanted = set(classes if classes is not None else getattr(module, "_no_split_modules", None) or ())
    inside: dict[int, str] = {}
    for name, child in module.named_modules():
        if type(child).__name__ in wanted:
            for parameter in child.parameters():
                inside[id(parameter)] = name
    units: dict[str, list[str]] = {}
    for name, one in detect(module).items():
        units.setdefault(inside.get(id(one.parameter), ""), []).append(name)
    root = units.pop("", [])
    return tuple(map(tuple, [*units.values(), *([root] if root else [])]))


def is_like(name: str) -> str:
    """A parameter's name without the numbers of its layers: what is alike in all of them."""
    return re.sub(r"\d+", "#", name)
