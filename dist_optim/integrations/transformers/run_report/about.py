"""How a run was started, for who looks at its results later: arguments, model, audit, versions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dist_optim.integrations.transformers.run_report.measures import optimizer_of_ours, text_of
from dist_optim.integrations.versions import versions
from dist_optim.telemetry.figures import coverage_of

__all__ = ["about"]


def about(args: Any, state: Any, settings: Mapping[str, Any], model: Any, optimizer: Any) -> dict[str, Any]:
    """What ``run.json`` holds; an audit and coverage where the optimizer is ours. Local.

    Args:
        args: The Trainer's arguments; their tokens are left out, as transformers does.
        state: The Trainer's state when training begins.
        settings: What else the run was asked for.
        model: What is trained.
        optimizer: What steps, as accelerate or DeepSpeed has wrapped it.
    """
    found: dict[str, Any] = {
        "world_size": args.world_size,
        "device": str(args.device),
        "model": type(model).__name__,
        "resumed_from_step": state.global_step or None,
        "settings": {**settings, **args.to_dict()},
        "set": sorted({*_set(args), *(name for name, value in settings.items() if value is not None)}),
        "versions": dict(versions(text_of(args.optim))),
    }
    ours = optimizer_of_ours(optimizer)
    if ours is not None:
        found |= {"audit": ours.route_audit(), "coverage": coverage_of(ours)}
    return found


def _set(args: Any) -> list[str]:
    """Names of arguments whose value is not the default of their dataclass."""
    defaults = {
        one.name: one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        for one in dataclasses.fields(args)
    }
    return [name for name, default in defaults.items() if text_of(getattr(args, name, default)) != text_of(default)]
