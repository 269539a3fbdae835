"""Contenders under DeepSpeed's ZeRO: its own optimizer where it has one of this name, and ours.

Gradients come from the engine's own backward, for it keeps them where nobody else can put them; so weights are not
compared with one process here. A step is ``engine.step()``: ZeRO's own work is in it, on both sides.
"""

from __future__ import annotations

import contextlib
import io
import logging
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from dist_optim.integrations import cpu_rehearsal
from measuring.contenders import OURS, Build, Contender, Problem
from measuring.through_backward import BATCH, examples_of

__all__ = ["under_zero"]

# Its Muon makes the update inside backward, where a step's time does not see it.
DEEPSPEEDS_OWN: dict[str, dict[str, Any]] = {
    "adamw_torch": {"type": "AdamW", "params": {"torch_adam": True}},
}


def under_zero(problem: Problem, stage: int) -> dict[str, Build]:
    """How to build them, by name."""
    recipe, configs = problem.recipe, {}
    if own := DEEPSPEEDS_OWN.get(recipe.name):
        configs["DeepSpeed"] = {**own, "params": {**recipe.values, **own["params"]}}
    configs[OURS] = {"type": f"dist_optim.{recipe.name}", "params": recipe.options}
    return {name: partial(_contender, problem, stage, config, name) for name, config in configs.items()}


def _contender(problem: Problem, stage: int, optimizer: dict[str, Any], name: str) -> Contender:
    engine = engine_of(problem.model(), stage, optimizer, problem.device)
    examples = examples_of(problem)

    def prepare() -> None:
        engine.backward(engine(examples).square().mean())

    return Contender(name=name, prepare=prepare, step=engine.step)


def engine_of(model: nn.Module, stage: int, optimizer: dict[str, Any], device: torch.device) -> Any:
    """DeepSpeed's engine, by its JSON."""
    package = quiet_deepspeed(device)
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "optimizer": optimizer,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # the route audit
        return package.initialize(model=model, config=config)[0]


@cache
def quiet_deepspeed(device: torch.device) -> Any:
    """The package, with our names in it."""
    if device.type == "cpu":
        cpu_rehearsal.choose_cpu_for_deepspeed()
    import deepspeed as package

    from dist_optim.integrations.deepspeed import register

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    register()
    return package
